"""Check the definition against the formulas, written out token by token in Python floats (float64)."""

import math

import pytest
import torch
from dapo_kernels.reference import MAX_LOG_RATIO, logprobs, logprobs_and_entropy, policy_loss

from tests.kernels.inputs import CLIP, T, V, double, random_inputs, relative_error


def brute_force(
    logits, targets, old, advantages, mask,
    clip_low, clip_high, weights=None, dual_clip=None, ref_logprobs=None, kl_coef=0.0, temperature=1.0,
    kind="dapo", cu_seqlens=None,
):  # fmt: skip
    """Compute (loss, gradient [T][V], logprobs, entropy, clipped_low, clipped_high) by the formulas, token by
    token.
    """
    if kind == "gspo":
        return brute_force_gspo(
            logits, targets, old, advantages, mask, clip_low, clip_high, weights, cu_seqlens, temperature
        )
    loss, gradient, rows = 0.0, [[0.0] * logits.shape[1] for _ in logits], []
    for t, target in enumerate(targets.tolist()):
        if not mask[t]:
            rows.append((0.0, 0.0, False, False))
            continue
        scaled = [x / temperature for x in logits[t].tolist()]
        log_total = max(scaled) + math.log(sum(math.exp(x - max(scaled)) for x in scaled))
        p = [math.exp(x - log_total) for x in scaled]
        logp, a = scaled[target] - log_total, float(advantages[t])
        w = 1.0 if weights is None else float(weights[t])
        log_ratio = logp - float(old[t])
        ratio = math.exp(min(max(log_ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO))
        value = -ratio * a
        slope = value if abs(log_ratio) <= MAX_LOG_RATIO else 0.0  # the derivative of value by logp
        clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
        if kind == "cispo":
            value, slope = -clipped * a * logp, -clipped * a
        elif -clipped * a > value:
            value, slope = -clipped * a, 0.0
        if dual_clip is not None and a < 0 and value > -dual_clip * a:
            value, slope = -dual_clip * a, 0.0
        if ref_logprobs is not None:
            d = float(ref_logprobs[t]) - logp
            value += kl_coef * (math.exp(d) - d - 1)
            slope += kl_coef * (1 - math.exp(d))
        loss += w * value
        gradient[t] = [w * slope * ((v == target) - p[v]) / temperature for v in range(len(p))]
        entropy = -sum(x * math.log(x) for x in p if x)
        low, high = (a != 0, a != 0) if kind == "cispo" else (a < 0, a > 0)
        rows.append((logp, entropy, low and ratio < 1 - clip_low, high and ratio > 1 + clip_high))
    return loss, gradient, *zip(*rows, strict=True)


def brute_force_gspo(
    logits, targets, old, advantages, mask, clip_low, clip_high, weights, cu_seqlens, temperature
):  # fmt: skip
    """GSPO, Eq. 5 to 10 of its paper, sequence by sequence: a log-prob moves s, and s every token's loss."""
    loss, gradient = 0.0, [[0.0] * logits.shape[1] for _ in logits]
    rows = [(0.0, 0.0, False, False)] * len(logits)
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        tokens = [t for t in range(start, end) if mask[t]]
        p = {t: [float(x) for x in (logits[t].double() / temperature).softmax(-1)] for t in tokens}
        logp = {t: math.log(p[t][targets[t]]) for t in tokens}
        s = math.exp(sum(logp[t] - float(old[t]) for t in tokens) / max(len(tokens), 1))
        derivative = 0.0  # of the loss, by log s
        for t in tokens:
            a, w = float(advantages[t]), 1.0 if weights is None else float(weights[t])
            clipped = min(max(s, 1 - clip_low), 1 + clip_high)
            loss += w * max(-s * a, -clipped * a)
            derivative += w * (-s * a if -s * a >= -clipped * a else 0.0)
            entropy = -sum(x * math.log(x) for x in p[t] if x)
            rows[t] = (logp[t], entropy, a < 0 and s < 1 - clip_low, a > 0 and s > 1 + clip_high)
        for t in tokens:
            slope = derivative / len(tokens) / temperature
            gradient[t] = [slope * ((v == int(targets[t])) - x) for v, x in enumerate(p[t])]
    return loss, gradient, *zip(*rows, strict=True)


def run(inputs, **options):
    """Return (policy_loss of a fresh leaf, its gradient)."""
    logits = inputs[0].detach().clone().requires_grad_()
    result = policy_loss(logits, *inputs[1:], **{**CLIP, **options})
    result.loss.backward()
    return result, logits.grad


def assert_is_brute_force(inputs, **options):
    loss, gradient, logp, entropy, low, high = brute_force(*inputs, **{**CLIP, **options})
    result, grad = run(inputs, **options)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(result.loss, torch.tensor(loss, dtype=torch.float64), **close)
    torch.testing.assert_close(grad, torch.tensor(gradient, dtype=torch.float64), **close)
    torch.testing.assert_close(result.logprobs, torch.tensor(logp, dtype=torch.float64), **close)
    torch.testing.assert_close(result.entropy, torch.tensor(entropy, dtype=torch.float64), **close)
    assert result.clipped_low.tolist() == list(low) and result.clipped_high.tolist() == list(high)
    return result


WEIGHTS = torch.rand(T, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
WEIGHTS[::5] = 0
REF = -3 * torch.rand(T, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
CU_SEQLENS = torch.tensor([0, 3, 3, 20, 31, T])  # one sequence is empty
OPTIONS = [
    {},
    {"kind": "cispo"},
    {"kind": "cispo", "weights": WEIGHTS, "temperature": 1.7, "clip_low": 1.0},
    {"kind": "gspo", "cu_seqlens": CU_SEQLENS, "clip_low": 0.02, "clip_high": 0.01},
    {
        "kind": "gspo",
        "cu_seqlens": CU_SEQLENS,
        "clip_low": 0.02,
        "clip_high": 0.01,
        "weights": WEIGHTS,
        "temperature": 0.6,
    },
    {"clip_low": 0.0, "clip_high": 0.0},
    {"clip_low": 0.05, "clip_high": 3.0},
    {"weights": WEIGHTS},
    {"dual_clip": 1.1},
    {"ref_logprobs": REF, "kl_coef": 0.3},
    {"ref_logprobs": REF},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"weights": WEIGHTS, "dual_clip": 1.3, "ref_logprobs": REF, "kl_coef": 0.05, "temperature": 0.8},
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_value_and_gradient_are_the_formulas(options, seed):
    inputs = random_inputs(seed, temperature=options.get("temperature", 1.0))
    result = assert_is_brute_force(inputs, **options)
    if options.get("clip_high") != 3.0:
        # else the test would not see the clip
        assert result.clipped_low.any() or options.get("clip_low") == 1.0
        assert result.clipped_high.any()


def test_gradient_is_what_finite_differences_say():
    inputs = random_inputs(3, num_tokens=6, vocab=5)
    penalty = {"ref_logprobs": REF[:6], "kl_coef": 0.1}
    options = {"weights": WEIGHTS[:6], "dual_clip": 1.3, "temperature": 0.7, **penalty}
    loss_of = lambda z: policy_loss(z, *inputs[1:], **CLIP, **options).loss  # noqa: E731
    assert torch.autograd.gradcheck(loss_of, inputs[0].requires_grad_())


def at_ratios(ratios, advantage):
    """Make one token per ratio π_θ / π_θold, all with the same advantage."""
    n = len(ratios)
    logits, targets, *_ = random_inputs(4, num_tokens=n)
    mask = torch.ones(n, dtype=torch.bool)
    old = logprobs(logits, targets, mask) - torch.tensor(ratios, dtype=torch.float64).log()
    return logits, targets, old, torch.full((n,), float(advantage), dtype=torch.float64), mask


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "clipped"),
    [
        (+2, 0.50, -1.00, None),  # a good token that became rarer: always pushed up
        (+2, 0.79, -1.58, None),
        (+2, 1.00, -2.00, None),
        (+2, 1.27, -2.54, None),
        (+2, 1.29, -2.56, "high"),  # ε_high = 0.28
        (+2, 5.00, -2.56, "high"),
        (-2, 5.00, 10.00, None),  # a bad token that became more frequent: always pushed down
        (-2, 1.29, 2.58, None),
        (-2, 1.00, 2.00, None),
        (-2, 0.81, 1.62, None),
        (-2, 0.79, 1.60, "low"),  # ε_low = 0.2
        (-2, 0.10, 1.60, "low"),
        (0, 5.00, 0.00, None),
        (0, 0.10, 0.00, None),
    ],
)
def test_clip_bounds_for_either_sign_of_the_advantage(advantage, ratio, loss, clipped):
    result, grad = run(at_ratios([ratio], advantage))
    assert result.loss.item() == pytest.approx(loss, abs=1e-12)
    assert (result.clipped_low.item(), result.clipped_high.item()) == (clipped == "low", clipped == "high")
    assert bool(grad.any()) == (clipped is None and advantage != 0)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "has_gradient"),
    [(-2, 9.9, 19.8, True), (-2, 10.1, 20, False), (2, 0.01, -0.02, True), (2, 50, -2.56, False)],
)
def test_dual_clip_bounds_the_loss_of_bad_tokens_only(advantage, ratio, loss, has_gradient):
    result, grad = run(at_ratios([ratio], advantage), dual_clip=10)
    assert result.loss.item() == pytest.approx(loss, abs=1e-12)
    assert bool(grad.any()) == has_gradient


