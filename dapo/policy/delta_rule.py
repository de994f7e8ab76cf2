"""The gated delta rule on packed sequences in plain torch, in place of flash-linear-attention's.

Megatron's GatedDeltaNet imports three functions of fla. Where there is no CUDA, or fla cannot be imported,
policy/cpu.py makes it import these: the same arguments, but no initial state and no final one. Per head, with
a state S that is zero before a sequence's first token (Gated Delta Networks, arXiv:2412.06464, Eq. 10),

    S_t = α_t S_{t-1} (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ,    o_t = S_t q_t / √k,    α_t = exp(g_t)

T = packed tokens, N = chunks, C = tokens of a chunk, D = channels, h = heads, k and v = sizes of a key and of
a value. It imports nothing of Megatron, whose import is not done when this is imported.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32  # C: of the powers of two, the fastest or nearly so on a CPU, for heads of 16 to 128


def l2norm(x: Tensor, dim: int = -1, eps: float = 1e-6) -> Tensor:
    """Return x / √(Σx² + eps), summed over `dim`; computed in float32, in the type of x."""
    wide = _widen(x)
    return (wide * torch.rsqrt(wide.square().sum(dim, keepdim=True) + eps)).to(x.dtype)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
                  initial_state: Tensor | None = None, output_final_state: bool = False,
                  cu_seqlens: Tensor | None = None) -> tuple[Tensor, None]:  # fmt: skip
    """Convolve each channel of each sequence, apply SiLU: x [1, T, D], weight [D, W], bias [D] → [1, T, D].

    A channel's last weight is the token's own; what would be before a sequence's beginning counts as zero.
    Without cu_seqlens x is [sequences, T, D].
    """
    assert activation in ("silu", "swish") and initial_state is None and not output_final_state
    positions = _positions(_boundaries(x, cu_seqlens), x.device)[:, None]  # [T, 1]
    tokens, weights = _widen(x).flatten(0, 1), _widen(weight)
    y = tokens * weights[:, -1]
    for back in range(1, min(weights.shape[1], len(tokens))):
        earlier = F.pad(tokens[:-back], (0, 0, back, 0)).masked_fill_(positions < back, 0)
        y = torch.addcmul(y, earlier, weights[:, -1 - back])
    y = y if bias is None else y + bias
    return F.silu(y).to(x.dtype).view_as(x), None


def chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
                           scale: float | None = None, initial_state: Tensor | None = None,
                           output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
                           cu_seqlens: Tensor | None = None,
                           **options: Any) -> tuple[Tensor, None]:  # fmt: skip
    """Return all o_t: q, k [1, T, h, k], v [1, T, h, v], g, beta [1, T, h] → [1, T, h, v].

    g is at most 0. The state is float32 (float64 if the input is). A sequence's result does not depend on the
    others of the pack. Without cu_seqlens each is [sequences, T, …].
    """
    assert initial_state is None and not output_final_state and not options and q.shape[2] == v.shape[2]
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    scaled = _widen(q) * (q.shape[-1] ** -0.5 if scale is None else scale)
    chunks = _chunks(_boundaries(v, cu_seqlens), v.device)
    parts = [chunks.take(_widen(x).flatten(0, 1)) for x in (scaled, k, v, g, beta)]
    out = _delta_rule(chunks.counts, *parts).transpose(1, 2).flatten(0, 1)  # [N · C, h, v]
    return out.index_select(0, chunks.places).to(v.dtype).view_as(v), None


def _delta_rule(counts: list[int], q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """q, k [N, h, C, k], v [N, h, C, v], g, beta [N, h, C] → [N, h, C, v], by section 3.3 of the paper.

    `counts[i]` sequences have an i-th chunk. Decays are exponentials of differences, which are at most 0.
    """
    total = g.cumsum(-1)
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    between = total[..., :, None] - total[..., None, :]
    decay = between.masked_fill(later, -torch.inf).exp()  # [N, h, C, C]: Γ, lower triangular
    since = total.exp()[..., None]  # from the chunk's beginning
    until = (total[..., -1:] - total).exp()[..., None]  # to its end
    k_beta = k * beta[..., None]
    # (I + strictly lower (diag(β) K Kᵀ ⊙ Γ)) [U, W] = diag(β) [V, diag(γ) K]: the diagonal is not read
    sides = torch.cat([v * beta[..., None], k_beta * since], dim=-1)
    solved = torch.linalg.solve_triangular((k_beta @ k.mT) * decay, sides, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    within = (q @ k.mT) * decay
    # split, whose gradient is one cat: an index's is as large as all chunks, for each of them
    steps = (x.split(counts) for x in (u, w, q * since, within, k * until, since[:, :, -1:]))
    state, out = q.new_zeros(counts[0], q.shape[1], k.shape[-1], v.shape[-1]), []  # Sᵀ
    for u_i, w_i, q_i, within_i, k_i, decay_i in zip(*steps, strict=True):
        state = state[: len(u_i)]  # of the sequences that have another chunk
        written = u_i - w_i @ state
        out.append(q_i @ state + within_i @ written)
        state = torch.addcmul(k_i.mT @ written, state, decay_i)
    return torch.cat(out)


class Chunks(NamedTuple):
    """Packed sequences in chunks: all first ones, longest sequence first, all second ones, and so on."""

    indices: Tensor  # int64 [N, C], in the pack; what a last chunk lacks repeats the sequence's last token
    counts: list[int]  # counts[i] sequences have an i-th chunk: the first of those that had one before it
    places: Tensor  # int64 [T]: where a token is among the chunks' tokens

    def take(self, x: Tensor) -> Tensor:
        """Return x [T, h, …] as [N, h, C, …]."""
        rows: Tensor = x.index_select(0, self.indices.flatten()).unflatten(0, self.indices.shape)
        return rows.transpose(1, 2).contiguous()


@functools.lru_cache(maxsize=16)
def _chunks(cu_seqlens: tuple[int, ...], device: torch.device) -> Chunks:
    lengths = np.diff(cu_seqlens)
    order = np.argsort(-lengths, kind="stable")
    starts, ends, lengths = np.array(cu_seqlens)[order], np.array(cu_seqlens)[order + 1], lengths[order]
    offsets = range(0, int(lengths[0]), CHUNK)
    counts = [int((lengths > offset).sum()) for offset in offsets]
    steps = [starts[:n, None] + offset + np.arange(CHUNK) for n, offset in zip(counts, offsets, strict=True)]
    indices, ends = np.concatenate(steps), np.concatenate([ends[:n, None] for n in counts])
    is_real = indices < ends
    places = np.zeros(cu_seqlens[-1], np.int64)
    places[indices[is_real]] = np.flatnonzero(is_real)
    indices = np.minimum(indices, ends - 1)
    return Chunks(torch.from_numpy(indices).to(device), counts, torch.from_numpy(places).to(device))


@functools.lru_cache(maxsize=16)
def _positions(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """Return each token's position in its sequence, int64 [T]."""
    starts = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    return torch.from_numpy(np.arange(len(starts)) - starts).to(device)


def _boundaries(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    sequences, length = x.shape[:2]
    return tuple(cu_seqlens.tolist() if cu_seqlens is not None else range(0, sequences * length + 1, length))


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
