"""The gated delta rule against its recurrence; Megatron's layer, which calls it, against Hugging Face's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_5 import Qwen3_5TextConfig, modeling_qwen3_5

from dapo.policy.delta_rule import CHUNK, causal_conv1d, chunk_gated_delta_rule, l2norm
from dapo.policy.layers import RMSNorm

PACKS = [
    [1],
    [1, 1, 1],
    [CHUNK],
    [CHUNK - 1, CHUNK + 1, 1, 2 * CHUNK],
    [3, 5 * CHUNK + 7, 2, 1, 9, CHUNK + 1],
]


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)


def inputs(num_tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Return q, k, v, g and beta for 3 heads of sizes 5 and 7."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, num_tokens, 3, size, dtype=dtype) for size in (5, 5, 7))
    g, beta = -2 * torch.rand(1, num_tokens, 3, dtype=dtype) ** 3, torch.rand(1, num_tokens, 3, dtype=dtype)
    return [x.requires_grad_() for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta)]


def recur(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Return o_t of one sequence [1, T, h, v], by Eq. 10 of the paper as it is written."""
    state, out = v.new_zeros(v.shape[2], v.shape[3], k.shape[3]), []
    for q_t, k_t, v_t, g_t, beta_t in zip(*(x[0] for x in (q, k, v, g, beta)), strict=True):
        identity = torch.eye(k_t.shape[-1], dtype=k.dtype)
        transition = identity - beta_t[:, None, None] * k_t[:, :, None] * k_t[:, None, :]
        written = beta_t[:, None, None] * v_t[:, :, None] * k_t[:, None, :]
        state = g_t.exp()[:, None, None] * state @ transition + written
        out.append((state @ q_t[:, :, None])[..., 0] / k.shape[-1] ** 0.5)
    return torch.stack(out)[None]


