"""The lengths that interleaved pipeline stages receive, without other ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dapo import clock
from dapo.policy import schedule
from dapo.policy.schedule import InterleavedCommunicator

LENGTHS = [10, 11, 12, 13]  # of four microbatches
FORWARD = [0, 1, 0, 1, 2, 3, 2, 3]  # two stages with two chunks each, two microbatches at a time


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: Any, group: Any, config: Any) -> None:
        self.config = config

    monkeypatch.setattr(InterleavedCommunicator.__mro__[1], "__init__", init)


def make(rank: int) -> InterleavedCommunicator:
    group: Any = SimpleNamespace(rank=lambda: rank, size=lambda: 2)
    config: Any = SimpleNamespace(
        virtual_pipeline_model_parallel_size=2, microbatch_group_size_per_vp_stage=2, hidden_size=64
    )
    return InterleavedCommunicator(group, config, LENGTHS)


def shapes(communicator: InterleavedCommunicator, forward: bool, count: int) -> list[list[int] | None]:
    found = [communicator._communicate_shapes(None, None, forward, not forward) for _ in range(count)]
    assert all(pair[forward] is None for pair in found), "nothing is due from the other side"
    return [pair[not forward] for pair in found]


def test_a_stage_receives_each_microbatch_of_each_chunk_but_the_first_and_the_last() -> None:
    every = [[LENGTHS[microbatch], 1, 64] for microbatch in FORWARD]
    of_one_chunk = [[length, 1, 64] for length in LENGTHS]
    assert shapes(make(0), True, 4) == of_one_chunk, "the model's first chunk receives nothing"
    assert shapes(make(1), True, 8) == every
    assert shapes(make(0), False, 8) == every, "backward, chunks come in reverse order"
    assert shapes(make(1), False, 4) == of_one_chunk, "the model's last chunk receives nothing"


@pytest.mark.parametrize("is_bfloat16", [True, False])
def test_hidden_states_keep_their_dtype(is_bfloat16: bool) -> None:
    asked = {}

    def model(tokens: Any, positions: Any, mask: Any, **options: Any) -> None:
        asked.update(options, tokens=tokens, positions=positions, mask=mask)

    cu, positions = torch.tensor([0, 4], dtype=torch.int32), torch.arange(4)
    microbatch: Any = SimpleNamespace(cu_seqlens=cu, longest=4, tokens=positions + 50, positions=positions)
    config: Any = SimpleNamespace(bf16=is_bfloat16)
    schedule.hidden_states(model, config, microbatch)  # type: ignore[arg-type]
    assert asked["tokens"].tolist() == [[50, 51, 52, 53]] and asked["positions"].tolist() == [[0, 1, 2, 3]]
    assert asked["mask"] is None and asked["packed_seq_params"].max_seqlen_q == 4
    # without 16 bits there is no wrapper that would know the word
    assert asked.get("fp32_output", "not said") == (False if is_bfloat16 else "not said")


def test_what_is_not_due_is_not_taken() -> None:
    communicator = make(1)
    assert communicator._communicate_shapes(None, None, False, False) == (None, None)
    assert communicator._communicate_shapes(None, None, True, True) == ([10, 1, 64], [10, 1, 64])
    with pytest.raises(StopIteration):
        shapes(communicator, True, 8)


def test_every_microbatch_is_a_heartbeat_and_has_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(forward_step_func: Any, data_iterator: Any, model: Any, **options: Any) -> list[Any]:
        results = []
        for _ in range(options["num_microbatches"]):
            hidden, loss = forward_step_func(data_iterator[0], model[0])
            total, num_tokens, result = loss(hidden)
            assert not num_tokens.item(), "or the loss would be divided by it"
            results.append((float(total), result))
        return results

    monkeypatch.setattr(schedule, "get_forward_backward_func", lambda: forward)
    monkeypatch.setattr(schedule, "hidden_states", lambda model, config, microbatch: model(microbatch.tokens))
    microbatches: Any = [SimpleNamespace(tokens=torch.full((length, 1, 1), 2.0)) for length in LENGTHS]
    before = clock.progress()[0]
    found = schedule.run(
        [torch.nn.Identity()],
        SimpleNamespace(),  # type: ignore[arg-type]
        microbatches,
        lambda microbatch, hidden: (hidden.sum(), len(microbatch.tokens)),
        forward_only=True,
    )
    assert found == [(2.0 * length, length) for length in LENGTHS]
    assert clock.progress()[0] - before == len(LENGTHS)


@pytest.mark.parametrize(("sequence_parallel", "split"), [(True, 2), (False, 1)])
def test_interleaved_stages_receive_what_a_tensor_rank_has(
    sequence_parallel: bool, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = SimpleNamespace(pp=SimpleNamespace(rank=lambda: 1, size=lambda: 2))
    known = SimpleNamespace(use_mpu_process_groups=lambda names: groups)
    monkeypatch.setattr(schedule, "ProcessGroupCollection", known)
    config: Any = SimpleNamespace(
        virtual_pipeline_model_parallel_size=2, microbatch_group_size_per_vp_stage=2, hidden_size=64,
        tensor_model_parallel_size=2, sequence_parallel=sequence_parallel,
    )  # fmt: skip
    options = schedule._interleaved(config, [10, 12, 14, 16])
    assert options["pg_collection"] is groups
    assert shapes(options["p2p_communicator"], True, 1) == [[10 // split, 1, 64]]
