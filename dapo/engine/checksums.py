"""The checksums that an SGLang server should have of the policy's weights, to compare with those it has.

SGLang keeps q, k, v in one parameter, gate and up in another, the vocabulary padded with zeros to a multiple of 64, and shards every matrix
over its tensor ranks. Of a parameter on a CPU `/weights_checker` gives the first 8 bytes of the SHA-256 of its memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

VOCAB_MULTIPLE = 64
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED_INTO = {part: whole for whole, parts in FUSED.items() for part in parts}


class Checksums:
    """Of weights as they pass by, for servers of each of these numbers of tensor ranks."""

    def __init__(self, tensor_ranks: Iterable[int], num_kv_heads: int):
        self.num_kv_heads = num_kv_heads
        self.of_ranks: dict[int, list[dict[str, str]]] = {size: [{} for _ in range(size)] for size in set(tensor_ranks)}
        self._waiting: dict[str, dict[str, Tensor]] = {}  # parts of a fused parameter whose others have not come by

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.add(name, tensor)
            yield name, tensor

    def add(self, name: str, tensor: Tensor) -> None:
        """`name` and `tensor` are Hugging Face's."""
        path, module, kind = name.rsplit(".", 2)  # model.layers.0.self_attn, q_proj, weight
        if module not in FUSED_INTO:
            self._enter(name, [(module, tensor)])
            return
        whole = FUSED_INTO[module]
        parts = self._waiting.setdefault(f"{path}.{whole}.{kind}", {})
        parts[module] = tensor
        if len(parts) == len(FUSED[whole]):
            del self._waiting[f"{path}.{whole}.{kind}"]
            self._enter(f"{path}.{whole}.{kind}", [(part, parts[part]) for part in FUSED[whole]])

    def differences(self, found: Sequence[dict[str, str]]) -> list[str]:
        """Names that a server, of which `found` has one dictionary per tensor rank, does not hold as they passed by, or should not hold."""
        expected = self.of_ranks[len(found)]
        return sorted({name for ours, theirs in zip(expected, found, strict=True) for name, _ in ours.items() ^ theirs.items()})

    def _enter(self, name: str, parts: list[tuple[str, Tensor]]) -> None:
        for size, ranks in self.of_ranks.items():
            for rank, checksums in enumerate(ranks):
                digest = hashlib.sha256()
                for module, tensor in parts:
                    shard = self._shard(module, tensor, rank, size).contiguous()
                    digest.update(shard.view(-1).view(torch.uint8).cpu().numpy())  # type: ignore[arg-type]
                checksums[name] = digest.hexdigest()[:16]

    def _shard(self, module: str, tensor: Tensor, rank: int, size: int) -> Tensor:
        if module in ("embed_tokens", "lm_head"):
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % VOCAB_MULTIPLE))
        elif module in ("o_proj", "down_proj"):
            return tensor.chunk(size, dim=1)[rank]
        elif module in ("k_proj", "v_proj") and size > self.num_kv_heads:  # ranks share a head
            return tensor.chunk(self.num_kv_heads)[rank * self.num_kv_heads // size]
        elif module not in FUSED_INTO:
            return tensor  # a norm: whole on every rank
        return tensor.chunk(size)[rank]
