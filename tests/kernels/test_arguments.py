"""The losses share their arguments: `help` describes them, wrong ones are named, packed ones do the same."""

import inspect

import dapo_kernels
import pytest
import torch
from dapo_kernels import (
    Head,
    Objective,
    Sequences,
    Tokens,
    arguments,
    linear_logprobs,
    linear_policy_loss,
    reference,
)
from dapo_kernels.rows import Penalty

from tests.kernels.inputs import CLIP, make, options_for

LOSSES = [
    (reference.policy_loss, arguments.LossOptions),
    (dapo_kernels.policy_loss, arguments.LossOptions),
    (linear_policy_loss, arguments.LinearLossOptions),
    (linear_logprobs, arguments.HeadOptions),
]
NAMES = ["reference", "policy_loss", "linear_policy_loss", "linear_logprobs"]


def arguments_of(function):
    """Make the tensors that a function requires, by name: 12 tokens of 25 ids."""
    logits, targets, old, advantages, mask = make(12, 25)
    given = {"logits": logits, "hidden": logits, "weight": torch.eye(25), "targets": targets, "mask": mask}
    given |= {"old_logprobs": old, "advantages": advantages}
    return {name: given[name] for name in inspect.signature(function).parameters if name in given}


@pytest.mark.parametrize(("function", "options"), LOSSES, ids=NAMES)
def test_help_describes_every_argument(function, options):
    lines = [line for line in inspect.getdoc(function).splitlines() if ": " in line]
    described = {name for line in lines for name in line.split(":")[0].split(", ")}
    parameters = set(inspect.signature(function).parameters) - {"options"}
    assert parameters | set(options.__annotations__) <= described


@pytest.mark.parametrize(("function", "options"), LOSSES, ids=NAMES)
def test_an_unknown_keyword_is_a_type_error_that_names_it(function, options):
    bounds = {name: 0.2 for name in ("clip_low",) if name in options.__annotations__}
    with pytest.raises(TypeError, match="unexpected keyword argument 'clip_hi'"):
        function(**arguments_of(function), **bounds, clip_hi=0.3)


@pytest.mark.parametrize("function", [function for function, _ in LOSSES[:3]], ids=NAMES[:3])
@pytest.mark.parametrize("name", CLIP)
def test_a_missing_clip_bound_is_a_type_error_that_names_it(function, name):
    with pytest.raises(TypeError, match=f"missing .* argument: '{name}'"):
        function(**arguments_of(function), **{other: 0.2 for other in CLIP if other != name})


@pytest.mark.parametrize("function", [function for function, _ in LOSSES[:3]], ids=NAMES[:3])
def test_a_coefficient_without_reference_log_probs_is_refused(function):
    with pytest.raises(ValueError, match=r"kl_coef is 0.1 and ref_logprobs is None"):
        function(**arguments_of(function), **CLIP, kl_coef=0.1)


@pytest.mark.parametrize("options", options_for(12), ids=lambda options: "+".join(options))
def test_packed_arguments_are_the_same_call(options):
    given = arguments_of(linear_policy_loss)
    leaves, results = [], []
    for is_packed in (False, True):
        hidden, weight = (given[name].clone().requires_grad_() for name in ("hidden", "weight"))
        leaves.append((hidden, weight))
        total, rest = torch.zeros_like(weight), dict(options)
        if is_packed:
            head = Head(weight, temperature=rest.pop("temperature", 1.0))
            penalty = Penalty(rest.pop("kl_coef"), rest.pop("ref_logprobs")) if "kl_coef" in rest else None
            kinds = {name: rest.pop(name) for name in ("dual_clip", "kind") if name in rest}
            objective = Objective(**CLIP, **kinds)
            sequences = Sequences(rest.pop("cu_seqlens")) if "cu_seqlens" in rest else None
            tokens = {name: given[name] for name in ("targets", "mask", "old_logprobs", "advantages")}
            tokens = Tokens(**tokens, **rest, penalty=penalty, sequences=sequences)
            result = head.loss(hidden, tokens, objective, total)
            scored = head.logprobs(hidden, tokens)
        else:
            tensors = given | {"hidden": hidden, "weight": weight}
            result = linear_policy_loss(**tensors, **CLIP, **rest, weight_grad=total)
            temperature = options.get("temperature", 1.0)
            scored = linear_logprobs(hidden, weight, given["targets"], given["mask"], temperature=temperature)
        result.loss.backward()
        results.append([*vars(result).values(), scored, hidden.grad, total])
    assert all(map(torch.equal, *results)) and results[0][-1].any()
