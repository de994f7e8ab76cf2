"""A Hugging Face config.json → Megatron's TransformerConfig and GPTModel. What is not understood is refused by name."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from dapo.config import Config, ConfigError, nearest
from dapo.policy.layers import layer_spec

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}

# config.json fields that become part of the model below
USED = {
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_parameters",
}  # fmt: skip
# fields that do not change what the model computes here
IGNORED = {
    "_name_or_path", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "max_position_embeddings",
    "max_window_layers", "pad_token_id", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
# fields understood at one value only
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "rope_scaling": (None,),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "pretraining_tp": (1,),
}


@dataclass(frozen=True)
class ModelShape:
    """What config.json says, in one vocabulary for all architectures."""

    model_type: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    is_tied: bool

    @property
    def has_qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def has_qk_norm(self) -> bool:
        return self.model_type == "qwen3"


def read_shape(directory: Path) -> ModelShape:
    """Raises ConfigError: no config.json, an unknown architecture, or a field that is not understood."""
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"policy.model={directory}: no config.json there; expected a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if raw.get("model_type") not in ARCHITECTURES:
        raise ConfigError(f"{path}: model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    for name, value in raw.items():
        _check_field(path, name, value)

    config = transformers.AutoConfig.from_pretrained(directory)  # fills in each architecture's defaults
    return ModelShape(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        ffn_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
        is_tied=config.tie_word_embeddings,
    )


def _check_field(path: Path, name: str, value: Any) -> None:
    if name in USED | IGNORED:
        if name == "rope_parameters" and (value.get("rope_type", "default") != "default" or set(value) - {"rope_type", "rope_theta"}):
            raise ConfigError(f"{path}: rope_parameters={value} is not supported; supported: rope_type default")
        return
    if name == "layer_types":
        if set(value) != {"full_attention"}:
            raise ConfigError(f"{path}: layer_types {sorted(set(value))} are not supported; supported: full_attention")
    elif name == "sliding_window":
        pass  # in force only with use_sliding_window, which is checked
    elif name not in FIXED:
        raise ConfigError(
            f"{path}: field {name!r} is not understood, so the model might be computed wrongly; remove it if it has no effect"
        )
    elif value not in FIXED[name]:
        raise ConfigError(f"{path}: {name}={value!r} is not supported; supported: {FIXED[name][0]!r}")


def split_passthrough(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """policy.megatron's fields for (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig); a shared name goes to each.

    Raises:
        ConfigError: none of the three has such a field.
    """
    owners = [{f.name for f in dataclasses.fields(c)} for c in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)]
    for name in options:
        if not any(name in fields for fields in owners):
            raise ConfigError(f"policy.megatron.{name}: no such field in Megatron's configs; {nearest(name, sorted(set().union(*owners)))}")
    transformer, optimizer, ddp = ({k: v for k, v in options.items() if k in fields} for fields in owners)
    return transformer, optimizer, ddp


def transformer_config(shape: ModelShape, config: Config) -> TransformerConfig:
    """Raises ConfigError: heads, KV heads or layers do not divide by the layout, or Megatron refuses a passed-through field."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    for what, number, by in (
        ("num_attention_heads", shape.num_heads, tensor),
        ("num_key_value_heads", shape.num_kv_heads, tensor),
        ("intermediate_size", shape.ffn_size, tensor),
    ):
        if number % by:
            raise ConfigError(f"parallel.tensor={by} does not divide the model's {what}={number}")
    if shape.num_layers % pipeline:
        raise ConfigError(f"parallel.pipeline={pipeline} does not divide the model's num_hidden_layers={shape.num_layers}")
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
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # the loss is a sum over tokens: Megatron must divide by nothing
        variable_seq_lengths=True,  # packed microbatches differ in length
        moe_token_dispatcher_type="alltoall",  # what variable_seq_lengths insists on, dense models included
        batch_p2p_comm=False,
        use_cpu_initialization=not has_cuda,
        # the weights are loaded; but Megatron marks a parameter as tensor-parallel while it initialises it, and unmarked ones are missing
        # from the gradient norm: so initialise, with functions that do nothing
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
    try:
        return TransformerConfig(**fields | passed)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"policy.megatron={config.policy.megatron}: Megatron refuses it: {error}") from error


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def padded_vocab(shape: ModelShape, tensor: int) -> int:
    """The vocabulary rounded up so that each tensor rank's shard is a multiple of 16, which keeps its loads aligned."""
    return -(-shape.vocab_size // (16 * tensor)) * 16 * tensor


class HeadlessGPTModel(GPTModel):  # type: ignore[misc]
    """A GPTModel whose last stage returns hidden states [T, 1, H]: the loss takes them and the LM head, and logits [T, V] never exist."""

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states

    @property
    def head(self) -> torch.nn.Parameter:
        """The LM head [V/tp, H] on the last pipeline stage."""
        head: torch.nn.Parameter = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        )
        return head


def build_model(shape: ModelShape, config: TransformerConfig) -> HeadlessGPTModel:
    """This rank's part of the model, with uninitialised weights."""
    return HeadlessGPTModel(
        config,
        layer_spec(config),
        vocab_size=padded_vocab(shape, config.tensor_model_parallel_size),
        max_sequence_length=2**20,  # used by learned position embeddings only
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,  # logits stay sharded over the vocabulary
        share_embeddings_and_output_weights=shape.is_tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    )