def test_kl_term_is_zero_at_the_reference_and_positive_elsewhere():
    inputs = at_ratios([1.0] * 5, advantage=0)
    own = logprobs(inputs[0], inputs[1], inputs[4])
    at_reference, grad = run(inputs, ref_logprobs=own, kl_coef=1.0)
    assert at_reference.loss == 0 and not grad.any()
    for shift in (-1.0, 1.0):
        loss = run(inputs, ref_logprobs=own + shift, kl_coef=0.5)[0].loss.item()
        assert loss == pytest.approx(5 * 0.5 * (math.exp(shift) - shift - 1))


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_minibatch_has_ratio_exactly_one(temperature, dtype):
    logits, targets, _, advantages, mask = random_inputs(5, dtype=dtype)
    own = logprobs(logits, targets, mask, temperature=temperature)
    result, grad = run((logits, targets, own, advantages, mask), temperature=temperature)
    assert result.loss == -advantages[mask].sum()  # exactly: e⁰ · A
    assert not result.clipped_low.any() and not result.clipped_high.any()
    assert torch.equal(result.logprobs, own)
    leaf = logits.clone().requires_grad_()
    picked, _ = logprobs_and_entropy(leaf, targets, mask, temperature=temperature)
    (-picked * advantages[mask]).sum().backward()  # the plain policy gradient
    torch.testing.assert_close(grad, leaf.grad)