def gradients(out: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return [out, *torch.autograd.grad((out * torch.randn(out.shape, dtype=torch.float64)).sum(), tensors)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_it_is_the_recurrence_of_each_sequence(
    lengths: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    exact = inputs(sum(lengths))
    parts = zip(*(x.split(lengths, dim=1) for x in exact), strict=True)
    expected = gradients(torch.cat([recur(*part) for part in parts], dim=1), exact)
    given = [x.detach().to(dtype).requires_grad_() for x in exact]
    out, state = chunk_gated_delta_rule(*given, cu_seqlens=boundaries(lengths))
    assert state is None and out.dtype == dtype
    for ours, truth in zip(gradients(out, given), expected, strict=True):
        assert (ours - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_a_sequence_alone_is_itself_in_a_pack(lengths: list[int]) -> None:
    """But for rounding: a processor's library multiplies many small matrices otherwise than few."""
    packed = inputs(sum(lengths), torch.float32)
    direction = torch.randn(1, sum(lengths), 3, 7)
    whole = outcome(packed, direction, boundaries(lengths))
    for i, (start, length) in enumerate(zip(boundaries(lengths)[:-1].tolist(), lengths, strict=True)):
        place = slice(start, start + length)
        cu_seqlens = boundaries([length]) if i % 2 else None
        alone = outcome([x[:, place] for x in packed], direction[:, place], cu_seqlens)
        for ours, theirs in zip(alone, whole, strict=True):
            torch.testing.assert_close(ours, theirs[:, place], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", PACKS[1:2] + PACKS[3:], ids=str)
def test_a_packs_other_sequences_do_not_reach_a_bit(lengths: list[int]) -> None:
    packed, cu_seqlens = inputs(sum(lengths), torch.float32), boundaries(lengths)
    direction = torch.randn(1, sum(lengths), 3, 7)
    whole = outcome(packed, direction, cu_seqlens)
    for start, length in zip(cu_seqlens[:-1].tolist(), lengths, strict=True):
        place = slice(start, start + length)
        others = [torch.full_like(x, torch.nan) for x in (*packed, direction)]
        for x, own in zip(others, (*packed, direction), strict=True):
            x[:, place] = own.detach()[:, place]
        for ours, theirs in zip(outcome(others[:-1], others[-1], cu_seqlens), whole, strict=True):
            assert torch.equal(ours[:, place], theirs[:, place])


def outcome(tensors: list[Tensor], direction: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Return the result and the gradients of its product with `direction`."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, _ = chunk_gated_delta_rule(*leaves, cu_seqlens=cu_seqlens)
    return [out, *torch.autograd.grad((out * direction).sum(), leaves)]


def test_it_is_transformers_function() -> None:
    q, k, v, g, beta = (torch.cat([x, x.flip(1)]) for x in inputs(2 * CHUNK + 5, torch.float32))
    options: dict[str, Any] = {"g": g, "beta": beta, "use_qk_l2norm_in_kernel": True}
    ours, _ = chunk_gated_delta_rule(3 * q, 2 * k, v, **options)
    theirs, _ = modeling_qwen3_5.torch_chunk_gated_delta_rule(3 * q, 2 * k, v, **options)
    torch.testing.assert_close(ours, theirs)


def test_gradients_are_finite_where_nothing_is_remembered() -> None:
    lengths = [3 * CHUNK + 1, 1, CHUNK]
    q, k, v, g, beta = inputs(sum(lengths), torch.float32)
    tensors = [q, k, v, torch.full_like(g, -50.0).requires_grad_(), beta]
    out, _ = chunk_gated_delta_rule(*tensors, cu_seqlens=boundaries(lengths))
    assert all(x.isfinite().all() for x in gradients(out, tensors))
    # each token's own value is all that it reads
    own = beta[..., None] * (q * k).sum(-1, keepdim=True) * v / q.shape[-1] ** 0.5
    torch.testing.assert_close(out, own)


def test_a_pack_is_not_padded_to_its_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, sizes = [50 * CHUNK, *[3] * 50], []
    solve = torch.linalg.solve_triangular

    def count(system: Tensor, *args: Any, **options: Any) -> Tensor:
        sizes.append(len(system))
        return solve(system, *args, **options)

    monkeypatch.setattr(torch.linalg, "solve_triangular", count)
    chunk_gated_delta_rule(*inputs(sum(lengths), torch.float32), cu_seqlens=boundaries(lengths))
    assert sizes == [100]  # chunks


def test_what_is_not_supported_is_refused() -> None:
    tensors = inputs(4)
    for options in ({"initial_state": torch.zeros(1, 3, 5, 7)}, {"output_final_state": True}, {"other": 1}):
        with pytest.raises(AssertionError):
            chunk_gated_delta_rule(*tensors, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("lengths", [[1], [2, 1, 1], [9, 1, 3, 2, 30]], ids=str)
def test_a_convolution_begins_anew_with_each_sequence(lengths: list[int], has_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(*size, requires_grad=True) for size in ((1, sum(lengths), 6), (6, 4)))
    bias = torch.randn(6, requires_grad=True) if has_bias else None
    tensors = [x, weight, *([] if bias is None else [bias])]
    ours, state = causal_conv1d(x, weight, bias, "silu", cu_seqlens=boundaries(lengths))
    parts = [F.pad(part.mT, (3, 0)) for part in x.split(lengths, dim=1)]
    theirs = torch.cat([F.conv1d(part, weight[:, None], bias, groups=6) for part in parts], dim=2).mT
    assert state is None
    for a, b in zip(gradients(ours, tensors), gradients(F.silu(theirs), tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_a_vector_of_zeros_has_a_norm() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    y = l2norm(x)
    torch.testing.assert_close(y, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert l2norm(x.bfloat16()).dtype == torch.bfloat16


class Linear(torch.nn.Linear):
    """Stands in for Megatron's parallel linear layers, which need process groups."""

    def __init__(self, inputs: int, outputs: int, bias: bool, **_: Any):
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


def test_megatrons_layer_is_hugging_faces() -> None:
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(0)
    heads: dict[str, int] = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8)
    heads |= dict(linear_value_head_dim=12, linear_conv_kernel_dim=4)
    theirs = modeling_qwen3_5.Qwen3_5GatedDeltaNet(Qwen3_5TextConfig(hidden_size=16, **heads), 0)
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, activation_func=F.silu, layernorm_epsilon=1e-6,
        experimental_attention_variant="gated_delta_net", linear_attention_freq=4,
        perform_initialization=False, **heads,
    )  # fmt: skip
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    parts = GatedDeltaNetSubmodules(in_proj=Linear, out_norm=RMSNorm, out_proj=Linear)
    ours = GatedDeltaNet(config, parts, 1, pg_collection=SimpleNamespace(tp=group, cp=group))
    with torch.no_grad():
        theirs.norm.weight.uniform_(0.5, 1.5)
        sections = (theirs.in_proj_qkv, theirs.in_proj_z, theirs.in_proj_b, theirs.in_proj_a)
        ours.in_proj.weight.copy_(torch.cat([section.weight for section in sections]))
        for name in ("conv1d.weight", "A_log", "dt_bias", "out_proj.weight"):
            ours.get_parameter(name).copy_(theirs.get_parameter(name))
        ours.out_norm.weight.copy_(theirs.norm.weight)
    lengths = [1, 2 * CHUNK + 3, 2, 20]
    x = torch.randn(sum(lengths), 1, 16, requires_grad=True)
    cu = boundaries(lengths)
    pack = SimpleNamespace(qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, cu_seqlens_q_padded=None,
                           cu_seqlens_kv_padded=None)  # fmt: skip
    out, _ = ours(x, None, packed_seq_params=pack)
    expected = torch.cat([theirs(part.transpose(0, 1))[0] for part in x.split(lengths)])[:, None]
    names = ("conv1d.weight", "A_log", "dt_bias", "out_proj.weight")
    results = (
        gradients(y, [x, *(layer.get_parameter(name) for name in names)])
        for y, layer in ((out, ours), (expected, theirs))
    )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_decay_of_16_bit_weights_is_computed_in_float32() -> None:
    """As transformers does; Megatron takes the exponential in the weights' type."""
    from dapo.policy.delta_net import DeltaNet

    torch.manual_seed(0)
    a_log, dt_bias, alpha = (torch.randn(64).bfloat16() for _ in range(3))
    expected = -a_log.float().exp() * torch.nn.functional.softplus(alpha.float() + dt_bias)
    decay, _ = DeltaNet.__new__(DeltaNet)._compute_g_and_beta(a_log, dt_bias, alpha, alpha)
    assert torch.equal(decay, expected)
