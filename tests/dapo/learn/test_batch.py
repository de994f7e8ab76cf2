import numpy as np
import pytest

from dapo.config import ConfigError
from dapo.learn.batch import BYTES_PER_TOKEN, Microbatch, shares
from dapo.learn.traces import blank, merged
from dapo.model.families import read_shape
from dapo.model.routing import Routing
from dapo.types import token_fields
from tests.batches import plan, travelled
from tests.conftest import make_config, make_group
from tests.distributed.reference import make_hf, tell_routes


def random_groups(num_groups, seed=0, group_size=2, longest=40):
    rng = np.random.default_rng(seed)
    return [
        make_group(
            [1, *[0] * (group_size - 1)],
            rng.integers(1, longest, group_size).tolist(),
            id=i,
            prompt_length=int(rng.integers(1, 9)),
        )
        for i in range(num_groups)
    ]


def sequences_of(microbatch):
    """Start and end of every packed sequence, padding included."""
    return zip(microbatch.cu_seqlens[:-1], microbatch.cu_seqlens[1:], strict=True)


def response_at(microbatch, start, end):
    return tuple(microbatch.targets[start:end][microbatch.loss_mask[start:end]].tolist())


def responses_of(microbatches):
    """The responses in some microbatches, as token tuples, in order; padding has none."""
    return [
        tokens
        for m in microbatches
        for start, end in sequences_of(m)
        if (tokens := response_at(m, start, end))
    ]


def responses_in(groups):
    return [tuple(sample.tokens.tolist()) for group in groups for sample in group.samples]


# padding


def padding_fraction(batches):
    """Fraction of the ranks' tokens that only fill up."""
    microbatches = [m for batch in batches for minibatch in batch.minibatches for m in minibatch]
    num_tokens = sum(len(m.tokens) for m in microbatches)
    real = [
        end - start for m in microbatches for start, end in sequences_of(m) if m.loss_mask[start:end].any()
    ]
    return 1 - sum(real) / num_tokens


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("mix", ["lognormal", "Pareto", "uniform"])
def test_at_most_two_percent_of_the_tokens_of_sixteen_ranks_are_padding(tmp_path, mix, dispatcher):
    rng = np.random.default_rng(0)
    drawn = {
        "lognormal": lambda: rng.lognormal(np.log(2500), 1.0, 512),
        "Pareto": lambda: 500 * (1 + rng.pareto(1.1, 512)),
        "uniform": lambda: rng.integers(1, 20_481, 512),
    }[mix]()
    # an update of the paper's: 32 groups of 16
    lengths = np.clip(drawn.astype(int), 1, 20_480).reshape(32, 16)
    groups = [
        make_group([1, *[0] * 15], row.tolist(), id=i, prompt_length=256) for i, row in enumerate(lengths)
    ]
    options = [
        "rollout.prompts_per_step=32",
        "rollout.prompts_per_round=32",
        "rollout.group_size=16",
        "optim.prompts_per_minibatch=32",
    ]
    options += [
        "parallel.tensor=8",
        "policy.tokens_per_microbatch=32768",
        f"policy.megatron.moe_token_dispatcher_type={dispatcher}",
    ]
    assert padding_fraction(plan(groups, make_config(tmp_path, *options), 16, {})) <= 0.02


# build


