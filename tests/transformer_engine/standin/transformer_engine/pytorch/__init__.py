"""See transformer_engine. T packed tokens, h heads, g KV heads, d head size."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch import distributed, ops, optimizers

SIGNATURES = json.loads((Path(__file__).parents[3] / "signatures.json").read_text())
__all__ = ["distributed", "ops", "optimizers"]


def as_recorded(cls: type) -> type:
    """Refuse keywords that the real class does not have, and parameters of other names."""
    recorded = SIGNATURES["classes"][cls.__name__]
    for method in ("__init__", "forward"):
        setattr(cls, method, refusing(getattr(cls, method), recorded, method, cls.__name__))
    return cls


def refusing(
    call: Callable[..., Any], recorded: dict[str, Any], method: str, name: str
) -> Callable[..., Any]:
    @functools.wraps(call)
    def checked(self: torch.nn.Module, *values: Any, **given: Any) -> Any:
        if unknown := given.keys() - set(recorded[method].split()):
            raise TypeError(f"{name}.{method} has no {', '.join(sorted(unknown))}")
        result = call(self, *values, **given)
        if method == "__init__":
            found = {name.rstrip("0123456789") for name, _ in self.named_parameters()}
            assert found <= set(recorded["parameters"].split()), found
        return result

    return checked


class Module(torch.nn.Module):
    """What Transformer Engine's modules share: they keep nothing in a checkpoint unless there is FP8."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass

    def add(self, name: str, *size: int, like: dict[str, Any], dim: int | None = None) -> None:
        """Register a parameter; `dim`: the one that tensor ranks split."""
        parameter = torch.nn.Parameter(torch.empty(size, dtype=like["params_dtype"], device=like["device"]))
        if dim is not None:
            parameter.tensor_model_parallel, parameter.partition_dim = True, dim  # type: ignore[attr-defined]
            parameter.partition_stride = 1  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)


def split(size: int, mode: str | None, here: str, ranks: int) -> int:
    return size // ranks if mode == here else size


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@as_recorded
class RMSNorm(Module):
    def __init__(self, normalized_shape: int, eps: float, sequence_parallel: bool, **options: Any):
        super().__init__()
        self.eps = eps
        self.add("weight", normalized_shape, like=options)
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@as_recorded
class LayerNorm(Module):
    def __init__(self, **options: Any):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@as_recorded
class Linear(Module):
    def __init__(self, in_features: int, out_features: int, bias: bool, return_bias: bool,
                 parallel_mode: str | None, tp_size: int, **options: Any):  # fmt: skip
        super().__init__()
        assert options["init_method"] is not None and not options["fuse_wgrad_accumulation"]
        self.tp_size, self.use_bias, self.return_bias = tp_size, bias, return_bias
        self.parallel_mode, self.group = parallel_mode, options["tp_group"]
        self.is_sequence_split = tp_size > 1 and options["sequence_parallel"]
        self.in_features = split(in_features, parallel_mode, "row", tp_size)
        self.out_features = split(out_features, parallel_mode, "column", tp_size)
        dim = 1 if parallel_mode == "row" else 0
        self.add("weight", self.out_features, self.in_features, like=options, dim=dim)
        self.bias = torch.empty(0)
        if bias:
            del self.bias
            self.add("bias", self.out_features, like=options, dim=0 if parallel_mode == "column" else None)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        from megatron.core.tensor_parallel import mappings  # it imports this module

        assert self.tp_size == 1 or self.is_sequence_split or self.parallel_mode is None
        is_split = self.is_sequence_split and self.parallel_mode is not None
        if is_split and self.parallel_mode == "column":
            inp = mappings.gather_from_sequence_parallel_region(inp, group=self.group)
        is_added = self.use_bias and not self.return_bias
        out = F.linear(inp, self.weight, self.bias if is_added and self.parallel_mode != "row" else None)
        if is_split and self.parallel_mode == "row":
            out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.group)
        if is_added and self.parallel_mode == "row":
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out


@as_recorded
class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, eps: float, normalization: str,
                 return_layernorm_output: bool, zero_centered_gamma: bool, **options: Any):  # fmt: skip
        assert (normalization, return_layernorm_output, zero_centered_gamma) == ("RMSNorm", False, False)
        Linear.__init__.__wrapped__(self, in_features, out_features, **options)  # type: ignore[attr-defined]
        self.eps = eps
        self.add("layer_norm_weight", self.in_features, like=options)
        self.layer_norm_weight.sequence_parallel = options["sequence_parallel"]  # type: ignore[attr-defined]

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return Linear.forward.__wrapped__(self, rms_norm(inp, self.layer_norm_weight, self.eps))  # type: ignore[attr-defined]


@as_recorded
class GroupedLinear(Module):
    def __init__(self, num_gemms: int, in_features: int, out_features: int, bias: bool, return_bias: bool,
                 parallel_mode: str | None, tp_size: int, **options: Any):  # fmt: skip
        super().__init__()
        assert not bias and not options["single_grouped_weight"]
        self.num_gemms, self.use_bias, self.return_bias, self.tp_size = num_gemms, bias, return_bias, tp_size
        self.in_features = split(in_features, parallel_mode, "row", tp_size)
        self.out_features = split(out_features, parallel_mode, "column", tp_size)
        self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False}, False, False
        for i in range(num_gemms):
            self.add(f"weight{i}", self.out_features, self.in_features, like=options)  # Megatron marks it

    def init_fp8_metadata(self, num_gemms: int) -> None:
        pass

    def forward(
        self, inp: Tensor, m_splits: Sequence[int], is_first_microbatch: bool | None = None
    ) -> Tensor:
        parts = inp.split(list(m_splits))
        return torch.cat([F.linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)])


@as_recorded
class DotProductAttention(Module):
    def __init__(self, num_attention_heads: int, kv_channels: int, attention_dropout: float,
                 softmax_scale: float | None, **options: Any):  # fmt: skip
        super().__init__()
        assert attention_dropout == 0
        self.scale = softmax_scale

    def forward(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, attention_mask: None, *,
                qkv_format: str, cu_seqlens_q: Tensor, attn_mask_type: str,
                **options: Any) -> Tensor:  # fmt: skip
        """query [T, h, d], key and value [T, g, d] → [T, h·d]; causal within each sequence."""
        assert (qkv_format, attn_mask_type, attention_mask) == ("thd", "padding_causal", None)
        runs = []
        lengths = cu_seqlens_q.diff().tolist()
        for q, k, v in zip(*(x.split(lengths) for x in (query_layer, key_layer, value_layer)), strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
            runs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(runs)
