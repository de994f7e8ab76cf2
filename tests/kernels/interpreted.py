"""Compare the Triton kernels, interpreted on the CPU, with the float64 reference. Interpreted programs run
one after another, so no race shows.

test_policy_loss.py runs this file in a process of its own, because Triton must be imported with
TRITON_INTERPRET=1.
"""

import math

import pytest
import torch
from dapo_kernels import logits_torch, logits_triton, policy_loss, reference
from dapo_kernels.rows import Objective, Shard, Tokens, Vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.inputs import CLIP, make, options_for, relative_error, truth_of

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
OBJECTIVE = Objective(CLIP["clip_low"], CLIP["clip_high"], dual_clip=3.0)


def run(inputs, **options):
    logits = inputs[0].clone().requires_grad_()
    result = policy_loss(logits, *inputs[1:], **CLIP, **options)
    result.loss.backward()
    return result, logits.grad


def rows_of(module, parts, shards, tokens):
    """The rows by each rank's part of the logits, which then holds its gradient."""
    pairs = list(zip(parts, shards, strict=True))
    statistics = torch.stack([module.row_statistics(part, tokens, shard) for part, shard in pairs])
    return [module.loss_and_gradient(part, statistics, tokens, s, OBJECTIVE, part) for part, s in pairs]


def assert_is_the_truth(inputs, **options):
    result, grad = run(inputs, **options)
    truth, true_grad = truth_of(inputs, **options)
    for name in ("loss", "logprobs", "entropy"):
        assert relative_error(getattr(result, name), getattr(truth, name)) < 2e-5, name
    assert relative_error(grad, true_grad) < TOLERANCE[inputs[0].dtype]
    assert torch.equal(result.clipped_low, truth.clipped_low)
    assert torch.equal(result.clipped_high, truth.clipped_high)
    assert grad.dtype == inputs[0].dtype and not grad[~inputs[4]].any()
    return result, grad


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("vocab", [1, 25, 1000, 2052, 3001])
def test_value_and_gradient_are_the_references(vocab, dtype):
    for options in options_for(12)[:2]:
        inputs = make(vocab=vocab, dtype=dtype, temperature=options.get("temperature", 1.0))
        assert_is_the_truth(inputs, **options)