@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_every_value_sits_at_the_position_that_predicts_its_token(tmp_path, multiple):
    groups = [
        make_group([1, 0, 0], [4, 1, 6], id=0, prompt_length=3),
        make_group([1, 0], [5, 2], id=1, prompt_length=1),
    ]
    groups[0].samples[2].loss_mask[2:4] = False
    config = make_config(tmp_path, f"parallel.tensor={multiple}")
    [batch] = plan(groups, config, 1, {})
    [[m]] = batch.minibatches
    pairs = [(group.prompt, sample) for group in groups for sample in group.samples]
    starts = m.response_starts.tolist()
    assert starts[:5] == [2, 2, 2, 0, 0] and len(starts) == len(m.cu_seqlens) - 1
    for (start, end), (prompt, sample) in zip(list(sequences_of(m))[:5], pairs, strict=True):
        whole = np.concatenate([prompt.tokens, sample.tokens])
        assert np.array_equal(m.tokens[start:end], whole[:-1])
        # the shift stays inside: the last token is a target only
        assert np.array_equal(m.targets[start:end], whole[1:])
        assert np.array_equal(m.positions[start:end], np.arange(len(whole) - 1))
        before, response = slice(start, start + len(prompt.tokens) - 1), slice(end - sample.length, end)
        assert (
            not m.loss_mask[before].any()
            and not m.token_weights[before].any()
            and not m.advantages[before].any()
        )
        assert np.array_equal(m.targets[response], sample.tokens)
        assert np.array_equal(m.loss_mask[response], sample.loss_mask)
        assert np.array_equal(m.behavior_logprobs[response], sample.behavior_logprobs)
        assert (m.advantages[response] == np.float32(sample.advantage)).all()
        # 18 response tokens, 16 the policy's own
        assert m.token_weights[response][sample.loss_mask] == pytest.approx(1 / 16)


@pytest.mark.parametrize("multiple", [1, 2, 3, 8, 64])
def test_padding_is_one_more_sequence_that_weighs_nothing(tmp_path, multiple):
    groups = random_groups(3)
    for batch in plan(groups, make_config(tmp_path, f"parallel.tensor={multiple}"), 1, {}):
        for m in (m for microbatches in batch.minibatches for m in microbatches):
            num_tokens = m.cu_seqlens[-1]
            assert num_tokens % multiple == 0
            assert {len(getattr(m, name)) for name in token_fields(Microbatch)} == {num_tokens}
            assert (np.diff(m.cu_seqlens) > 0).all()
            assert all(
                np.array_equal(m.positions[start:end], np.arange(end - start))
                for start, end in sequences_of(m)
            )
            real = [end - start for start, end in sequences_of(m) if m.loss_mask[start:end].any()]
            padding = slice(sum(real), None)
            assert num_tokens - sum(real) < multiple and len(m.cu_seqlens) - 1 - len(real) in (0, 1)
            assert not any(
                getattr(m, name)[padding].any()
                for name in ("loss_mask", "token_weights", "advantages", "behavior_logprobs")
            )


def test_arrays_have_the_types_that_training_expects(tmp_path):
    [batch] = plan([make_group([1, 0])], make_config(tmp_path), 1, {})
    [[m]] = batch.minibatches
    names = [*token_fields(Microbatch), "cu_seqlens", "response_starts"]
    types = {name: getattr(m, name).dtype.name for name in names}
    floats = dict.fromkeys(["token_weights", "advantages", "behavior_logprobs"], "float32")
    integers = {"tokens": "int64", "targets": "int64", "positions": "int64"}
    integers |= {"cu_seqlens": "int32", "response_starts": "int32"}
    assert types == integers | floats | {"loss_mask": "bool", "is_stale": "bool"}


def test_a_batch_holds_as_many_bytes_a_token_as_its_fields_say(tmp_path):
    [batch] = plan([make_group([1, 0])], make_config(tmp_path), 1, {})
    [[m]] = batch.minibatches
    sent = sum(getattr(m, name).itemsize for name in token_fields(Microbatch))
    assert sent + 4 + 4 == BYTES_PER_TOKEN  # old_logprobs and importance are made on the device


def test_the_longest_sequence_is_known_on_every_context_rank(tmp_path):
    for context in (1, 2):
        for batch in plan(random_groups(6), make_config(tmp_path, f"parallel.context={context}"), 1, {}):
            for m in (m for minibatch in batch.minibatches for m in minibatch):
                assert m.longest == np.diff(m.cu_seqlens).max()


