"""Norm and packed attention in plain torch, in place of Transformer Engine's.

On a GPU machine with Transformer Engine its own modules are used, and nothing here runs.
S = sequences, T = packed tokens (of one context rank), h = heads, g = KV heads, d = head size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dapo.policy.rope import Pack, rotate

MAX_PADDING = 0.25  # fraction of a batch of sequences that are padded to the longest
KEYS_AT_ONCE = 16  # of torch's attention on a CPU; the rest it takes one by one: 8 take longer than 16


class RMSNorm(torch.nn.Module):
    """RMS norm as Hugging Face computes it: statistics in float32, the weight applied in the input's type.

    A zero-centred one multiplies by 1 + its weight, in float32.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.is_zero_centred = config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # its gradient is summed over tensor ranks
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        if self.is_zero_centred:
            return (y * (1 + self.weight.float())).to(x.dtype)
        return self.weight * y.to(x.dtype)


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """Rotation, and causal attention within each packed sequence, with grouped KV heads.

    The constructor is that of Transformer Engine's module. Context ranks split each sequence as batch.shard
    does: every rank gathers all keys and values and attends from its own tokens; the gradients of keys and
    values go back, summed, to the rank that has their tokens.
    """

    comes_rotated = False

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any,
                 attention_type: str, pg_collection: ProcessGroupCollection,
                 softmax_scale: float | None = None, **_: Any):  # fmt: skip
        super().__init__(config=config)
        self.scale = softmax_scale
        self.context = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
                packed_seq_params: Pack, **_: Any) -> Tensor:  # fmt: skip
        """query [T, h, d], key and value [T, g, d] → [T, h·d]. Queries and keys are rotated first."""
        if not self.comes_rotated:
            query, key = rotate(query, packed_seq_params), rotate(key, packed_seq_params)
        queries = keys = cu = packed_seq_params.cu_seqlens_q
        if self.context.size() > 1:
            # [context·T, 2g, d]
            both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=1), group=self.context)
            queries, keys, indices = key_runs(cu, len(query), self.context.rank(), self.context.size())
            key, value = (x[indices] for x in both.chunk(2, dim=1))
        if query.is_cuda and query.dtype != torch.float32:  # torch's flash attention for packed sequences
            out = self._varlen(query, key, value, queries, keys, packed_seq_params.max_seqlen_q)
        elif self.context.size() > 1:
            out = self._run_by_run(query, key, value, queries, keys)
        else:
            out = self._padded(query, key, value, cu)
        return out.flatten(1)

    def _varlen(
        self, query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, longest: int
    ) -> Tensor:
        """Attend run by run: of queries queries[i] : queries[i + 1] the last sees all of keys keys[i] :
        keys[i + 1], the one before it all but one, and so on.
        """
        from torch.nn.attention.varlen import varlen_attn

        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        options: Any = {"scale": self.scale, "window_size": (-1, 0)}
        return varlen_attn(query, key, value, queries, keys, longest, longest, **options)  # type: ignore[return-value]

    def _run_by_run(self, query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """Attend as `_varlen`, without its kernel: queries padded in front need no mask of queries × keys."""
        parts = []
        counts = keys.diff().tolist()
        runs = zip(query.split(queries.diff().tolist()), key.split(counts), value.split(counts), strict=True)
        for q, k, v in runs:
            padding = len(k) - len(q)
            q, k, v = (x.transpose(0, 1)[None] for x in (F.pad(q, (0, 0, 0, 0, padding, 0)), k, v))
            parts.append(self._causal(q, k, v)[0].transpose(0, 1)[padding:])
        return torch.cat(parts)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Attend in batches of sequences of like length, padded at the end, where causality hides it."""
        parts, (batches, places) = [], padded_batches(tuple(cu_seqlens.tolist()), query.device)
        for indices in batches:
            # index_select copies whole rows, in a fifth of the time that x[indices] takes
            rows = (x.index_select(0, indices.flatten()) for x in (query, key, value))
            q, k, v = (x.unflatten(0, indices.shape).transpose(1, 2) for x in rows)  # [S, h or g, longest, d]
            parts.append(self._causal(q, k, v).transpose(1, 2).flatten(0, 1))
        return torch.cat(parts).index_select(0, places)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [S, h, n, d], key and value [S, g, n, d] → [S, h, n, d]."""
        if query.is_cuda:  # in float32 the kernel for grouped heads would hold n × n scores
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=not query.is_cuda
        )


