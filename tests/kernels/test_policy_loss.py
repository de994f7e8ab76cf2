"""policy_loss is tested in four parts: the kernels through the interpreter (interpreted.py), their twin in
plain torch, the fallback, and the arguments that are refused.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dapo_kernels import logits_torch, policy_loss, reference
from dapo_kernels.launch import TABLE, Launch, launches
from dapo_kernels.rows import Objective, Penalty, Tokens, Vocabulary

from tests.kernels.inputs import CLIP, make, options_for, relative_error, truth_of

ROOT = Path(__file__).parents[2]


def run(inputs, **options):
    logits = inputs[0].clone().requires_grad_()
    result = policy_loss(logits, *inputs[1:], **CLIP, **options)
    result.loss.backward()
    return result, logits.grad


def test_the_interpreted_kernels_pass_their_tests():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/kernels/interpreted.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_twin_in_plain_torch_is_the_reference(dtype):
    inputs = make(dtype=dtype)
    for options in options_for(12):
        if (kind := options.get("kind", "dapo")) == "gspo":
            continue  # its ratio is made outside the kernels
        objective = Objective(**CLIP, dual_clip=options.get("dual_clip"), kind=kind)
        penalty = Penalty(options["kl_coef"], options["ref_logprobs"]) if "kl_coef" in options else None
        tokens = Tokens(inputs[1], inputs[4], inputs[2], inputs[3], options.get("weights"), penalty)
        shard = Vocabulary(valid_vocab=990, temperature=options.get("temperature", 1.0)).shard(1000)
        logits = inputs[0].clone()
        logits[:, 990:] = math.nan
        logits[~inputs[4]] = math.nan
        tokens.targets.clamp_(max=989)
        truth, true_grad = truth_of((inputs[0][:, :990], *inputs[1:]), **options)
        statistics = logits_torch.row_statistics(logits, tokens, shard)[None]
        rows = logits_torch.loss_and_gradient(logits, statistics, tokens, shard, objective, logits)
        assert relative_error(rows.losses.sum(), truth.loss) < 2e-5
        assert relative_error(rows.entropy, truth.entropy) < 2e-5
        assert relative_error(logits[:, :990], true_grad) < (2e-2 if dtype == torch.bfloat16 else 2e-5)
        assert not logits[:, 990:].any()


@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
def test_the_twin_scales_the_gradient_by_what_the_loss_is_multiplied_with(factor):
    gradient = torch.randn(3, 5)
    expected = gradient * factor
    logits_torch.scale_(gradient, torch.tensor(factor))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("reason", ["no GPU", "no Triton"])
def test_where_the_kernels_cannot_run_it_is_the_reference(monkeypatch, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if reason == "no Triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setitem(sys.modules, "triton", None)
    inputs = make()
    result, grad = run(inputs)
    leaf = inputs[0].clone().requires_grad_()
    expected = reference.policy_loss(leaf, *inputs[1:], **CLIP)
    expected.loss.backward()
    assert torch.equal(result.loss, expected.loss) and torch.equal(grad, leaf.grad)


def test_importing_the_package_does_not_import_triton():
    names = "dapo_kernels.policy_loss, dapo_kernels.linear_policy_loss"
    code = f"import sys, dapo_kernels; {names}; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


WRONG = [
    ("logits", lambda a: a["logits"][0], r"logits has shape \[25\]; expected \[T, V/tp\]"),
    ("logits", lambda a: a["logits"].int(), "logits is torch.int32; expected one of torch.float32"),
    ("logits", lambda a: a["logits"].t().contiguous().t(), r"logits has strides \[1, 4\] .*a contiguous"),
    ("logits", lambda a: a["logits"].tolist(), "logits is a list; expected a tensor"),
    ("targets", lambda a: a["targets"][:3], r"targets has shape \[3\]; expected \[4\]"),
    ("targets", lambda a: a["targets"].int(), "targets is torch.int32; expected torch.int64"),
    (
        "targets",
        lambda a: a["targets"] + 25,
        r"targets holds \d+ inside the mask, at token \d+; expected 0 to 24",
    ),
    (
        "targets",
        lambda a: a["targets"] - 25,
        r"targets holds -\d+ inside the mask, at token \d+; expected 0 to 24",
    ),
    ("targets", lambda a: a["targets"].to("meta"), "targets is on meta; expected cpu"),
    ("old_logprobs", lambda a: torch.zeros(8)[::2], r"old_logprobs has strides \[2\]"),
    ("old_logprobs", lambda a: None, "old_logprobs is a NoneType; expected a tensor"),
    ("advantages", lambda a: a["advantages"][:, None], r"advantages has shape \[4, 1\]; expected \[4\]"),
    ("advantages", lambda a: a["advantages"].long(), "advantages is torch.int64; expected one of"),
    ("mask", lambda a: a["mask"].float(), "mask is torch.float32; expected torch.bool"),
    ("weights", lambda a: a["mask"], "weights is torch.bool; expected one of"),
    (
        "weights",
        lambda a: torch.tensor([1, 1, -0.5, 1]),
        "weights holds -0.5 inside the mask, at token 2; expected finite numbers ≥ 0",
    ),
    ("weights", lambda a: torch.tensor([1, math.nan, 1, 1]), "weights holds nan inside the mask"),
    ("weights", lambda a: torch.tensor([1, math.inf, 1, 1]), "weights holds inf inside the mask"),
    ("ref_logprobs", lambda a: torch.zeros(5), r"ref_logprobs has shape \[5\]; expected \[4\]"),
    ("kl_coef", lambda a: 0.1, "kl_coef is 0.1 and ref_logprobs is None"),
    ("kl_coef", lambda a: -0.1, "kl_coef is -0.1; expected a number ≥ 0"),
    ("clip_low", lambda a: 1.2, "clip_low is 1.2; expected 0 to 1"),
    ("clip_high", lambda a: -0.2, "clip_high is -0.2"),
    ("dual_clip", lambda a: 0.5, "dual_clip is 0.5; expected None or a number > 1"),
    ("temperature", lambda a: 0.0, "temperature is 0.0; expected a number > 0"),
    (
        "valid_vocab",
        lambda a: 26,
        "valid_vocab is 26, but logits holds 25 columns and tp_group 1 ranks; expected 1 to 25",
    ),
    ("valid_vocab", lambda a: 0, "valid_vocab is 0"),
    ("tp_group", lambda a: 2, "tp_group is a int; expected a process group"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"), WRONG, ids=[f"{i}-{w[0]}" for i, w in enumerate(WRONG)]
)
def test_wrong_input_is_named_before_anything_runs(name, value, message):
    logits, targets, old, advantages, _ = make(4, 25)
    mask = torch.ones(4, dtype=torch.bool)
    given = {
        "targets": targets,
        "old_logprobs": old,
        "advantages": advantages,
        "mask": mask,
        "logits": logits,
    }
    before = logits.clone()
    with pytest.raises(ValueError, match=f"^{message}"):
        policy_loss(**(CLIP | given | {name: value(given)}))
    assert torch.equal(logits, before)


def test_targets_outside_the_mask_are_not_looked_at():
    logits, targets, old, advantages, mask = make(4, 25)
    mask[0], targets[0] = False, -100
    run((logits, targets, old, advantages, mask), weights=torch.tensor([math.nan, 1, 1, 1]))


def test_launches_come_from_the_newest_known_architecture_that_is_not_newer():
    assert launches(90, 151_936) == TABLE[90][-1][1:]
    assert launches(89, 1000) == TABLE[80][0][1:] == (Launch(1024, 4), Launch(1024, 4))
    assert launches(120, 5) == TABLE[100][0][1:]
    assert launches(75, 5) == TABLE[80][0][1:]