def test_a_token_is_stale_where_older_weights_wrote_it(tmp_path):
    group = make_group([1, 0], [5, 4])
    group.samples[0].versions = ((6, 0, 2), (7, 2, 5))
    group.samples[1].versions = ((7, 0, 4),)
    [batch] = plan([group], make_config(tmp_path), 1, {}, version=7)
    [[m]] = batch.minibatches
    stale = [m.is_stale[start:end][m.loss_mask[start:end]].tolist() for start, end in sequences_of(m)]
    assert sorted(stale) == [[False] * 4, [True, True, False, False, False]]
    assert not m.is_stale[~m.loss_mask].any()


# plan


@pytest.mark.parametrize(
    ("num_groups", "sizes"),
    [
        (8, [2, 2, 2, 2]),
        (4, [2, 2]),
        (1, [1]),
        (2, [2]),
        (3, [2, 1]),
        (5, [3, 2]),
        (6, [2, 2, 2]),
        (7, [2, 2, 2, 1]),
    ],
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


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("num_groups", [0, 3])
def test_a_probe_is_beside_the_updates_on_every_rank(tmp_path, num_groups, num_ranks):
    config = make_config(tmp_path, "parallel.tensor=2")
    groups, probe = random_groups(num_groups), random_groups(4, seed=1, group_size=1)
    made = shares(groups, config, num_ranks, {}, 0, probe)
    batches = [travelled(share).batch(config.parallel, 0) for share in made]
    plain = plan(groups, config, num_ranks, {})
    assert [len(b.minibatches) for b in batches] == [len(b.minibatches) for b in plain]
    assert len({len(b.probe) for b in batches}) == 1 and not any(b.probe for b in plain)
    found = responses_of([m for b in batches for m in b.probe])
    assert sorted(map(tuple, found)) == sorted(map(tuple, responses_in(probe)))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 16])
# a rank without one would leave the others in a collective
def test_every_rank_takes_part_in_every_microbatch(tmp_path, num_ranks):
    batches = plan(random_groups(5), make_config(tmp_path, "parallel.tensor=2"), num_ranks, {})
    shapes = [[len(microbatches) for microbatches in batch.minibatches] for batch in batches]
    assert all(shape == shapes[0] for shape in shapes)
    assert all(
        len(m.tokens) > 0 for batch in batches for microbatches in batch.minibatches for m in microbatches
    )


@pytest.mark.parametrize(("num_ranks", "virtual"), [(2, 1), (5, 1), (2, 2)])
def test_ranks_have_as_many_tokens_at_a_time_where_all_are_gathered_for_the_experts(
    tmp_path, num_ranks, virtual
):
    layout = [
        "parallel.tensor=2",
        f"parallel.virtual_pipeline={virtual}",
        f"parallel.pipeline={virtual}",
        "policy.tokens_per_microbatch=48",
    ]
    for dispatcher, is_alike in (("allgather", True), ("alltoall", False)):
        config = make_config(tmp_path, *layout, f"policy.megatron.moe_token_dispatcher_type={dispatcher}")
        batches = plan(random_groups(5), config, num_ranks, {})
        rows = [
            row
            for updates in zip(*(b.minibatches for b in batches), strict=True)
            for row in zip(*updates, strict=True)
        ]
        assert len(rows) > 1
        assert all(len({len(m.tokens) for m in row}) == 1 for row in rows) is is_alike
        assert all(
            m.cu_seqlens[-1] == len(m.tokens) <= 48 and len(m.tokens) % 2 == 0 for row in rows for m in row
        )
        sums = sums_of_updates(batches)
        if is_alike:
            gathered = sums
    np.testing.assert_allclose(sums, gathered, rtol=1e-12)


