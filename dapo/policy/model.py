"""A model's sizes and a run's options → Megatron's TransformerConfig and GPTModel."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from dapo.config import Config, ConfigError, nearest
from dapo.model.layout import check_layout, padded_vocab
from dapo.model.passthrough import Passthrough
from dapo.model.shape import ModelShape
from dapo.policy.cpu import has_transformer_engine
from dapo.policy.layers import layer_spec
from dapo.policy.rope import inverse_frequencies, softmax_scale


def split_passthrough(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """policy.megatron's fields for (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig); a
    shared name goes to each.

    Raises:
        ConfigError: none of the three has such a field.
    """
    owners = [
        {f.name for f in dataclasses.fields(c)}
        for c in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
    ]
    for name in options:
        if not any(name in fields for fields in owners):
            raise ConfigError(
                f"policy.megatron.{name}: no such field in Megatron's configs; "
                f"{nearest(name, sorted(set().union(*owners)))}"
            )
    transformer, optimizer, ddp = ({k: v for k, v in options.items() if k in fields} for fields in owners)
    return transformer, optimizer, ddp


def transformer_config(shape: ModelShape, config: Config) -> TransformerConfig:
    """Raises ConfigError: heads, KV heads or layers do not divide by the layout, or Megatron refuses a
    passed-through field.
    """
    tensor, pipeline, virtual = (
        config.parallel.tensor,
        config.parallel.pipeline,
        config.parallel.virtual_pipeline,
    )
    check_layout(shape, config)
    passed, _, _ = split_passthrough(config.policy.megatron)
    dtype = getattr(torch, config.policy.dtype)
    has_cuda = torch.cuda.is_available()
    fields = dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=shape.has_qkv_bias,
        qk_layernorm=shape.has_qk_norm,
        softmax_scale=softmax_scale(shape),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=config.parallel.context,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # the loss is a sum over tokens: Megatron must divide by nothing
        moe_token_dispatcher_type="alltoall",  # what variable_seq_lengths insists on, dense models included
        # between two stages that take turns, batched sends in both directions are swapped
        batch_p2p_comm=False,
        overlap_p2p_comm=False,
        use_cpu_initialization=not has_cuda,
        # the weights are loaded; but Megatron marks a parameter as tensor-parallel while it initialises it,
        # and unmarked ones are missing from the gradient norm: so initialise, with functions that do nothing
        perform_initialization=True,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        gradient_accumulation_fusion=False,  # needs an Apex extension
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    if shape.num_experts:
        fields |= dict(
            num_moe_experts=shape.num_experts,
            moe_ffn_hidden_size=shape.expert_ffn_size,
            moe_router_topk=shape.experts_per_token,
            # softmax over all experts; or over the chosen ones, whose weights sum to 1
            moe_router_pre_softmax=not shape.is_expert_sum_one,
            moe_router_load_balancing_type="none",
            moe_router_dtype="fp32",
            moe_grouped_gemm=has_transformer_engine(),
            expert_model_parallel_size=config.parallel.expert,
            expert_tensor_parallel_size=1,
        )
    if has_transformer_engine() and config.parallel.context > 1 and dtype == torch.float32:
        raise ConfigError(
            f"parallel.context={config.parallel.context} with policy.dtype=float32: Transformer Engine has "
            "no such attention; use bfloat16"
        )
    # Megatron refuses unlike lengths for allgather, which gathers as many tokens from every rank. batch.py
    # makes them alike within a group
    fields["variable_seq_lengths"] = not Passthrough.of(config.policy.megatron).is_allgather
    try:
        made = TransformerConfig(**fields | passed)
        made.variable_seq_lengths = True  # packed microbatches differ in length
        return made
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(
            f"policy.megatron={config.policy.megatron}: Megatron refuses it: {error}"
        ) from error


def optimizer_config(config: Config, transformer: TransformerConfig) -> OptimizerConfig:
    """Raises ConfigError: Megatron refuses a passed-through field."""
    _, passed, _ = split_passthrough(config.policy.megatron)
    fields = dict(
        optimizer="adam",
        lr=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        adam_beta1=config.optim.betas[0],
        adam_beta2=config.optim.betas[1],
        clip_grad=config.optim.clip_grad,
        bf16=transformer.bf16,
        params_dtype=transformer.params_dtype,
        use_distributed_optimizer=True,
    )
    try:
        return OptimizerConfig(**fields | passed)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"policy.megatron={config.policy.megatron}: Megatron refuses it: {error}"
        ) from error


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


class HeadlessGPTModel(GPTModel):  # type: ignore[misc]
    """A GPTModel whose last stage returns hidden states [T, 1, H]: the loss takes them and the LM head, and
    logits [T, V] never exist.
    """

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states

    @property
    def head(self) -> torch.nn.Parameter:
        """The LM head [V/tp, H] on the last pipeline stage."""
        head: torch.nn.Parameter = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return head


def build_model(shape: ModelShape, config: TransformerConfig) -> list[HeadlessGPTModel]:
    """This rank's part of the model, with uninitialised weights: a chunk of layers for each virtual pipeline
    stage, or all in one.
    """
    num_chunks = config.virtual_pipeline_model_parallel_size
    return [_build_chunk(shape, config, chunk) for chunk in (range(num_chunks) if num_chunks else [None])]


def _build_chunk(shape: ModelShape, config: TransformerConfig, chunk: int | None) -> HeadlessGPTModel:
    model = HeadlessGPTModel(
        config,
        layer_spec(config, vp_stage=chunk),
        vocab_size=padded_vocab(shape, config.tensor_model_parallel_size),
        max_sequence_length=2**20,  # used by learned position embeddings only
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        vp_stage=chunk,
        parallel_output=True,  # logits stay sharded over the vocabulary
        share_embeddings_and_output_weights=shape.is_tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    )
    for name, parameter in model.named_parameters():
        # Megatron marks them where expert > 1; but tensor ranks too see other tokens each, with whole experts
        if ".mlp.experts." in name:
            parameter.allreduce = False
    # Megatron knows one kind of llama3's and another softmax for yarn's
    model.rotary_pos_emb.inv_freq = inverse_frequencies(shape)
    return model
