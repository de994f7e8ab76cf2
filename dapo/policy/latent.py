"""Multi-head latent attention in plain torch, around Megatron's projections (arXiv:2405.04434, section 2.1).

T = packed tokens of a context rank, tp = tensor ranks (T/tp tokens on each between projections), h = heads of
a tensor rank, d = head size of queries and keys, r = its rotated dimensions, which come last.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from dapo.policy.layers import PackedAttention
from dapo.policy.rope import Pack, rotate


class RotatedAttention(PackedAttention):
    """PackedAttention of queries and keys that are rotated already."""

    comes_rotated = True


class Whole(torch.nn.Module):
    """A projection that every tensor rank has whole, of this rank's tokens: [T/tp, 1, i] → [T/tp, 1, o].

    Megatron's plain layers split the down projections among tensor ranks, and its gather does not sum the
    gradients that come back from all ranks' heads to the rotated part of the keys.
    """

    def __init__(self, weight: Tensor, num_rows: int, is_sequence_parallel: bool):
        """`weight`: of the projection that it replaces."""
        super().__init__()
        self.weight = torch.nn.Parameter(weight.new_empty(num_rows, weight.shape[1]))
        # its gradient is summed over tensor ranks
        self.weight.sequence_parallel = is_sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


class LatentAttention(MLASelfAttention):  # type: ignore[misc]
    """Megatron's module with whole down projections, and rotation of the whole pack at once."""

    def __init__(self, config: Any, *arguments: Any, **options: Any):
        super().__init__(config, *arguments, **options)
        split = config.sequence_parallel
        query: Any = self.linear_q_down_proj  # type: ignore[has-type]
        both: Any = self.linear_kv_down_proj  # type: ignore[has-type]
        self.linear_q_down_proj = Whole(query.weight, config.q_lora_rank, split)
        rows = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = Whole(both.weight, rows, split)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: None = None, position_ids: None = None,
        packed_seq_params: Pack | None = None, inference_context: None = None, **_: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """hidden_states [T/tp, 1, H] → query, key [T, h, d], value [T, h, v]; and what they are made of."""
        pack, config = packed_seq_params, self.config
        assert pack is not None
        if pack.turns is None:
            self.rotary_pos_emb(pack, True, None)
        of_query = self.q_layernorm(self.linear_q_down_proj(hidden_states)[0])
        query, _ = self.linear_q_up_proj(of_query)
        both, _ = self.linear_kv_down_proj(hidden_states)
        latent, turned = both.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        if config.sequence_parallel:
            turned = gather_from_sequence_parallel_region(turned, group=self.tp_group)
        latent = self.kv_layernorm(latent)
        heads = self.num_attention_heads_per_partition
        key_value = self.linear_kv_up_proj(latent)[0].view(len(turned), heads, -1)
        key, value = key_value.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        query, turned_query = query.view(len(turned), heads, -1).split(
            [config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1
        )
        query = torch.cat([query, rotate(by_halves(turned_query), pack)], dim=-1)
        turned = rotate(by_halves(turned), pack).expand(-1, heads, -1)
        return query, torch.cat([key, turned], dim=-1), value.contiguous(), of_query, latent


def by_halves(x: Tensor) -> Tensor:
    """Move pairs that lie side by side apart, as `rotate` has them: […, r]."""
    apart: Tensor = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return apart
