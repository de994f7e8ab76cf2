import numpy as np
import pytest

from dapo.batch import ATTENTION_SPAN, pack, plan
from tests.conftest import make_config, make_group


def random_lengths(seed, count=60, longest=64):
    return np.random.default_rng(seed).integers(1, longest + 1, count).tolist()


def random_groups(num_groups, seed=0, group_size=2, longest=40):
    rng = np.random.default_rng(seed)
    return [
        make_group([1, *[0] * (group_size - 1)], rng.integers(1, longest, group_size).tolist(), id=i, prompt_length=int(rng.integers(1, 9)))
        for i in range(num_groups)
    ]


def sequences_of(microbatch):
    """Start and end of every packed sequence, padding included."""
    return zip(microbatch.cu_seqlens[:-1], microbatch.cu_seqlens[1:], strict=True)


def response_at(microbatch, start, end):
    return tuple(microbatch.targets[start:end][microbatch.mask[start:end]].tolist())


def responses_of(microbatches):
    """The responses in some microbatches, as token tuples, in order; padding has none."""
    return [tokens for m in microbatches for start, end in sequences_of(m) if (tokens := response_at(m, start, end))]


def responses_in(groups):
    return [tuple(sample.tokens.tolist()) for group in groups for sample in group.samples]


# pack


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [64, 65, 130, 100_000])
def test_every_sequence_is_packed_once_within_the_budget_on_a_multiple_of_ranks(seed, num_ranks, budget):
    lengths = random_lengths(seed)
    bins = pack(lengths, budget, num_ranks)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= budget for b in bins)
    assert len(bins) % num_ranks == 0
    assert all(b == sorted(b) for b in bins)


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "num_bins"),
    [([30, 30, 30, 30], 1, 2), ([60, 4], 1, 1), ([60, 5], 1, 2), ([64], 1, 1), ([64], 4, 4), ([40] * 5, 2, 6), ([1] * 64, 2, 2)],
)
def test_as_few_bins_are_used_as_fit(lengths, num_ranks, num_bins):
    assert len(pack(lengths, 64, num_ranks)) == num_bins


def test_ranks_get_work_of_like_cost():
    lengths = random_lengths(0, count=200, longest=20_000)
    costs = [sum(lengths[i] + lengths[i] ** 2 / ATTENTION_SPAN for i in b) for b in pack(lengths, 1_000_000, 8)]
    assert max(costs) < 1.02 * min(costs)


@pytest.mark.parametrize(("count", "most", "most_in_turns"), [(8192, 0.0001, 0.002), (512, 0.001, 0.004)])
def test_a_heavy_tail_leaves_sixteen_ranks_next_to_nothing_to_wait_for(count, most, most_in_turns):
    drawn = np.random.default_rng(0).lognormal(np.log(2500), 1.0, count)
    lengths = np.clip(drawn.astype(int), 1, 20_480)
    bins = pack(lengths.tolist(), 32_768, 16)
    costs = np.array([(lengths[b] + lengths[b] ** 2 / ATTENTION_SPAN).sum() for b in bins]).reshape(-1, 16)  # [turn, rank]
    assert 1 - costs.sum() / (16 * costs.sum(axis=0).max()) < most  # of all ranks' work, until the slowest has finished the update
    assert 1 - costs.sum() / (16 * costs.max(axis=1).sum()) < most_in_turns  # if they waited after every microbatch


def test_packing_is_deterministic():
    lengths = [5, 5, 5, 9, 9, 1] * 10
    assert pack(lengths, 20, 2) == pack(list(lengths), 20, 2)


def test_a_sequence_beyond_the_budget_is_never_packed():
    with pytest.raises(AssertionError, match="65 tokens in microbatches of 64"):
        pack([65], 64, 1)


# build


