"""Compare linear_policy_loss with the reference on the full logits: values, gradients, chunks, masks,
accumulation, the forward-only half.
"""

import gc
import math
import sys

import pytest
import torch
from dapo_kernels import linear_logprobs, linear_policy_loss, reference
from dapo_kernels.chunks import MAX_SPAN, plan_spans
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.inputs import CLIP, double, options_for, relative_error

T, H, V = 53, 24, 101
FIELDS = ("loss", "logprobs", "entropy", "clipped_low", "clipped_high")


def make(num_tokens=T, hidden_size=H, vocab=V, dtype=torch.float32, seed=0, temperature=1.0):
    """Return hidden, weight, targets, old_logprobs, advantages and mask."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=g).to(dtype)
    weight = (torch.randn(vocab, hidden_size, generator=g) * 2 / hidden_size**0.5).to(dtype)
    targets = torch.randint(vocab, (num_tokens,), generator=g)
    mask = torch.rand(num_tokens, generator=g) < 0.7
    logits = hidden.double() @ weight.double().t()
    own = reference.logprobs(logits, targets, torch.ones_like(mask), temperature=temperature)
    old = own + 0.4 * torch.randn(num_tokens, generator=g, dtype=torch.float64)
    old = old.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return hidden, weight, targets, old, torch.randn(num_tokens, generator=g), mask


def run(inputs, **options):
    """Return (result, gradient of hidden, gradient of weight) on fresh leaves."""
    hidden, weight = (x.clone().requires_grad_() for x in inputs[:2])
    result = linear_policy_loss(hidden, weight, *inputs[2:], **CLIP, **options)
    result.loss.backward()
    return result, hidden.grad, weight.grad


def truth_of(inputs, **options):
    hidden, weight, *rest = (double(x) for x in inputs)
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    options = {name: double(x) for name, x in options.items()}
    result = reference.policy_loss(hidden @ weight.t(), *rest, **CLIP, **options)
    result.loss.backward()
    return result, hidden.grad, weight.grad


def assert_close(ours, truth, tolerance):
    for name in FIELDS[:3]:
        assert relative_error(getattr(ours[0], name), getattr(truth[0], name)) < tolerance, name
    assert relative_error(ours[1], truth[1]) < tolerance, "gradient of hidden"
    assert relative_error(ours[2], truth[2]) < tolerance, "gradient of weight"


@pytest.mark.parametrize("chunk_bytes", [1, 4 * V * 7, 4 * V * 20, None])
@pytest.mark.parametrize("which", range(8))
def test_values_and_gradients_are_the_references(which, chunk_bytes):
    options = options_for(T)[which]
    inputs = make(temperature=options.get("temperature", 1.0))
    ours, truth = run(inputs, chunk_bytes=chunk_bytes, **options), truth_of(inputs, **options)
    assert_close(ours, truth, 1e-5)
    assert torch.equal(ours[0].clipped_low, truth[0].clipped_low)
    assert torch.equal(ours[0].clipped_high, truth[0].clipped_high)
    # a mean of so many ratios does not leave these bounds; tensor_parallel.py has narrower ones
    assert (ours[0].clipped_low | ours[0].clipped_high).any() or options.get("kind") == "gspo"


def test_in_float64_it_is_the_reference_to_rounding():
    inputs = make(dtype=torch.float64)
    assert_close(run(inputs, chunk_bytes=8 * V * 10), truth_of(inputs), 1e-13)


@pytest.mark.parametrize("fp32_logits", [False, True])
def test_bfloat16(fp32_logits):
    inputs = make(200, 64, 515, torch.bfloat16)
    ours, truth = run(inputs, fp32_logits=fp32_logits, chunk_bytes=515 * 4 * 64), truth_of(inputs)
    assert ours[1].dtype == ours[2].dtype == torch.bfloat16
    assert relative_error(ours[0].logprobs, truth[0].logprobs) < (1e-6 if fp32_logits else 2e-2)
    if fp32_logits:  # otherwise a token next to a clip bound may fall on its other side
        assert_close(ours, truth, 2e-2)


def test_fp32_logits_change_nothing_where_they_are_float32_anyway():
    inputs = make()
    (a, *grads_a), (b, *grads_b) = run(inputs), run(inputs, fp32_logits=True)
    assert torch.equal(a.loss, b.loss) and all(map(torch.equal, grads_a, grads_b))


def test_masked_rows_may_hold_nan_and_never_enter_a_product():
    inputs = make()
    weights = torch.rand(T)
    expected, *expected_grads = run(inputs, weights=weights)
    hidden, weight, targets, old, advantages, mask = (x.clone() for x in inputs)
    for x in (hidden, old, advantages, weights):
        x[~mask] = math.nan
    targets = targets.masked_fill(~mask, -100)
    result, *grads = run((hidden, weight, targets, old, advantages, mask), weights=weights)
    assert all(torch.equal(getattr(result, name), getattr(expected, name)) for name in FIELDS)
    assert all(map(torch.equal, grads, expected_grads))
    assert not grads[0][~mask].any()


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_nothing_to_learn_from(num_tokens):
    *inputs, mask = make(num_tokens)
    result, hidden_grad, weight_grad = run((*inputs, torch.zeros_like(mask)))
    assert result.loss == 0 and result.logprobs.shape == (num_tokens,)
    assert hidden_grad.shape == (num_tokens, H) and not hidden_grad.any()
    assert weight_grad.shape == (V, H) and not weight_grad.any()
    assert linear_logprobs(*inputs[:3], torch.zeros_like(mask)).shape == (num_tokens,)


@pytest.mark.parametrize("valid_vocab", [90, 101])
def test_padded_columns_have_probability_zero_and_no_gradient(valid_vocab):
    inputs = make(vocab=valid_vocab)
    padded = torch.cat([inputs[1], torch.full((101 - valid_vocab + 3, H), 50.0)])
    expected, *expected_grads = run(inputs)
    result, hidden_grad, weight_grad = run((inputs[0], padded, *inputs[2:]), valid_vocab=valid_vocab)
    assert relative_error(result.loss, expected.loss) < 1e-5
    assert relative_error(hidden_grad, expected_grads[0]) < 1e-5
    assert relative_error(weight_grad[:valid_vocab], expected_grads[1]) < 1e-5
    assert not weight_grad[valid_vocab:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [4 * V * 7, None])
@pytest.mark.parametrize("fp32_logits", [False, True])
def test_the_first_minibatch_has_ratio_exactly_one(dtype, chunk_bytes, fp32_logits):
    hidden, weight, targets, _, advantages, mask = make(dtype=dtype)
    options = {"temperature": 0.7, "chunk_bytes": chunk_bytes, "fp32_logits": fp32_logits}
    own = linear_logprobs(hidden, weight, targets, mask, **options)
    result, *_ = run((hidden, weight, targets, own, advantages, mask), **options)
    assert torch.equal(result.logprobs, own)
    assert result.loss == -torch.where(mask, advantages, 0).sum()
    assert not result.clipped_low.any() and not result.clipped_high.any()


def test_scoring_and_learning_multiply_the_same_chunks(monkeypatch):
    """Otherwise a product may pick another kernel and round otherwise, which a CPU does not show."""
    module, chunks = sys.modules["dapo_kernels.linear_policy_loss"], []
    inputs = make()
    evaluate = module.evaluate
    monkeypatch.setattr(
        module,
        "evaluate",
        lambda kernels, logits, *rest: chunks.append(logits.shape) or evaluate(kernels, logits, *rest),
    )
    linear_logprobs(*inputs[:3], inputs[-1], chunk_bytes=4 * V * 10)
    scored = list(chunks)
    chunks.clear()
    run(inputs, chunk_bytes=4 * V * 10)
    assert scored == chunks and len(chunks) > 2


def test_log_probs_need_no_graph_and_touch_no_gradient():
    hidden, weight, targets, _, _, mask = make()
    weight.requires_grad_()
    weight.main_grad = torch.zeros(V, H)
    logprobs = linear_logprobs(hidden.requires_grad_(), weight, targets, mask)
    assert not logprobs.requires_grad and weight.grad is None and not weight.main_grad.any()
    truth = reference.logprobs(hidden.double() @ weight.double().t(), targets, mask)
    assert relative_error(logprobs, truth) < 1e-6 and not logprobs[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_calls_add_up_in_weight_grad(dtype):
    first, second = make(seed=1, dtype=dtype), make(seed=2, dtype=dtype)
    second = (second[0], first[1], *second[2:])
    start = torch.randn(V, H, generator=torch.Generator().manual_seed(3))
    main_grad, weight = start.clone(), first[1].clone().requires_grad_()
    for hidden, _, *rest in (first, second):
        leaf = hidden.clone().requires_grad_()
        done = linear_policy_loss(leaf, weight, *rest, **CLIP, weight_grad=main_grad, fp32_logits=True)
        done.loss.backward()
        # there for hooks that ask for one, and nothing to add
        assert weight.grad is not None and not weight.grad.any()
        assert torch.equal(leaf.grad, run((hidden, first[1], *rest), fp32_logits=True)[1])
    expected = truth_of(first)[2] + truth_of(second)[2]
    assert relative_error(main_grad - start, expected) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_a_tied_embedding_gets_its_own_gradient_beside_weight_grad():
    """The head's gradient goes to main_grad; autograd then holds the embedding's gradient of the shared
    weight, whole.
    """
    _, weight, *rest = make()
    embedding, ids = torch.nn.functional.embedding, torch.arange(T)
    shared, main_grad = weight.clone().requires_grad_(), torch.zeros(V, H)
    done = linear_policy_loss(embedding(ids, shared), shared, *rest, **CLIP, weight_grad=main_grad)
    done.loss.backward()
    both = weight.clone().requires_grad_()
    reference.policy_loss(embedding(ids, both) @ both.t(), *rest, **CLIP).loss.backward()
    assert relative_error(shared.grad + main_grad, both.grad) < 1e-5 and shared.grad.any()


def test_weight_grad_is_not_touched_without_gradients():
    hidden, weight, *rest = make()
    main_grad = torch.zeros(V, H)
    with torch.no_grad():
        result = linear_policy_loss(hidden, weight.requires_grad_(), *rest, **CLIP, weight_grad=main_grad)
    assert not main_grad.any() and not result.loss.requires_grad


def test_a_scale_multiplies_the_gradients_but_may_not_where_weight_grad_is_given():
    inputs = make()
    _, hidden_grad, weight_grad = run(inputs)
    hidden, weight = (x.clone().requires_grad_() for x in inputs[:2])
    (0.25 * linear_policy_loss(hidden, weight, *inputs[2:], **CLIP).loss).backward()
    assert torch.equal(hidden.grad, 0.25 * hidden_grad) and torch.equal(weight.grad, 0.25 * weight_grad)
    loss = linear_policy_loss(hidden, weight, *inputs[2:], **CLIP, weight_grad=torch.zeros(V, H)).loss
    with pytest.raises(RuntimeError, match=r"with a factor of 0.25.*put the factor into weights"):
        (0.25 * loss).backward()


def test_the_gradients_can_be_spent_once():
    hidden, weight, *rest = make()
    loss = linear_policy_loss(hidden.requires_grad_(), weight.requires_grad_(), *rest, **CLIP).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already spent"):
        loss.backward()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_needs_no_gradient_gets_none(frozen):
    inputs = make()
    hidden, weight = inputs[0].clone(), inputs[1].clone()
    (weight if frozen == "hidden" else hidden).requires_grad_()
    linear_policy_loss(hidden, weight, *inputs[2:], **CLIP).loss.backward()
    _, hidden_grad, weight_grad = run(inputs)
    assert (hidden.grad is None) if frozen == "hidden" else torch.equal(hidden.grad, hidden_grad)
    assert (weight.grad is None) if frozen == "weight" else torch.equal(weight.grad, weight_grad)


def test_no_tensor_is_larger_than_a_chunk():
    """No new tensor is of the logits' size: the largest are the chunk and the weight's gradient."""
    inputs = make(1000, 8, 400)
    hidden, weight = (x.clone().requires_grad_() for x in inputs[:2])
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=cpu) as profile:
        linear_policy_loss(hidden, weight, *inputs[2:], **CLIP, chunk_bytes=400 * 4 * 32).loss.backward()
    gc.collect()
    events = profile.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert 400 * 4 * 20 < largest <= 400 * 4 * 32, largest  # the full logits would be 1000 · 400 · 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), max_size=60), st.sampled_from([1, 2, 4]), st.integers(4, 20))
def test_chunks_cover_every_live_row_once_and_hold_no_more_than_asked(live, slices, limit):
    mask = torch.tensor(live[: len(live) // slices * slices], dtype=torch.bool)
    spans = plan_spans(mask, mask.device, slices, limit)
    rows = torch.cat([span.rows for span in spans]) if spans else torch.zeros(0, dtype=torch.int64)
    assert sorted(rows.tolist()) == mask.nonzero()[:, 0].tolist()
    assert all(0 < len(span.rows) <= limit for span in spans)
    length = len(mask) // slices
    for span in spans:  # `within` and `rows` name the same tokens
        positions = torch.arange(len(mask)).view(slices, length)[:, span.start : span.stop].flatten()
        assert torch.equal(positions[span.within], span.rows)
        if slices > 1:
            assert slices * (span.stop - span.start) <= max(MAX_SPAN * limit, slices)  # gathered rows
    if slices == 1 and spans:
        sizes = [len(span.rows) for span in spans]
        assert len(sizes) == -(-sum(live) // limit) and max(sizes) - min(sizes) < len(sizes)


WRONG = [
    ("hidden", lambda a: a["hidden"][0], r"hidden has shape \[24\]; expected \[T, H\]"),
    (
        "hidden",
        lambda a: a["hidden"].bfloat16(),
        "weight is torch.float32; expected torch.bfloat16, as hidden is",
    ),
    (
        "hidden",
        lambda a: a["hidden"].t().contiguous().t(),
        r"hidden has strides .*expected a contiguous tensor",
    ),
    (
        "weight",
        lambda a: a["weight"][:, :20].contiguous(),
        r"weight has shape \[101, 20\]; expected \[V/tp, 24\]",
    ),
    ("weight", lambda a: a["weight"].to("meta"), "weight is on meta; expected cpu"),
    ("targets", lambda a: a["targets"][:5], r"targets has shape \[5\]; expected \[53\]"),
    (
        "targets",
        lambda a: a["targets"] + 101,
        r"targets holds \d+ inside the mask, at token \d+; expected 0 to 100",
    ),
    ("mask", lambda a: a["mask"].long(), "mask is torch.int64; expected torch.bool"),
    ("valid_vocab", lambda a: 102, "valid_vocab is 102, but weight holds 101 columns and tp_group 1 ranks"),
    ("chunk_bytes", lambda a: 0, "chunk_bytes is 0"),
    ("sequence_parallel", lambda a: True, "sequence_parallel is True and tp_group is None"),
    (
        "weight_grad",
        lambda a: a["weight"].bfloat16(),
        r"weight_grad is \[101, 24\] torch.bfloat16 on cpu; expected",
    ),
    (
        "weight_grad",
        lambda a: a["weight"][:100],
        r"weight_grad is \[100, 24\] torch.float32 on cpu; expected \[101, 24\]",
    ),
    ("weights", lambda a: -torch.ones(53), "weights holds -1.0 inside the mask"),
    ("kind", lambda a: "ppo", "kind is 'ppo'; expected one of dapo, cispo, gspo"),
    ("kind", lambda a: "gspo", "cu_seqlens does not fit kind 'gspo'; expected where the sequences begin"),
    ("cu_seqlens", lambda a: torch.tensor([0, 53]), "cu_seqlens does not fit kind 'dapo'; expected None"),
    ("cp_group", lambda a: object(), "cp_group is given and cu_seqlens is None"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_wrong_input_is_named_before_anything_runs(name, value, message):
    names = ("hidden", "weight", "targets", "old_logprobs", "advantages", "mask")
    given = dict(zip(names, make(), strict=True))
    with pytest.raises(ValueError, match=f"^{message}"):
        linear_policy_loss(**(CLIP | given | {name: value(given)}))


@pytest.mark.parametrize("bounds", [[0, 30], [1, 53], [0, 40, 30, 53], []])
def test_sequences_that_are_not_all_tokens_are_refused(bounds):
    with pytest.raises(ValueError, match=r"cu_seqlens is .*; expected numbers that rise from 0 to 53"):
        linear_policy_loss(*make(), **CLIP, kind="gspo", cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


@pytest.mark.parametrize("kind", ["cispo", "gspo"])
def test_a_dual_clip_is_dapos(kind):
    cu_seqlens = {"cu_seqlens": torch.tensor([0, 53])} if kind == "gspo" else {}
    with pytest.raises(ValueError, match=f"dual_clip is 3.0 with kind '{kind}'; expected None"):
        linear_policy_loss(*make(), **CLIP, kind=kind, dual_clip=3.0, **cu_seqlens)


def test_gspo_of_sequences_of_one_token_is_the_loss_of_tokens():
    inputs = make(dtype=torch.float64)
    ours = run(inputs, kind="gspo", cu_seqlens=torch.arange(T + 1))
    assert_close(ours, truth_of(inputs), 1e-12)


def test_cispo_keeps_every_tokens_gradient():
    *inputs, mask = make(dtype=torch.float64)
    everything = torch.ones_like(mask)
    for kind, is_kept in (("cispo", True), ("dapo", False)):
        result, gradient, _ = run((*inputs, everything), kind=kind)
        assert (result.clipped_low | result.clipped_high).any()
        assert gradient.any(1).all().item() is is_kept