@pytest.mark.parametrize("options", options_for(12)[2:], ids=lambda options: "+".join(options))
def test_every_option_alone(options):
    assert_is_the_truth(make(temperature=options.get("temperature", 1.0)), **options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_whole_vocabulary(dtype):
    logits, targets, _, advantages, _ = make(2, 151_936, dtype)
    own = reference.logprobs(logits, targets, torch.ones(2, dtype=torch.bool))
    _, grad = assert_is_the_truth((logits, targets, own, advantages, torch.ones(2, dtype=torch.bool)))
    assert grad.any(1).all()


def test_bfloat16_is_never_worse_than_plain_bfloat16():
    inputs = make(16, 2052, torch.bfloat16)
    logits, targets, old, advantages, mask = inputs
    truth, true_grad = truth_of(inputs)
    result, grad = run(inputs)
    plain = logits.clone().requires_grad_()
    logprobs = plain.log_softmax(-1).gather(-1, targets[:, None])[:, 0][mask]
    ratio = (logprobs - old[mask]).exp()
    torch.maximum(-ratio * advantages[mask], -ratio.clamp(0.8, 1.28) * advantages[mask]).sum().backward()
    assert relative_error(grad, true_grad) <= relative_error(plain.grad, true_grad) + 1e-3
    error = relative_error(result.logprobs[mask], truth.logprobs[mask])
    assert error <= relative_error(logprobs, truth.logprobs[mask])


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(0, 5),
    vocab=st.integers(1, 70),
    padding=st.integers(0, 9),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(list(TOLERANCE)),
    which=st.integers(0, 7),
)
def test_any_shape(num_tokens, vocab, padding, seed, dtype, which):
    options = options_for(num_tokens)[which]
    logits, *rest = make(num_tokens, vocab, dtype, seed, options.get("temperature", 1.0))
    padded = torch.cat([logits, torch.full((num_tokens, padding), math.nan, dtype=dtype)], 1)
    result, grad = run((padded, *rest), valid_vocab=vocab, **options)
    truth, true_grad = truth_of((logits, *rest), **options)
    torch.testing.assert_close(result.loss.double(), truth.loss, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(result.entropy.double(), truth.entropy, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(grad[:, :vocab].double(), true_grad, rtol=TOLERANCE[dtype], atol=2e-5)
    assert not grad[:, vocab:].any()


@pytest.mark.parametrize("vocab", [3, 1000])  # rounding averages out over many columns
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_logits_of_1e4(temperature, vocab):
    for shift in (1e4, -1e4):
        logits, targets, _, advantages, mask = make(vocab=vocab)
        logits = logits + shift
        old = reference.logprobs(logits.double(), targets, mask, temperature=temperature).float()
        result, grad = run((logits, targets, old, advantages, mask), temperature=temperature)
        truth, true_grad = truth_of((logits, targets, old, advantages, mask), temperature=temperature)
        torch.testing.assert_close(result.logprobs.double(), truth.logprobs, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(result.entropy.double(), truth.entropy, rtol=1e-5, atol=1e-5)
        assert relative_error(grad, true_grad) < 2e-5


def test_rows_of_extremes():
    logits, targets, _, advantages, _ = make(6)
    logits[0] = -120  # every logit far below 0: a peak that starts at 0 would give log 0
    logits[1, 10:] = -math.inf
    targets[1] = 3
    logits[2] = 0
    logits[3], logits[3, 9], targets[3] = -1e4, 1e4, 9  # all on one token: log-prob and entropy 0
    logits[4], logits[4, 9], targets[4] = -60, 60, 11  # a target of probability e^-120
    mask = torch.ones(6, dtype=torch.bool)
    old = reference.logprobs(logits.double(), targets, mask).float() - 0.1
    result, grad = run((logits, targets, old, advantages, mask))
    truth, true_grad = truth_of((logits, targets, old, advantages, mask))
    torch.testing.assert_close(result.logprobs.double(), truth.logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.entropy.double(), truth.entropy, rtol=1e-5, atol=1e-5)
    assert relative_error(grad, true_grad) < 2e-5
    assert result.logprobs[3] == 0 and result.entropy[3] == 0


def test_masked_rows_may_hold_nan_and_give_zeros():
    logits, targets, old, advantages, mask = make()
    weights, ref = torch.rand(12), -torch.rand(12)
    options = {"weights": weights, "ref_logprobs": ref, "kl_coef": 0.1}
    expected, expected_grad = run((logits, targets, old, advantages, mask), **options)
    for x in (logits, old, advantages, weights, ref):
        x[~mask] = math.nan
    result, grad = run((logits, targets.masked_fill(~mask, -100), old, advantages, mask), **options)
    assert torch.equal(result.loss, expected.loss) and torch.equal(grad, expected_grad)
    for name in ("logprobs", "entropy", "clipped_low", "clipped_high"):
        values = getattr(result, name)
        assert torch.equal(values, getattr(expected, name)) and not values[~mask].any()


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_nothing_to_learn_from(num_tokens):
    logits, targets, old, advantages, mask = make(num_tokens)
    result, grad = run((logits, targets, old, advantages, torch.zeros_like(mask)))
    assert result.loss == 0 and grad.shape == logits.shape and not grad.any()
    assert result.logprobs.shape == result.clipped_low.shape == (num_tokens,)
    assert result.clipped_low.dtype == torch.bool


@pytest.mark.parametrize("advantage", [-1.5, 1.5])
@pytest.mark.parametrize("log_ratio", [-200.0, 200.0])
def test_absurd_log_ratios_are_clamped_and_give_no_gradient(log_ratio, advantage):
    logits, targets, *_ = make(4)
    mask = torch.ones(4, dtype=torch.bool)
    old = reference.logprobs(logits, targets, mask) - log_ratio
    result, grad = run((logits, targets, old, torch.full((4,), advantage), mask))
    ratio = math.exp(math.copysign(reference.MAX_LOG_RATIO, log_ratio))
    expected = max(-ratio * advantage, -min(max(ratio, 0.8), 1.28) * advantage)
    assert result.loss.item() == pytest.approx(4 * expected, rel=1e-5)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_clipped_rows_give_exact_zeros_and_others_do_not():
    inputs = make()
    result, grad = run(inputs)
    is_clipped = result.clipped_low | result.clipped_high
    assert is_clipped.any()
    assert torch.equal(grad.any(1), inputs[4] & ~is_clipped)


@pytest.mark.parametrize("which", [0, 2, 3])
def test_a_nan_inside_the_mask_is_not_hidden(which):
    inputs = make(3)
    inputs[4][:] = True
    inputs[which][1] = math.nan
    result, grad = run(inputs)
    assert result.loss.isnan() and grad[1].isnan().any() and not grad[[0, 2]].isnan().any()


def test_the_first_minibatch_has_ratio_exactly_one():
    logits, targets, _, advantages, mask = make(dtype=torch.bfloat16, vocab=3001)
    shard, tokens = Vocabulary(temperature=0.7).shard(3001), Tokens(targets, mask)
    statistics = logits_triton.row_statistics(logits, tokens, shard)[None]
    own = logits_triton.loss_and_gradient(logits, statistics, tokens, shard, None, None).logprobs
    result, _ = run((logits, targets, own, advantages, mask), temperature=0.7)
    assert torch.equal(result.logprobs, own)
    assert result.loss == -torch.where(mask, advantages, 0).sum()


def test_two_runs_are_bitwise_equal():
    (a, grad_a), (b, grad_b) = (run(make(dtype=torch.bfloat16)) for _ in range(2))
    assert torch.equal(a.loss, b.loss) and torch.equal(a.entropy, b.entropy) and torch.equal(grad_a, grad_b)


@pytest.mark.parametrize("module", [logits_triton, logits_torch], ids=["kernels", "twin"])
def test_statistics_of_masked_rows_are_those_of_one_token(module):
    logits, targets, *_, mask = make()
    logits[~mask] = math.nan
    statistics = module.row_statistics(logits, Tokens(targets, mask), Vocabulary().shard(1000))
    assert statistics[:, ~mask].t().tolist() == [[0.0, 1.0, 0.0, 0.0]] * int((~mask).sum())
    assert statistics[:, mask].isfinite().all()


@pytest.mark.parametrize("module", [logits_triton, logits_torch], ids=["kernels", "twin"])
@pytest.mark.parametrize("world", [2, 4])
def test_shards_of_the_vocabulary_merge_to_the_whole(module, world):
    logits, targets, old, advantages, mask = make(vocab=1000)
    logits[0, : 1000 // world] = -math.inf  # the first shard of this row holds nothing
    targets[0] = 999
    truth, true_grad = truth_of((logits, targets, old, advantages, mask), dual_clip=3.0)
    tokens = Tokens(targets, mask, old, advantages)
    parts = [part.clone() for part in logits.chunk(world, 1)]
    shards = [Shard(1000 // world, rank * (1000 // world), 1000 // world, 1.0, None) for rank in range(world)]
    rows = rows_of(module, parts, shards, tokens)
    assert relative_error(rows[0].losses.sum(), truth.loss) < 2e-5
    assert relative_error(rows[0].entropy, truth.entropy) < 2e-5
    assert relative_error(torch.cat(parts, 1), true_grad) < 2e-5
    for other in rows[1:]:
        for name in ("losses", "logprobs", "entropy"):
            assert torch.equal(getattr(rows[0], name), getattr(other, name))


@pytest.mark.parametrize("module", [logits_triton, logits_torch], ids=["kernels", "twin"])
def test_a_shard_of_padding_alone_changes_nothing(module):
    logits, targets, old, advantages, mask = make(vocab=40)
    logits = logits - 1e4  # far below any stand-in for "nothing seen"
    tokens = Tokens(targets, mask, old, advantages)
    truth, true_grad = truth_of((logits, targets, old, advantages, mask), dual_clip=3.0)
    parts = [logits.clone(), torch.full_like(logits, math.nan)]
    shards = [Shard(40, 0, 40, 1.0, None), Shard(40, 40, 0, 1.0, None)]
    rows = rows_of(module, parts, shards, tokens)
    assert relative_error(rows[0].losses.sum(), truth.loss) < 2e-5
    assert torch.equal(rows[0].losses, rows[1].losses)
    assert relative_error(parts[0], true_grad) < 2e-5 and not parts[1].any()


def test_offsets_beyond_two_to_the_31():
    """Two rows lie 2³¹ + 16 elements apart, in memory that is reserved but never touched between them."""
    stride = 2**31 + 16
    logits, targets, old, advantages, _ = make(2, 1000, torch.bfloat16)
    mask = torch.ones(2, dtype=torch.bool)
    far = torch.empty(stride + 1000, dtype=torch.bfloat16).as_strided((2, 1000), (stride, 1))
    far.copy_(logits)
    [rows] = rows_of(logits_triton, [far], [Vocabulary().shard(1000)], Tokens(targets, mask, old, advantages))
    truth, true_grad = truth_of((logits, targets, old, advantages, mask), dual_clip=3.0)
    assert relative_error(rows.losses.sum(), truth.loss) < 2e-5 and relative_error(far, true_grad) < 2e-2


def test_the_gradient_takes_the_logits_memory_and_a_scale_of_one_changes_nothing():
    inputs = make()
    base = inputs[0].clone().requires_grad_()
    logits = base * 1.0
    result = policy_loss(logits, *inputs[1:], **CLIP)
    written = logits.detach().clone()
    result.loss.backward()
    assert torch.equal(base.grad, written) and torch.equal(logits.detach(), written)


def test_another_scale_multiplies_the_gradient():
    inputs = make()
    expected = run(inputs)[1]
    logits = inputs[0].clone().requires_grad_()
    (0.25 * policy_loss(logits, *inputs[1:], **CLIP).loss).backward()
    assert torch.equal(logits.grad, 0.25 * expected)


def test_the_gradient_can_be_spent_once():
    logits, *rest = make()
    loss = policy_loss(logits.requires_grad_(), *rest, **CLIP).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already spent"):
        loss.backward()


def test_an_operation_that_saved_the_logits_raises():
    logits, *rest = make()
    # the derivative of exp is its own output
    loss = policy_loss(logits.requires_grad_().exp(), *rest, **CLIP).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradients_the_logits_stay():
    inputs = make()
    for logits in (inputs[0].clone(), inputs[0].clone().requires_grad_()):
        with torch.no_grad():
            assert not policy_loss(logits, *inputs[1:], **CLIP).loss.requires_grad
        assert torch.equal(logits.detach(), inputs[0])
