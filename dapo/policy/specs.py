"""Megatron's specification of a model's layers: Transformer Engine's if it is here, else the plain ones."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from dapo.model.shape import ModelShape
from dapo.policy.cpu import has_transformer_engine
from dapo.policy.latent import LatentAttention, RotatedAttention
from dapo.policy.layers import PackedAttention, RMSNorm


def layer_spec(
    shape: ModelShape, config: TransformerConfig, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return this rank's layers, or the one that they are all like."""
    if has_transformer_engine():
        found = _engine_layers(shape, config, vp_stage)
        for layer in [found] if isinstance(found, ModuleSpec) else found.layer_specs:
            _set_router(layer)
        return found
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))

    @cache
    def of_kind(is_delta: bool, has_experts: bool) -> ModuleSpec:
        return _plain_layer(config, is_delta, has_experts)

    specs = [of_kind(shape.is_delta(layer), shape.has_experts(layer)) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _plain_layer(config: TransformerConfig, is_delta: bool, has_experts: bool) -> ModuleSpec:
    is_latent = config.multi_latent_attention
    layer = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
        multi_latent_attention=is_latent,
        num_experts=config.num_moe_experts if has_experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    # names in checkpoints, which are Transformer Engine's: it keeps the norm before experts apart from them
    names = {} if has_experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    attention = parts.self_attention
    if is_delta:
        # imported here: it imports flash-linear-attention, which takes seconds, where it is
        from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules

        from dapo.policy.delta_net import DeltaNet, DeltaNorm

        names["input_layernorm."] = "self_attention.in_proj.layer_norm_"
        inner = GatedDeltaNetSubmodules(ColumnParallelLinear, DeltaNorm, RowParallelLinear)
        parts.self_attention = ModuleSpec(module=DeltaNet, submodules=inner)
        parts.self_attn_bda = get_bias_dropout_add
    elif is_latent:
        for x in ("q", "kv"):
            names[f"self_attention.{x}_layernorm."] = f"self_attention.linear_{x}_up_proj.layer_norm_"
        attention.module = LatentAttention
        attention.submodules.core_attention = RotatedAttention
        attention.submodules.q_layernorm = attention.submodules.kv_layernorm = RMSNorm
    else:
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
        attention.submodules.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    parts.sharded_state_dict_keys_map = names
    _set_router(layer)
    return layer


class Router(TopKRouter):  # type: ignore[misc]
    """Megatron's router, which lists a token's experts in one order in all passes.

    Without gradients Megatron's own does not sort them: their outputs would be added in another order than in
    an update, and the first minibatch's ratios would not be exactly 1.
    """

    def routing(self, logits: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            return super().routing(logits, *arguments, **options)  # type: ignore[no-any-return]


def _set_router(layer: ModuleSpec) -> None:
    """Give a layer's experts our router, if it has any."""
    inner = getattr(layer.submodules.mlp, "keywords", {}).get("submodules")
    if isinstance(inner, MoESubmodules):
        inner.router = Router


def _engine_layers(
    shape: ModelShape, config: TransformerConfig, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the layers of Transformer Engine."""
    if shape.delta:
        from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
            get_transformer_block_with_experimental_attention_variant_spec,
        )
        from megatron.core.ssm.gated_delta_net import GatedDeltaNet

        from dapo.policy.delta_net import DeltaNet

        block = get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=vp_stage)
        for layer in block.layer_specs:
            attention = layer.submodules.self_attention
            if attention.module is GatedDeltaNet:
                attention.module = DeltaNet
                attention.submodules.out_norm = _not_zero_centred(attention.submodules.out_norm)
        return block
    if not shape.are_layers_alike:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )


def _not_zero_centred(norm: Any) -> type:
    """Return `norm` as DeltaNorm has it: Transformer Engine's reads the config."""

    class Norm:
        def __new__(cls, config: TransformerConfig, **options: Any) -> torch.nn.Module:  # type: ignore[misc]
            plain = dataclasses.replace(config, layernorm_zero_centered_gamma=False)
            return norm(config=plain, **options)  # type: ignore[no-any-return]

    return Norm
