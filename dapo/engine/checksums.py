"""The checksums that an SGLang server must have of the policy's weights, compared with those that it has.

SGLang fuses q, k, v, and gate, up, and a layer's experts, pads the vocabulary with zeros to a multiple of 64,
and shards every matrix over its tensor ranks. `/weights_checker` returns 8 bytes per parameter: on a CPU, the
first of the SHA-256 of its memory; on a GPU, a hash of SGLang's own (`gpu_digest`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

VOCAB_MULTIPLE = 64
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
TILE, TILES_AT_ONCE = 8192, 128  # words; tiles whose intermediate values are in memory together
LOW = 0xFFFFFFFF
# factor, seed, turn of each half
PLACES = ((0x27D4EB2D, 0x243F6A88, 15), (0x165667B1, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & LOW, 13))
FUSED_INTO = {part: whole for whole, parts in FUSED.items() for part in parts}
EXPERTS = {"w13_weight": ("gate_proj", "up_proj"), "w2_weight": ("down_proj",)}  # one expert after another
EXPERTS_INTO = {part: whole for whole, parts in EXPERTS.items() for part in parts}


class Checksums:
    """Computes checksums of weights as they are sent, for servers with each of these numbers of tensor ranks.

    Those of experts hold on a CPU if their columns are a multiple of 32 × tensor ranks, else the server pads
    them; on a GPU it orders experts as its kernel needs them.
    """

    def __init__(
        self, tensor_ranks: Iterable[int], num_kv_heads: int, device: str = "cpu", num_experts: int = 0
    ):
        self.num_kv_heads = num_kv_heads
        self.num_experts = num_experts
        self.digest = cpu_digest if device == "cpu" else gpu_digest
        sizes = set(tensor_ranks)
        self.of_ranks: dict[int, list[dict[str, str]]] = {size: [{} for _ in range(size)] for size in sizes}
        self._waiting: dict[str, dict[str, Tensor]] = {}  # fused parameter → the parts of it that came so far

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.add(name, tensor)
            yield name, tensor

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one of Hugging Face's tensors."""
        *path, module, kind = name.split(".")  # [model, layers, 0, self_attn], q_proj, weight
        if "experts" in path:  # [model, layers, 0, mlp, experts, 7], down_proj, weight
            whole = EXPERTS_INTO[module]
            order = [f"{expert}.{part}" for expert in range(self.num_experts) for part in EXPERTS[whole]]
            self._collect(".".join([*path[:-1], whole]), f"{path[-1]}.{module}", tensor, order)
        elif module in FUSED_INTO:
            whole = FUSED_INTO[module]
            self._collect(".".join([*path, whole, kind]), module, tensor, FUSED[whole])
        else:
            self._enter(name, [(module, tensor)])

    def _collect(self, fused: str, part: str, tensor: Tensor, order: Sequence[str]) -> None:
        """Keep one part of a fused parameter; enter all of them, in this order, once they are there."""
        parts = self._waiting.setdefault(fused, {})
        parts[part] = tensor
        if len(parts) == len(order):
            del self._waiting[fused]
            self._enter(fused, [(part.split(".")[-1], parts[part]) for part in order])

    def differences(self, found: Sequence[dict[str, str]]) -> list[str]:
        """Return the names whose checksums differ from `found`, a dictionary for each of a server's ranks."""
        pairs = zip(self.of_ranks[len(found)], found, strict=True)
        return sorted({name for ours, theirs in pairs for name, _ in ours.items() ^ theirs.items()})

    def _enter(self, name: str, parts: list[tuple[str, Tensor]]) -> None:
        for size, ranks in self.of_ranks.items():
            for rank, checksums in enumerate(ranks):
                shards = [self._shard(module, tensor, rank, size) for module, tensor in parts]
                data = torch.cat([shard.reshape(-1).view(torch.uint8) for shard in shards])
                checksums[name] = self.digest(data)

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


def cpu_digest(data: Tensor) -> str:
    """Return 16 hexadecimal digits of uint8 [n]."""
    return hashlib.sha256(data.cpu().numpy()).hexdigest()[:16]  # type: ignore[arg-type]


def gpu_digest(data: Tensor) -> str:
    """Return 16 hexadecimal digits of uint8 [n], on any device: SGLang's hash of a CUDA tensor.

    Each 32-bit word is mixed with its position, twice; the mixed words are summed in tiles, and these over
    all. Multiplication wraps in int64, and its low 32 bits are those of uint32.
    """
    words = torch.nn.functional.pad(data, (0, -len(data) % 4)).view(torch.int32)
    total = 0
    for start in range(0, len(words), TILES_AT_ONCE * TILE):
        word = words[start : start + TILES_AT_ONCE * TILE].long() & LOW
        place = torch.arange(start, start + len(word), device=data.device) & LOW
        halves = []
        for factor, seed, turn in PLACES:
            turned = (place << turn | place >> (32 - turn)) & LOW
            mixed = _mix(word ^ (place * factor + seed & LOW) ^ turned)
            tiles = torch.nn.functional.pad(mixed, (0, -len(mixed) % TILE)).view(-1, TILE).sum(1) & LOW
            halves.append(_mix(tiles ^ (4 * len(words) & LOW)).tolist())
        total += sum(high << 32 | low for high, low in zip(*halves, strict=True))
    # the end of splitmix64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        total &= 2**64 - 1
        total = (total ^ total >> shift) * factor
    return f"{total & 2**64 - 1:016x}"


def _mix(word: Tensor) -> Tensor:
    """Apply the end of MurmurHash3 to 32-bit words in int64."""
    word = (word ^ word >> 16) * 0x85EBCA6B & LOW
    word = (word ^ word >> 13) * 0xC2B2AE35 & LOW
    return word ^ word >> 16