@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_every_value_sits_at_the_position_that_predicts_its_token(tmp_path, multiple):
    groups = [make_group([1, 0, 0], [4, 1, 6], id=0, prompt_length=3), make_group([1, 0], [5, 2], id=1, prompt_length=1)]
    groups[0].samples[2].loss_mask[2:4] = False
    config = make_config(tmp_path, f"parallel.tensor={multiple}")
    [batch] = plan(groups, config, 1, {})
    [[m]] = batch.minibatches
    pairs = [(group.prompt, sample) for group in groups for sample in group.samples]
    for (start, end), (prompt, sample) in zip(list(sequences_of(m))[:5], pairs, strict=True):
        whole = np.concatenate([prompt.tokens, sample.tokens])
        assert np.array_equal(m.tokens[start:end], whole[:-1])
        assert np.array_equal(m.targets[start:end], whole[1:])  # the shift stays inside: the last token is a target only
        assert np.array_equal(m.positions[start:end], np.arange(len(whole) - 1))
        before, response = slice(start, start + len(prompt.tokens) - 1), slice(end - sample.length, end)
        assert not m.mask[before].any() and not m.weights[before].any() and not m.advantages[before].any()
        assert np.array_equal(m.targets[response], sample.tokens)
        assert np.array_equal(m.mask[response], sample.loss_mask)
        assert np.array_equal(m.behavior_logprobs[response], sample.behavior_logprobs)
        assert (m.advantages[response] == np.float32(sample.advantage)).all()
        assert m.weights[response][sample.loss_mask] == pytest.approx(1 / 16)  # 18 response tokens, 16 the policy's own


@pytest.mark.parametrize("multiple", [1, 2, 3, 8, 64])
def test_padding_is_one_more_sequence_that_weighs_nothing(tmp_path, multiple):
    groups = random_groups(3)
    for batch in plan(groups, make_config(tmp_path, f"parallel.tensor={multiple}"), 1, {}):
        for m in (m for microbatches in batch.minibatches for m in microbatches):
            num_tokens = m.cu_seqlens[-1]
            assert num_tokens % multiple == 0
            assert {len(value) for name, value in vars(m).items() if name not in ("cu_seqlens", "dumped")} == {num_tokens}
            assert (np.diff(m.cu_seqlens) > 0).all()
            assert all(np.array_equal(m.positions[start:end], np.arange(end - start)) for start, end in sequences_of(m))
            real = [end - start for start, end in sequences_of(m) if m.mask[start:end].any()]
            padding = slice(sum(real), None)
            assert num_tokens - sum(real) < multiple and len(m.cu_seqlens) - 1 - len(real) in (0, 1)
            assert not any(getattr(m, name)[padding].any() for name in ("mask", "weights", "advantages", "behavior_logprobs"))


def test_arrays_have_the_types_that_training_expects(tmp_path):
    [batch] = plan([make_group([1, 0])], make_config(tmp_path), 1, {})
    [[m]] = batch.minibatches
    types = {name: value.dtype.name for name, value in vars(m).items() if name != "dumped"}
    floats = dict.fromkeys(["weights", "advantages", "behavior_logprobs"], "float32")
    integers = {"tokens": "int64", "targets": "int64", "positions": "int64", "cu_seqlens": "int32"}
    assert types == integers | floats | {"mask": "bool", "is_stale": "bool"}


def test_a_token_is_stale_where_older_weights_wrote_it(tmp_path):
    group = make_group([1, 0], [5, 4])
    group.samples[0].versions = ((6, 0, 2), (7, 2, 5))
    group.samples[1].versions = ((7, 0, 4),)
    [batch] = plan([group], make_config(tmp_path), 1, {}, version=7)
    [[m]] = batch.minibatches
    stale = [m.is_stale[start:end][m.mask[start:end]].tolist() for start, end in sequences_of(m)]
    assert sorted(stale) == [[False] * 4, [True, True, False, False, False]]
    assert not m.is_stale[~m.mask].any()


# plan


@pytest.mark.parametrize(
    ("num_groups", "sizes"),
    [(8, [2, 2, 2, 2]), (4, [2, 2]), (1, [1]), (2, [2]), (3, [2, 1]), (5, [3, 2]), (6, [2, 2, 2]), (7, [2, 2, 2, 1])],
)
def test_minibatches_are_whole_groups_in_asking_order_also_in_short_steps(tmp_path, num_groups, sizes):
    groups = random_groups(num_groups)
    batches = plan(groups, make_config(tmp_path), 2, {})
    start = 0
    for update, size in enumerate(sizes):
        learned = [r for batch in batches for r in responses_of(batch.minibatches[update])]
        assert sorted(learned) == sorted(responses_in(groups[start : start + size]))
        start += size
    assert {len(batch.minibatches) for batch in batches} == {len(sizes)}


