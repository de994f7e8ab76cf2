"""Only a GPU shows races, 16-bit products, more than 2³¹ elements, the packed attention kernel and a whole
training step. make gpu-check
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dapo_kernels import linear_logprobs, linear_policy_loss, policy_loss, reference

from tests.conftest import attend
from tests.distributed.launch import ROOT, measured, torchrun
from tests.distributed.moves import OFFLOADED
from tests.distributed.reference import make_hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]
GPU = torch.device("cuda")
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def tokens(T: int, V: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Make targets, old log-probs, advantages, mask and weights of T tokens."""
    generator = torch.Generator(GPU).manual_seed(seed)
    rand = lambda: torch.rand(T, generator=generator, device=GPU)  # noqa: E731
    return (rand() * V).long(), -3 - rand(), 2 * rand() - 1, rand() < 0.7, rand()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("V", [25, 1000, 2052, 3001, 32000, 151936])
def test_policy_loss_equals_the_float64_reference(V: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits = (3 * torch.randn(97, V, device=GPU)).to(dtype)
    targets, old, advantages, mask, weights = tokens(97, V)
    fused, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    a = policy_loss(fused, targets, old, advantages, mask, weights=weights, dual_clip=3.0, **CLIP)
    old, advantages, weights = old.double(), advantages.double(), weights.double()
    b = reference.policy_loss(exact, targets, old, advantages, mask, weights=weights, dual_clip=3.0, **CLIP)
    a.loss.backward()
    b.loss.backward()
    assert relative(a.logprobs, b.logprobs) < 2e-5
    assert relative(a.entropy, b.entropy) < 2e-5
    assert torch.equal(a.clipped_low, b.clipped_low) and torch.equal(a.clipped_high, b.clipped_high)
    assert relative(fused.grad, exact.grad) < TOLERANCE[dtype]


def test_more_than_two_to_the_31_elements() -> None:
    T, V = 15_000, 151_936
    logits = torch.randn(T, V, device=GPU, dtype=torch.bfloat16)
    last = logits[-8:].clone().double().requires_grad_()
    given = tokens(T, V)
    given[2][-8:], given[3][-8:] = 1.0, True  # advantages, mask: they have a gradient
    logits.requires_grad_()
    fused = policy_loss(logits, *given[:4], weights=given[4], **CLIP)
    fused.loss.backward()
    exact = reference.policy_loss(last, *(x[-8:] for x in given[:4]), weights=given[4][-8:], **CLIP)
    exact.loss.backward()
    torch.testing.assert_close(fused.logprobs[-8:].double(), exact.logprobs, rtol=1e-5, atol=1e-5)
    assert relative(logits.grad[-8:], last.grad) < 2e-2


def test_values_are_refused_on_a_gpu_too() -> None:
    torch.manual_seed(4)
    hidden, head = torch.randn(8, 64, device=GPU), torch.randn(100, 64, device=GPU)
    targets, old, advantages, mask, weights = tokens(8, 100)
    mask[:] = True
    wrongs = [("targets", targets + 100), ("targets", targets - 100)]
    wrongs += [("weights", -weights), ("weights", weights * torch.nan)]
    for name, wrong in wrongs:
        given = {"targets": targets, "old_logprobs": old, "advantages": advantages, "mask": mask}
        given |= {"weights": weights, name: wrong}
        message = rf"^{name} holds .* inside the mask, at token \d; expected"
        with pytest.raises(ValueError, match=message):
            linear_policy_loss(hidden, head, **given, **CLIP)
        with pytest.raises(ValueError, match=message):
            policy_loss(hidden @ head.t(), **given, **CLIP)
        given["mask"] = torch.zeros_like(mask)
        assert float(linear_policy_loss(hidden, head, **given, **CLIP).loss) == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_two_runs_are_equal_to_the_bit_and_scoring_equals_learning(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    hidden = torch.randn(3000, 512, device=GPU).to(dtype)
    head = (torch.randn(32000, 512, device=GPU) / 8).to(dtype)
    targets, old, advantages, mask, weights = tokens(3000, 32000)
    options = {"fp32_logits": True, "chunk_bytes": 64 << 20}
    runs = []
    for _ in range(2):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        out = linear_policy_loss(h, w, targets, old, advantages, mask, weights=weights, **options, **CLIP)
        out.loss.backward()
        runs.append((out.loss.detach(), out.logprobs, h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    scored = linear_logprobs(hidden, head, targets, mask, **options)
    assert torch.equal(scored, runs[0][1])


def test_another_number_of_tokens_compiles_nothing() -> None:
    from dapo_kernels import logits_triton

    def call(T: int) -> None:
        logits = torch.randn(T, 2048, device=GPU).requires_grad_()
        given = tokens(T, 2048)
        policy_loss(logits, *given[:4], weights=given[4], **CLIP).loss.backward()

    def compiled() -> int:
        return sum(
            len(cache[0])
            for k in (logits_triton.row_statistics_kernel, logits_triton.loss_gradient_kernel)
            for cache in k.device_caches.values()
        )

    call(64)
    before = compiled()
    for T in (1, 2, 16, 17, 1000, 1024, 4095, 8192):
        call(T)
    assert compiled() == before


@pytest.mark.parametrize("kind", ["dapo", "cispo", "gspo"])
@pytest.mark.parametrize("fp32_logits", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_policy_loss_equals_the_float64_reference(
    dtype: torch.dtype, fp32_logits: bool, kind: str
) -> None:
    torch.manual_seed(3)
    hidden = torch.randn(700, 256, device=GPU).to(dtype)
    head = (torch.randn(5000, 256, device=GPU) / 4).to(dtype)
    targets, noise, advantages, mask, weights = tokens(700, 4990)
    vocabulary = {"valid_vocab": 4990, "temperature": 0.8}
    options = {"weights": weights, "kind": kind, **vocabulary, **CLIP}
    if kind == "gspo":
        options["cu_seqlens"] = torch.tensor([0, 100, 100, 350, 700], device=GPU)
    h64, w64 = hidden.double().requires_grad_(), head.double().requires_grad_()
    # near the log-probs: else a few tokens would make all of the gradient
    own = linear_logprobs(h64.detach(), w64.detach(), targets, mask, **vocabulary)
    old = (own + 0.1 * (noise + 3.5)).float()
    exact = reference.policy_loss(h64 @ w64.t(), targets, old, advantages, mask, **options)
    exact.loss.backward()
    h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    before = w64.grad.float().std() * torch.randn(5000, 256, device=GPU)
    total = before.clone()
    options |= {"fp32_logits": fp32_logits, "chunk_bytes": 1 << 20}
    out = linear_policy_loss(h, w, targets, old, advantages, mask, weight_grad=total, **options)
    out.loss.backward()
    assert relative(out.logprobs, exact.logprobs) < (1e-5 if fp32_logits or dtype == torch.float32 else 2e-2)
    assert relative(h.grad, h64.grad) < 2 * TOLERANCE[dtype]
    assert relative(total - before, w64.grad) < 2 * TOLERANCE[dtype]
    assert not w.grad.any()


def queries_keys_values(num_tokens: int) -> list[torch.Tensor]:
    return [torch.randn(num_tokens, h, 64, device=GPU, dtype=torch.bfloat16) for h in (8, 2, 2)]


def test_packed_attention_kernel_keeps_sequences_apart() -> None:
    from dapo.policy.layers import PackedAttention

    torch.manual_seed(4)
    lengths = [7, 1, 130, 64]
    attention = PackedAttention.__new__(PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.scale, attention.context = None, SimpleNamespace(size=lambda: 1)
    query, key, value = queries_keys_values(sum(lengths))
    cu_seqlens = torch.tensor([0, 7, 8, 138, 202], dtype=torch.int32, device=GPU)
    packed = SimpleNamespace(cu_seqlens_q=cu_seqlens, max_seqlen_q=130)
    out = attention(query, key, value, None, packed_seq_params=packed)
    parts = zip(*(x.double().split(lengths) for x in (query, key, value)), strict=True)
    expected = torch.cat([attend(*(p.cpu() for p in part)) for part in parts])
    assert relative(out.cpu(), expected) < 1e-2


@pytest.mark.parametrize("context", [2, 4])
def test_packed_attention_kernel_gives_each_context_rank_its_own_tokens_past(context: int) -> None:
    """A run has fewer queries than keys: the kernel must let the last query see all of them."""
    from dapo.policy.layers import PackedAttention, key_runs

    torch.manual_seed(5)
    lengths = [2 * context * n for n in (3, 1, 40)]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32, device=GPU).cumsum(0, dtype=torch.int32)
    query, key, value = queries_keys_values(sum(lengths))
    parts = zip(*(x.double().cpu().split(lengths) for x in (query, key, value)), strict=True)
    expected = torch.cat([attend(*part) for part in parts])
    attention = PackedAttention.__new__(PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.scale = None
    # rank r has chunks r and 2·context − 1 − r of every sequence
    sequences = torch.arange(sum(lengths), device=GPU).split(lengths)
    chunks = [sequence.chunk(2 * context) for sequence in sequences]
    shards = [
        torch.cat([c for own in chunks for c in (own[rank], own[2 * context - 1 - rank])])
        for rank in range(context)
    ]
    for rank, mine in enumerate(shards):
        runs = key_runs(cu_seqlens, len(mine), rank, context)
        seen = torch.cat(shards)[runs.indices]
        out = attention._varlen(query[mine], key[seen], value[seen], runs.queries, runs.keys, max(lengths))
        assert relative(out.flatten(1).cpu(), expected[mine.cpu()]) < 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_arithmetic_example_learns_on_a_gpu(dtype: str, tmp_path: Path) -> None:
    options = [
        "run.steps=12",
        "eval.every=12",
        "parallel.tensor=1",
        f"policy.dtype={dtype}",
        f"run.dir={tmp_path}",
    ]
    done = torchrun(1, "-m", "dapo", "train", "examples/arithmetic/config.yaml", *options)
    assert done.returncode == 0, done.stdout
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval/accuracy"] <= 0.45
    assert rows[-1]["eval/accuracy"] >= 0.65
    assert max(row.get("policy/mismatch", 0) for row in rows) < (1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_5_moe_text", "deepseek_v3"])
def test_a_model_with_other_layers_scores_what_its_engine_samples(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    """The engine is transformers' own model; random weights, a task that they get right half of the time."""
    make_hf(kind, True, tmp_path / "model", vocab=25)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "examples/arithmetic/base" / name, tmp_path / "model")
    options = [
        f"policy.model={tmp_path / 'model'}", f"policy.dtype={dtype}", f"run.dir={tmp_path / 'run'}",
        "run.steps=3", "parallel.tensor=1", "eval.data=null",
        "reward.function=tests.distributed.reshard:is_even",
    ]  # fmt: skip
    done = torchrun(1, "-m", "dapo", "train", "examples/arithmetic/config.yaml", *options)
    assert done.returncode == 0, done.stdout
    rows = rows_of(tmp_path / "run")
    assert sum(row.get("policy/grad_norm", 0) > 0 for row in rows) == 3
    # 16 bits send a token to other experts
    allowed = 1e-4 if dtype == "float32" else 5e-2 if kind == "qwen3_5_text" else 0.2
    assert max(row.get("policy/mismatch", 0) for row in rows) < allowed


def test_optimizer_state_in_main_memory_learns_the_same_and_goes_on(tmp_path: Path) -> None:
    options = ["eval.data=null", "parallel.tensor=1", "policy.dtype=bfloat16", "rollout.dump_share=1.0"]
    # rounding would change what is drawn
    again = [*OFFLOADED, f"rollout.replay={tmp_path / 'gpu' / 'rollouts'}"]
    runs = (("gpu", 4, []), ("whole", 4, again), ("stopped", 2, again), ("stopped", 4, again))
    for name, steps, more in runs:
        run = [*options, *more, f"run.steps={steps}", f"run.dir={tmp_path / name}"]
        done = torchrun(1, "-m", "dapo", "train", "examples/arithmetic/config.yaml", *run)
        assert done.returncode == 0, done.stdout
    gpu, whole, stopped = (rows_of(tmp_path / name) for name in ("gpu", "whole", "stopped"))
    # embeddings' gradients are added in no fixed order
    for a, b in zip(gpu[:1] + whole[:-1], whole[:1] + stopped[:-1], strict=True):
        assert b["policy/loss"] == pytest.approx(a["policy/loss"], abs=1e-3)
        assert b["policy/grad_norm"] == pytest.approx(a["policy/grad_norm"], rel=0.05)
    assert [row["step"] for row in stopped] == [0, 1, 2, 3, 4]
    assert whole[0]["perf/peak_memory_gib"] <= gpu[0]["perf/peak_memory_gib"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_that_only_updates_need_is_given_back_and_they_go_on(dtype: str) -> None:
    result = measured("tests.distributed.release", 1)[dtype]
    kept, released = result["kept"], result["released"]
    for seen in ("norms", "weights"):  # gradients are added in no fixed order
        assert released[seen] == pytest.approx(kept[seen], rel=0.05)
    for held in released["held"]:
        assert held["gradients"] == held["state"] == 0 < held["gradients before"]


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