class Runs(NamedTuple):
    """A context rank's two chunks of each sequence, each a run of queries, and the keys up to its end."""

    queries: Tensor  # int32 [2S + 1]: run i of this rank's tokens is queries[i] : queries[i + 1]
    keys: Tensor  # int32 [2S + 1]: its keys are keys[i] : keys[i + 1]
    indices: Tensor  # int64 [keys[-1]]: each key's index among all context ranks' tokens, rank after rank


@functools.lru_cache(maxsize=16)
def key_runs(cu_seqlens: Tensor, num_tokens: int, rank: int, context: int) -> Runs:
    """Return rank `rank`'s runs in batch.shard's zig-zag, without waiting for the device. `num_tokens`: T."""
    sizes = cu_seqlens.diff() // (2 * context)  # [S], of a chunk
    ends = torch.tensor([rank + 1, 2 * context - rank], device=sizes.device, dtype=sizes.dtype)
    lengths = sizes[:, None].expand(-1, 2), sizes[:, None] * ends  # [S, 2]
    queries, keys = (F.pad(x.flatten().cumsum(0, dtype=torch.int32), (1, 0)) for x in lengths)
    num_keys = num_tokens // 2 * (2 * context + 1)
    runs = torch.arange(len(keys) - 1, device=keys.device)
    run = runs.repeat_interleave(keys.diff(), output_size=num_keys)
    # of the key's sequence: size of a chunk, start on every rank
    size, start = sizes[run // 2], cu_seqlens[run // 2] // context
    step = torch.arange(num_keys, device=keys.device) - keys[run]
    chunk = step // size
    is_late = chunk >= context
    owner = torch.where(is_late, 2 * context - 1 - chunk, chunk)
    return Runs(queries, keys, owner * num_tokens + start + is_late * size + step % size)


@functools.lru_cache(maxsize=16)
def padded_batches(cu_seqlens: tuple[int, ...], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Batch packed sequences of like length, each batch padded by at most MAX_PADDING of it, and then to a
    multiple of KEYS_AT_ONCE that is near.

    Returns per batch indices in the pack, int64 [S, longest], where padding repeats a sequence's last; and
    each of the pack's tokens' place among all batches' rows laid one after another, int64 [T].
    """
    starts, lengths = np.array(cu_seqlens[:-1]), np.diff(cu_seqlens)
    batches: list[list[int]] = []
    for i in np.argsort(-lengths, kind="stable").tolist():
        joined = [*batches[-1], i] if batches else [i]
        if batches and lengths[joined].sum() >= (1 - MAX_PADDING) * lengths[joined[0]] * len(joined):
            batches[-1] = joined
        else:
            batches.append([i])
    padded, places, offset = [], np.zeros(cu_seqlens[-1], np.int64), 0
    for batch in batches:
        longest = int(lengths[batch[0]])
        left_over = longest % KEYS_AT_ONCE
        steps = np.arange(longest - left_over + KEYS_AT_ONCE if 2 * left_over >= KEYS_AT_ONCE else longest)
        indices = starts[batch, None] + np.minimum(steps, lengths[batch, None] - 1)
        is_real = steps < lengths[batch, None]
        places[indices[is_real]] = offset + np.flatnonzero(is_real)
        offset += indices.size
        padded.append(torch.from_numpy(indices).to(device))
    return padded, torch.from_numpy(places).to(device)