def weighted(m):
    """Σ mask · weight · value, for a value that each token has of its own."""
    return (
        m.loss_mask
        * m.token_weights.astype(np.float64)
        * (m.advantages * m.behavior_logprobs + m.targets / 1e6)
    ).sum()


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
    split = make_config(
        tmp_path, objective, f"policy.tokens_per_microbatch={budget}", f"parallel.tensor={tensor}"
    )
    expected = sums_of_updates(plan(groups, config, 1, {}))
    assert sums_of_updates(plan(groups, split, num_ranks, {})) == pytest.approx(expected, rel=1e-9)


def test_filtered_samples_stay_in_the_batch_and_weigh_nothing(tmp_path):
    group = make_group([1, 0], [5, 32], truncated=[1])
    [batch] = plan([group], make_config(tmp_path, "objective.overlong_filtering=true"), 1, {})
    [[m]] = batch.minibatches
    assert m.loss_mask.sum() == 37 and m.token_weights[m.loss_mask].sum() == pytest.approx(1)
    assert np.count_nonzero(m.token_weights) == 5


# context ranks


def shards_of(tmp_path, context, *overrides, num_ranks=1, num_groups=6):
    """Shards as [data rank][update][microbatch][context rank]."""
    layout = [
        f"parallel.context={context}",
        "policy.tokens_per_microbatch=96",
        "rollout.dump_share=1",
        *overrides,
    ]
    batches = plan(random_groups(num_groups), make_config(tmp_path, *layout), num_ranks, {})
    assert len(batches) == num_ranks * context
    return [
        [
            list(zip(*minibatches, strict=True))
            for minibatches in zip(*(b.minibatches for b in batches[i : i + context]), strict=True)
        ]
        for i in range(0, len(batches), context)
    ]


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("context", [2, 3, 4])
def test_context_ranks_split_each_sequence_in_a_zig_zag_of_equal_parts(tmp_path, context, tensor, num_ranks):
    for minibatches in shards_of(tmp_path, context, f"parallel.tensor={tensor}", num_ranks=num_ranks):
        for parts in (parts for minibatch in minibatches for parts in minibatch):
            assert len({len(part.tokens) for part in parts}) == 1 and len(parts[0].tokens) % tensor == 0
            assert all(np.array_equal(part.cu_seqlens, parts[0].cu_seqlens) for part in parts)
            for start, end in sequences_of(parts[0]):
                size = (end - start) // (2 * context)
                assert size * 2 * context == end - start
                for rank, part in enumerate(parts):
                    mine = part.positions[start // context : end // context]
                    chunks = [np.arange(k * size, (k + 1) * size) for k in (rank, 2 * context - 1 - rank)]
                    assert np.array_equal(mine, np.concatenate(chunks))


@pytest.mark.parametrize("context", [2, 3])
def test_a_token_keeps_its_target_across_the_edge_of_a_chunk(tmp_path, context):
    groups = {s.tokens.tobytes(): g.prompt for g in random_groups(6) for s in g.samples}
    for [minibatch] in [
        m
        for m in shards_of(
            tmp_path, context, "optim.prompts_per_minibatch=4", "rollout.prompts_per_step=4", num_groups=4
        )
    ]:
        for parts in minibatch:
            for start, end in sequences_of(parts[0]):
                here = slice(start // context, end // context)
                order = np.concatenate([part.positions[here] for part in parts]).argsort()
                whole = {
                    name: np.concatenate([getattr(p, name)[here] for p in parts])[order]
                    for name in ("tokens", "targets", "loss_mask")
                }
                response = whole["targets"][whole["loss_mask"]]
                if len(response):
                    prompt = groups[response.astype(np.int32).tobytes()]
                    fed = np.concatenate([prompt.tokens, response])
                    assert np.array_equal(whole["tokens"][: len(fed) - 1], fed[:-1])
                    assert not whole["loss_mask"][len(fed) - 1 :].any()


@pytest.mark.parametrize("context", [2, 4])
@pytest.mark.parametrize("normaliser", ["token_mean", "sample_mean"])
def test_context_ranks_together_weigh_what_one_weighs(tmp_path, normaliser, context):
    objective = f"objective.normaliser={normaliser}"
    groups = random_groups(5, longest=30)
    expected = sums_of_updates(plan(groups, make_config(tmp_path, objective), 1, {}))
    split = make_config(tmp_path, objective, f"parallel.context={context}", "parallel.tensor=2")
    assert sums_of_updates(plan(groups, split, 2, {})) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("context", [2, 3])
def test_the_locations_of_a_sample_on_all_context_ranks_hold_its_tokens_once(tmp_path, context):
    located: dict = {}
    for m in (
        m
        for minibatches in shards_of(tmp_path, context)
        for minibatch in minibatches
        for parts in minibatch
        for m in parts
    ):
        for location in m.dumped:
            tokens = located.setdefault((location.group, location.index), np.full(location.length, -1))
            here = slice(location.start, location.start + location.tokens.stop - location.tokens.start)
            assert (tokens[here] == -1).all()
            tokens[here] = m.targets[location.tokens]
    assert {key: tokens.tolist() for key, tokens in located.items()} == {
        (s.group, s.index): s.tokens.tolist() for group in random_groups(6) for s in group.samples
    }


def test_a_pack_of_no_sequences_is_sharded_too(tmp_path):
    config = make_config(tmp_path, "parallel.context=2", "parallel.tensor=2")
    batches = plan(random_groups(1), config, 4, {})
    assert {len(m.tokens) for batch in batches[4:] for [m] in batch.minibatches} == {4}
    assert not any(m.loss_mask.any() for batch in batches[4:] for [m] in batch.minibatches)


def test_traces_of_context_ranks_are_one_trace():
    parts = [blank(3, 1, 5), blank(3, 1, 5), blank(3, 0, 2)]
    parts[0].logprobs[:2], parts[1].logprobs[2:] = [-1, -2], [-3, -4, -5]
    parts[1].clipped_low[4] = True
    whole, other = merged(parts)
    assert whole.logprobs.tolist() == [-1, -2, -3, -4, -5] and whole.clipped_low.tolist() == [False] * 4 + [
        True
    ]
    assert (whole.group, whole.index, other.index) == (3, 1, 0)


# stages with several chunks


@pytest.mark.parametrize(("virtual", "multiple"), [(1, 1), (2, 3)])
def test_an_update_has_a_multiple_of_the_stages_in_microbatches_where_they_have_several_chunks(
    tmp_path, virtual, multiple
):
    config = make_config(tmp_path, "parallel.pipeline=3", f"parallel.virtual_pipeline={virtual}")
    counts = {
        len(minibatch) for batch in plan(random_groups(9), config, 2, {}) for minibatch in batch.minibatches
    }
    assert all(count % multiple == 0 for count in counts) and (
        virtual > 1 or any(count % 3 for count in counts)
    )


# dumped samples


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_locations_of_dumped_samples_hold_their_tokens(tmp_path, num_ranks):
    config = make_config(
        tmp_path, "rollout.dump_share=0.5", "rollout.prompts_per_step=4", "rollout.group_size=2"
    )
    groups = random_groups(4)
    batches = plan(groups, config, num_ranks, metrics={})
    located = {
        (location.group, location.index): m.targets[location.tokens].tolist()
        for batch in batches
        for minibatch in batch.minibatches
        for m in minibatch
        for location in m.dumped
    }
    assert located == {
        (s.group, s.index): s.tokens.tolist() for group in (groups[1], groups[3]) for s in group.samples
    }


def test_nothing_is_located_where_nothing_is_dumped(tmp_path):
    batch = plan(random_groups(4), make_config(tmp_path), 1, metrics={})[0]
    assert not any(m.dumped for minibatch in batch.minibatches for m in minibatch)


# routes


@pytest.fixture(scope="module")
def routing(tmp_path_factory):
    """Of four layers, all with 4 of 8 experts for a token."""
    folder = tmp_path_factory.mktemp("moe") / "hf"
    make_hf("qwen3_moe", False, folder)
    return Routing(read_shape(folder))


def routed_groups(routing):
    """Of random tokens above 0, which is padding's."""
    groups, rng = random_groups(6), np.random.default_rng(2)
    for group in groups:
        group.prompt.tokens[:] = rng.integers(1, 250, len(group.prompt.tokens))
        for sample in group.samples:
            sample.tokens[:] = rng.integers(1, 250, sample.length)
    tell_routes(groups, routing)
    return groups


LAYOUTS = [
    ((), 1),
    (("parallel.pipeline=2",), 2),
    (("parallel.pipeline=2", "parallel.virtual_pipeline=2"), 1),
    (("parallel.context=2", "parallel.tensor=2"), 2),
]


@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
def test_each_token_has_the_routes_it_was_sampled_with_in_its_stages_layers(
    tmp_path, routing, layout, num_ranks
):
    config = make_config(tmp_path, "policy.tokens_per_microbatch=96", *layout)
    groups, parallel = routed_groups(routing), config.parallel
    expected = {}  # by the whole sequence
    for group in groups:
        for sample in group.samples:
            whole = np.concatenate([group.prompt.tokens, sample.tokens])
            expected[tuple(whole.tolist())] = sample.routes
    made = list(shares(groups, config, num_ranks, {}, routing=routing))
    assert len(made) == num_ranks * parallel.pipeline
    seen = 0
    for i, share in enumerate(made):
        chunks = routing.shape.chunks(parallel.pipeline, i % parallel.pipeline, parallel.virtual_pipeline)
        columns = routing.columns([layer for chunk in chunks for layer in chunk])
        whole = travelled(share)
        alone = parallel.model_copy(update={"context": 1})
        for microbatch in [m for minibatch in whole.batch(alone, 0).minibatches for m in minibatch]:
            assert microbatch.routes.dtype == np.uint8
            for start, end in sequences_of(microbatch):
                fed = (*microbatch.tokens[start:end].tolist(), int(microbatch.targets[end - 1]))
                if fed in expected:
                    assert np.array_equal(microbatch.routes[start:end], expected[fed][:, columns])
                    seen += 1
            assert not routing.fault(np.tile(microbatch.routes, (1, 4))[:, :16]), "padding too has routes"
    assert seen == len(expected) * parallel.pipeline


def test_context_ranks_have_the_routes_of_their_own_tokens(tmp_path, routing):
    config = make_config(tmp_path, "parallel.context=2")
    [share] = shares(routed_groups(routing), config, 1, {}, routing=routing)
    both = [share.batch(config.parallel, rank).minibatches[0][0] for rank in (0, 1)]
    [whole] = shares(routed_groups(routing), config, 1, {}, routing=routing)
    alone = whole.batch(config.parallel.model_copy(update={"context": 1}), 0).minibatches[0][0]
    found, expected = (
        {tuple(row) for m in ms for row in np.c_[m.tokens, m.positions, m.routes].tolist() if row[0]}
        for ms in (both, [alone])
    )
    assert found == expected


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda sample: None, "has no routes: it was sampled without"),
        (lambda sample: sample.routes[:-1], "routes of "),
        (lambda sample: sample.routes[:, :-4], ", 16] is expected"),
    ],
)
def test_samples_whose_routes_cannot_be_replayed_are_refused_by_name(tmp_path, routing, spoil, said):
    groups = routed_groups(routing)
    groups[3].samples[1].routes = spoil(groups[3].samples[1])
    with pytest.raises(ConfigError) as raised:
        list(shares(groups, make_config(tmp_path), 1, {}, routing=routing))
    assert "sample 1 of group 3" in str(raised.value) and said in str(raised.value)
