"""Megatron's TransformerConfig, OptimizerConfig and GPTModel, from a model's sizes and a run's config."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from pydantic import TypeAdapter, ValidationError

from dapo.config import Config, ConfigError, nearest
from dapo.model.families import FAMILIES
from dapo.model.layout import check_layout, padded_vocab
from dapo.model.passthrough import Passthrough
from dapo.model.shape import ModelShape
from dapo.policy.cpu import has_transformer_engine
from dapo.policy.rope import PackedRotary, inverse_frequencies, softmax_scale
from dapo.policy.specs import layer_spec
from dapo.types import reason

PLAIN = (bool, int, float, str)  # types of Megatron's fields that are checked here


def split_passthrough(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Split policy.megatron into (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig) fields.

    A name that several have goes to each. Raise ConfigError if none of them has such a field, or if it has
    another type: Megatron would take "no" for true.
    """
    classes = TransformerConfig, OptimizerConfig, DistributedDataParallelConfig
    owners: list[dict[str, Any]] = [
        {field.name: field.type for field in dataclasses.fields(c)} for c in classes
    ]
    known = owners[0] | owners[1] | owners[2]
    for name, value in options.items():
        if name not in known:
            hint = nearest(name, sorted(known))
            raise ConfigError(f"policy.megatron.{name}: no such field in Megatron's configs; {hint}")
        if value is None or not set(get_args(known[name]) or (known[name],)) <= {*PLAIN, type(None)}:
            continue
        try:
            TypeAdapter(known[name]).validate_python(value, strict=True)
        except ValidationError as error:
            wrong = error.errors()[0]["msg"].lower()
            raise ConfigError(f"policy.megatron.{name}={value!r}: {wrong}") from None
    transformer, optimizer, ddp = ({k: v for k, v in options.items() if k in fields} for fields in owners)
    return transformer, optimizer, ddp


def transformer_config(shape: ModelShape, config: Config) -> TransformerConfig:
    """Make Megatron's description of model and layout. Raise ConfigError if either is refused."""
    check_layout(shape, config)
    parallel, passed = config.parallel, split_passthrough(config.policy.megatron)[0]
    dtype, virtual = getattr(torch, config.policy.dtype), parallel.virtual_pipeline
    fields = dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        transformer_impl="transformer_engine" if has_transformer_engine() else "local",
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        softmax_scale=softmax_scale(shape),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.tensor > 1,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # the loss is a sum over tokens: Megatron must divide by nothing
        # Megatron refuses unlike lengths for allgather, which gathers as many tokens from every rank;
        # learn/batch.py makes them alike. It refuses them without alltoall even for dense models
        variable_seq_lengths=not Passthrough.of(config.policy.megatron).is_allgather,
        moe_token_dispatcher_type="alltoall",
        # between two stages that take turns, batched sends in both directions are swapped
        batch_p2p_comm=False,
        overlap_p2p_comm=False,
        use_cpu_initialization=not torch.cuda.is_available(),
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
        deterministic_mode=config.run.deterministic,
        # with latent attention Megatron has a fused kernel for its own yarn only
        apply_rope_fusion=has_transformer_engine() and not shape.latent,
        persist_layer_norm=False,
    )
    fields |= FAMILIES[shape.model_type].megatron(shape)
    if shape.num_experts:
        fields |= dict(
            moe_grouped_gemm=has_transformer_engine(),
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1,
        )
    if has_transformer_engine() and parallel.context > 1 and dtype == torch.float32:
        both = f"parallel.context={parallel.context} with policy.dtype=float32"
        raise ConfigError(f"{both}: Transformer Engine has no such attention; use bfloat16")
    cls = MLATransformerConfig if shape.latent else TransformerConfig
    made: TransformerConfig = _make(cls, fields | passed, config)
    made.variable_seq_lengths = True  # packed microbatches differ in length
    if made.fp8:
        _check_fp8(made)
    return made


def _check_fp8(config: TransformerConfig) -> None:
    """Raise ConfigError if this machine cannot compute in FP8: Megatron would not, or fail later."""
    asked = f"policy.megatron.fp8={config.fp8} with fp8_recipe={config.fp8_recipe}"
    if not has_transformer_engine():
        raise ConfigError(
            f"{asked} wants a GPU and Transformer Engine's layers: install it, or leave fp8 out"
        )
    try:
        with get_fp8_context(config):
            pass
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{asked}: Transformer Engine refuses it: {reason(error)}") from error


def _make(cls: type, fields: dict[str, Any], config: Config) -> Any:
    """Make one of Megatron's configs. Raise ConfigError if it refuses a passed-through field."""
    try:
        return cls(**fields)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        message = f"policy.megatron={config.policy.megatron}: Megatron refuses it: {error}"
        raise ConfigError(message) from error


def optimizer_config(config: Config, transformer: TransformerConfig) -> OptimizerConfig:
    """Make Megatron's description of the optimizer. Raise ConfigError if it refuses a field."""
    passed = split_passthrough(config.policy.megatron)[1]
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
    return _make(OptimizerConfig, fields | passed, config)


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


class HeadlessGPTModel(GPTModel):  # type: ignore[misc]
    """A GPTModel whose last stage returns hidden states [T, 1, H] for the loss: logits [T, V] never exist."""

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states

    @property
    def head(self) -> torch.nn.Parameter:
        """The LM head [V/tp, H] on the last pipeline stage."""
        is_tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if is_tied else self.output_layer.weight  # type: ignore[no-any-return]


def build_model(shape: ModelShape, config: TransformerConfig) -> list[HeadlessGPTModel]:
    """Build this rank's part of the model, not initialised: a chunk for each virtual pipeline stage."""
    num_chunks = config.virtual_pipeline_model_parallel_size
    return [_build_chunk(shape, config, chunk) for chunk in (range(num_chunks) if num_chunks else [None])]


def _build_chunk(shape: ModelShape, config: TransformerConfig, chunk: int | None) -> HeadlessGPTModel:
    model = HeadlessGPTModel(
        config,
        layer_spec(shape, config, vp_stage=chunk),
        vocab_size=padded_vocab(shape, config.tensor_model_parallel_size),
        max_sequence_length=2**20,  # used by learned position embeddings only
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        vp_stage=chunk,
        parallel_output=True,  # logits stay sharded over the vocabulary
        share_embeddings_and_output_weights=shape.is_tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        rotary_percent=shape.num_rotated / shape.head_dim,
    )
    for name, parameter in model.named_parameters():
        # Megatron marks them where expert > 1; but tensor ranks, too, have whole experts and their own tokens
        if ".mlp.experts." in name:
            parameter.allreduce = False
    # latent attention has an embedding in each layer
    owners = [layer.self_attention for layer in model.decoder.layers] if shape.latent else [model]
    plain = PackedRotary(inverse_frequencies(shape), config.params_dtype)
    for owner in owners:
        # Megatron computes one kind of llama3's only, and another softmax for yarn's
        owner.rotary_pos_emb.inv_freq = inverse_frequencies(shape)
        if not has_transformer_engine():
            owner.rotary_pos_emb = plain
    return model
