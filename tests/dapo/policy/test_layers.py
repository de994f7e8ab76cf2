"""Packed attention and the norm, against the plainest form of each."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dapo.learn.batch import Microbatch, shard
from dapo.policy.layers import KEYS_AT_ONCE, MAX_PADDING, PackedAttention, RMSNorm, key_runs, padded_batches
from dapo.policy.rope import PackedRotary, describe_pack, rotate
from dapo.types import token_fields
from tests.conftest import attend

CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [7, 2, 30, 3, 29], [1, 64, 2]])
def test_each_sequence_attends_to_itself_only(lengths: list[int]) -> None:
    torch.manual_seed(0)
    attention = PackedAttention.__new__(PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.scale, attention.context = None, SimpleNamespace(size=lambda: 1)
    total = sum(lengths)
    query, key, value = (torch.randn(total, h, 8, requires_grad=True) for h in (4, 2, 2))
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    pack = describe_pack(cu_seqlens, max(lengths), torch.cat([torch.arange(n) for n in lengths]))
    PackedRotary(torch.tensor([1.0, 0.3, 0.1, 0.01]), torch.float32)(pack, packed_seq=True, cp_group=None)
    out = attention(query, key, value, None, packed_seq_params=pack)
    turned = rotate(query, pack), rotate(key, pack), value
    expected = torch.cat([attend(*parts) for parts in zip(*(x.split(lengths) for x in turned), strict=True)])
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    ours = torch.autograd.grad((out * direction).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * direction).sum(), (query, key, value))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("context", [2, 3, 4])
@pytest.mark.parametrize("chunks", [[1], [1, 1, 1], [2, 5, 1, 3]])
def test_context_ranks_together_attend_as_one(context: int, chunks: list[int]) -> None:
    torch.manual_seed(0)
    lengths = [2 * context * n for n in chunks]
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int32)
    everything = microbatch_of(np.arange(sum(lengths)), cu_seqlens)
    shards = [torch.from_numpy(shard(everything, rank, context).tokens) for rank in range(context)]
    query, key, value = (torch.randn(sum(lengths), h, 8) for h in (4, 2, 2))
    expected = torch.cat(
        [attend(*parts) for parts in zip(*(x.split(lengths) for x in (query, key, value)), strict=True)]
    )
    attention = PackedAttention.__new__(PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.scale = None
    gathered = torch.cat(shards)
    for rank, mine in enumerate(shards):
        runs = key_runs(torch.from_numpy(cu_seqlens), len(mine), rank, context)
        seen = gathered[runs.indices]
        ours = attention._run_by_run(query[mine], key[seen], value[seen], runs.queries, runs.keys)
        torch.testing.assert_close(ours.flatten(1), expected[mine])


def microbatch_of(tokens: np.ndarray, cu_seqlens: np.ndarray) -> Microbatch:
    fields = dict.fromkeys([*token_fields(Microbatch), "response_starts"], tokens)
    return Microbatch(**fields, cu_seqlens=cu_seqlens, longest=0)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40))
def test_padded_batches_hold_every_place_once_with_little_padding(lengths: list[int]) -> None:
    batches, places = padded_batches(tuple(np.cumsum([0, *lengths]).tolist()), CPU)
    laid = torch.cat([indices.flatten() for indices in batches]).tolist()
    first = {token: place for place, token in reversed(list(enumerate(laid)))}  # the others are padding
    assert [first.pop(token) for token in range(sum(lengths))] == places.tolist() and not first
    for indices in batches:
        counts = [len(row.unique()) for row in indices]
        assert 1 - sum(counts) / (len(counts) * max(counts)) <= MAX_PADDING
        num_columns = indices.shape[1]
        if num_columns > max(counts):
            assert num_columns % KEYS_AT_ONCE == 0 and 2 * (num_columns - max(counts)) <= KEYS_AT_ONCE
        else:
            assert 2 * (num_columns % KEYS_AT_ONCE) < KEYS_AT_ONCE


def test_norm_equals_hugging_face() -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

    torch.manual_seed(0)
    x, weight = torch.randn(6, 16), torch.randn(16)
    for is_zero_centred, kind in ((False, Qwen2RMSNorm), (True, Qwen3_5RMSNorm)):
        config = SimpleNamespace(
            params_dtype=torch.float32, sequence_parallel=True, layernorm_zero_centered_gamma=is_zero_centred
        )
        ours, theirs = RMSNorm(config, 16, eps=1e-6), kind(16, eps=1e-6)
        ours.weight.data, theirs.weight.data = weight, weight
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(ours(x.to(dtype)), theirs(x.to(dtype)))
        assert ours.weight.sequence_parallel