def test_without_weights_every_token_weighs_one():
    inputs = random_inputs(6)
    assert torch.equal(run(inputs)[1], run(inputs, weights=torch.ones(T))[1])


def test_the_sum_over_parts_is_the_whole():
    inputs = random_inputs(7)
    whole, grad = run(inputs, weights=WEIGHTS)
    thirds = (slice(0, 9), slice(9, 10), slice(10, T))
    parts = [run(tuple(x[rows] for x in inputs), weights=WEIGHTS[rows]) for rows in thirds]
    torch.testing.assert_close(sum(part.loss for part, _ in parts), whole.loss)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), grad)


def test_masked_rows_may_hold_nan_and_give_zeros_and_no_gradient():
    logits, targets, old, advantages, mask = random_inputs(8)
    inputs = (logits, targets, old, advantages, mask)
    expected, expected_grad = run(inputs, weights=WEIGHTS, ref_logprobs=REF, kl_coef=0.1)
    logits, old, advantages, weights, ref = [x.clone() for x in (logits, old, advantages, WEIGHTS, REF)]
    for x in (logits, old, advantages, weights, ref):
        x[~mask] = math.nan
    inputs = (logits, targets.masked_fill(~mask, -100), old, advantages, mask)
    result, grad = run(inputs, weights=weights, ref_logprobs=ref, kl_coef=0.1)
    assert torch.equal(result.loss, expected.loss) and torch.equal(grad, expected_grad)
    assert not grad[~mask].any()
    for name in ("logprobs", "entropy", "clipped_low", "clipped_high"):
        values = getattr(result, name)
        assert values.shape == (T,) and not values[~mask].any()
        assert torch.equal(values, getattr(expected, name))


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_nothing_to_learn_from_is_a_loss_of_zero_with_a_gradient_of_zeros(num_tokens):
    logits, targets, old, advantages, _ = random_inputs(9, num_tokens=num_tokens)
    result, grad = run((logits, targets, old, advantages, torch.zeros(num_tokens, dtype=torch.bool)))
    assert result.loss == 0 and grad.shape == (num_tokens, V) and not grad.any()
    for name in ("logprobs", "entropy", "clipped_low", "clipped_high"):
        assert getattr(result, name).shape == (num_tokens,)


@pytest.mark.parametrize("garbage", [50.0, -50.0, 1e4, math.nan, math.inf])
def test_padded_columns_have_probability_zero_and_no_gradient(garbage):
    inputs = random_inputs(10)
    expected, expected_grad = run(inputs)
    padded = torch.cat([inputs[0], torch.full((T, 5), garbage, dtype=torch.float64)], dim=1)
    result, grad = run((padded, *inputs[1:]), valid_vocab=V)
    for name in ("loss", "logprobs", "entropy"):
        assert torch.equal(getattr(result, name), getattr(expected, name))
    assert torch.equal(grad[:, :V], expected_grad) and not grad[:, V:].any()