def test_short_steps_make_fewer_updates_of_about_the_same_size(tmp_path):
    config = make_config(tmp_path, "optim.prompts_per_minibatch=4", "policy.tokens_per_microbatch=1000")
    for num_groups in range(3, 40):
        [batch] = plan(random_groups(num_groups), config, 1, {})
        sizes = [len(responses_of(microbatches)) // 2 for microbatches in batch.minibatches]
        assert sum(sizes) == num_groups and 3 <= min(sizes) <= max(sizes) <= min(sizes) + 1 <= 6


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_no_groups_make_no_updates_but_keep_the_metrics(tmp_path, num_ranks):
    batches = plan([], make_config(tmp_path), num_ranks, {"groups/kept": 0.0})
    assert [batch.minibatches for batch in batches] == [[]] * num_ranks
    assert all(batch.metrics == {"groups/kept": 0.0} for batch in batches)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 16])
def test_every_rank_takes_part_in_every_microbatch(tmp_path, num_ranks):  # a rank without one would leave the others in a collective
    batches = plan(random_groups(5), make_config(tmp_path, "parallel.tensor=2"), num_ranks, {})
    shapes = [[len(microbatches) for microbatches in batch.minibatches] for batch in batches]
    assert all(shape == shapes[0] for shape in shapes)
    assert all(len(m.tokens) > 0 for batch in batches for microbatches in batch.minibatches for m in microbatches)


def weighted(m):
    """Σ mask · weight · value, for a value that each token has of its own."""
    return (m.mask * m.weights.astype(np.float64) * (m.advantages * m.behavior_logprobs + m.targets / 1e6)).sum()


def sums_of_updates(batches):
    """Per update, over all ranks and microbatches."""
    updates = zip(*(batch.minibatches for batch in batches), strict=True)
    return [sum(weighted(m) for microbatches in ranks for m in microbatches) for ranks in updates]


@pytest.mark.parametrize("normaliser", ["token_mean", "group_token_mean", "sample_mean"])
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@pytest.mark.parametrize("budget", [48, 100, 10_000])
@pytest.mark.parametrize("tensor", [1, 8])
def test_the_loss_does_not_depend_on_how_tokens_are_split(tmp_path, normaliser, num_ranks, budget, tensor):
    groups = random_groups(7, longest=30)
    objective = f"objective.normaliser={normaliser}"
    config = make_config(tmp_path, objective)
    split = make_config(tmp_path, objective, f"policy.tokens_per_microbatch={budget}", f"parallel.tensor={tensor}")
    expected = sums_of_updates(plan(groups, config, 1, {}))
    assert sums_of_updates(plan(groups, split, num_ranks, {})) == pytest.approx(expected, rel=1e-9)


def test_filtered_samples_stay_in_the_batch_and_weigh_nothing(tmp_path):
    group = make_group([1, 0], [5, 32], truncated=[1])
    [batch] = plan([group], make_config(tmp_path, "objective.overlong_filtering=true"), 1, {})
    [[m]] = batch.minibatches
    assert m.mask.sum() == 37 and m.weights[m.mask].sum() == pytest.approx(1)
    assert np.count_nonzero(m.weights) == 5


# dumped samples


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_places_of_dumped_samples_hold_their_tokens(tmp_path, num_ranks):
    config = make_config(tmp_path, "rollout.dump_share=0.5", "rollout.prompts_per_step=4", "rollout.group_size=2")
    groups = random_groups(4)
    batches = plan(groups, config, num_ranks, metrics={})
    placed = {
        (place.group, place.index): m.targets[place.tokens].tolist()
        for batch in batches
        for minibatch in batch.minibatches
        for m in minibatch
        for place in m.dumped
    }
    assert placed == {(s.group, s.index): s.tokens.tolist() for group in (groups[1], groups[3]) for s in group.samples}


def test_nothing_is_placed_where_nothing_is_dumped(tmp_path):
    batch = plan(random_groups(4), make_config(tmp_path), 1, metrics={})[0]
    assert not any(m.dumped for minibatch in batch.minibatches for m in minibatch)