@pytest.mark.parametrize("advantage", [-1.5, 1.5])
@pytest.mark.parametrize("log_ratio", [-200.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_absurd_log_ratios_are_clamped_and_give_no_gradient(log_ratio, advantage, dtype):
    logits, targets, _, _, _ = random_inputs(11, dtype=dtype)
    mask, advantages = torch.ones(T, dtype=torch.bool), torch.full((T,), advantage, dtype=dtype)
    old = logprobs(logits, targets, mask) - log_ratio
    result, grad = run((logits, targets, old, advantages, mask))
    ratio = math.exp(math.copysign(MAX_LOG_RATIO, log_ratio))
    expected = max(-ratio * advantage, -min(max(ratio, 0.8), 1.28) * advantage)
    assert result.loss.item() == pytest.approx(T * expected, rel=1e-5)
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_logits_of_1e4_are_computed_exactly(dtype, temperature):
    logits, targets, _, advantages, mask = random_inputs(12, dtype=torch.float32)
    for shift in (1e4, -1e4):
        shifted = logits + shift  # rounded here, once: what follows sees the same numbers in either type
        old = logprobs(shifted.double(), targets, mask, temperature=temperature)
        inputs = (targets, old, advantages, mask)
        result, grad = run((shifted.to(dtype), *inputs), temperature=temperature)
        truth, true_grad = run((shifted.double(), *map(double, inputs)), temperature=temperature)
        torch.testing.assert_close(result.logprobs.double(), truth.logprobs, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-6)


def test_one_logit_far_above_the_rest_is_probability_one_without_nan():
    logits = torch.full((3, V), -1e4)
    logits[:, 5] = 1e4
    targets, advantages = torch.tensor([5, 5, 6]), torch.tensor([1.0, -1.0, 1.0])
    result, grad = run((logits, targets, torch.zeros(3), advantages, torch.ones(3, dtype=torch.bool)))
    assert result.logprobs.tolist() == [0.0, 0.0, -2e4]
    assert not result.entropy.any() and grad.isfinite().all() and result.loss.isfinite()


def test_a_token_ruled_out_by_minus_infinity_has_probability_zero_without_nan():
    inputs = random_inputs(13)
    ruled_out = inputs[0].clone()
    ruled_out[torch.arange(T), (inputs[1] + 1) % V] = -math.inf  # never the target
    result, grad = run((ruled_out, *inputs[1:]))
    expected = torch.distributions.Categorical(logits=ruled_out.clamp_min(-1e9)).entropy() * inputs[4]
    torch.testing.assert_close(result.entropy, expected)
    assert result.loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_entropy_is_that_of_the_distribution_sampled_from(temperature):
    inputs = random_inputs(14)
    expected = torch.distributions.Categorical(logits=inputs[0] / temperature).entropy() * inputs[4]
    torch.testing.assert_close(run(inputs, temperature=temperature)[0].entropy, expected)


def test_entropy_of_equal_logits_is_log_v():
    mask = torch.ones(1, dtype=torch.bool)
    result, _ = run((torch.full((1, V), 7.0), torch.tensor([0]), torch.zeros(1), torch.ones(1), mask))
    assert result.entropy.item() == pytest.approx(math.log(V), rel=1e-6)


def test_metrics_are_detached_and_logprobs_keeps_no_graph():
    logits, *rest = random_inputs(15)
    result = policy_loss(logits.requires_grad_(), *rest, **CLIP)
    assert result.loss.requires_grad
    metrics = (result.logprobs, result.entropy, result.clipped_low, result.clipped_high)
    assert not any(x.requires_grad for x in metrics)
    assert not logprobs(logits, rest[0], rest[3]).requires_grad
    assert torch.equal(logprobs(logits, rest[0], rest[3]), result.logprobs)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_float32_is_within_2e5_of_the_truth(temperature):
    inputs = random_inputs(16, num_tokens=101, vocab=4099, dtype=torch.float32, temperature=temperature)
    options = {"temperature": temperature, "dual_clip": 10.0}
    result, grad = run(inputs, **options)
    truth, true_grad = run(tuple(map(double, inputs)), **options)
    assert relative_error(result.loss, truth.loss) < 2e-5
    assert relative_error(grad, true_grad) < 2e-5
    assert relative_error(result.logprobs, truth.logprobs) < 2e-5
    assert relative_error(result.entropy, truth.entropy) < 2e-5


def test_bfloat16_logits_are_computed_in_float32():
    logits, *rest = random_inputs(17, dtype=torch.float32)
    logits = logits.bfloat16()
    result, grad = run((logits, *rest))
    expected, expected_grad = run((logits.float(), *rest))
    assert result.loss.dtype == torch.float32 and torch.equal(result.loss, expected.loss)
    assert torch.equal(grad, expected_grad.bfloat16())
