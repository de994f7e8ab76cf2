"""Layers with a mixture of experts, as several families have them: sizes, Megatron's fields, entries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapo.config import ConfigError
from dapo.model.entries import Entry
from dapo.model.families.family import gated, of_layer
from dapo.model.shape import ModelShape, read_sizes

# ModelShape's names of the sizes
SIZES = ("num_experts", "experts_per_token", "expert_ffn_size")
# of a training loss that is not ours
OF_THE_LOSS = frozenset({"router_aux_loss_coef", "output_router_logits", "aux_loss_alpha", "seq_aux"})


def read_experts(path: Path, raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return ModelShape's SIZES. `names`: those in config.json of each; transformers 5 also writes the number
    of experts as num_local_experts.

    Raises:
        ConfigError: one is missing or impossible, or is given twice with two values.
    """
    count = next(name for name, ours in names.items() if ours == "num_experts")
    raw = {count: raw.get("num_local_experts"), **raw}
    if raw[count] != raw.get("num_local_experts", raw[count]):
        both = f"{count}={raw[count]}, num_local_experts={raw['num_local_experts']}"
        raise ConfigError(f"{path}: {both}: remove the wrong one")
    sizes = read_sizes(path, raw, names)
    if sizes["experts_per_token"] > sizes["num_experts"]:
        message = f"num_experts_per_tok={sizes['experts_per_token']} of {count}={sizes['num_experts']}"
        raise ConfigError(f"{path}: {message}")
    return sizes


def check_router(path: Path, per_token: int, is_sum_one: bool) -> None:
    """Raise ConfigError if a softmax router's weights say nothing."""
    if is_sum_one and per_token == 1:
        both = "norm_topk_prob=True with num_experts_per_tok=1"
        raise ConfigError(f"{path}: {both}: every expert weighs 1, so the router never learns")


def megatron(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig that say what experts a model has."""
    fields: dict[str, Any] = {
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.expert_ffn_size,
        "moe_router_topk": shape.experts_per_token,
        # softmax over all experts; or over the chosen ones, whose weights sum to 1
        "moe_router_pre_softmax": not shape.is_expert_sum_one,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
    }
    if shape.shared_ffn_size:
        fields |= {
            "moe_shared_expert_intermediate_size": shape.shared_ffn_size,
            "moe_shared_expert_gate": shape.is_shared_gated,
        }
    if shape.num_dense_layers:
        fields["moe_layer_freq"] = [int(shape.has_experts(layer)) for layer in range(shape.num_layers)]
    if router := shape.sigmoid_router:
        fields |= {
            "moe_router_pre_softmax": False,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,  # Megatron would move it to balance the experts
            "moe_router_topk_scaling_factor": router.scale,
        }
        if router.num_groups > 1:
            fields["moe_router_num_groups"] = router.num_groups
            fields["moe_router_group_topk"] = router.groups_per_token
    return fields


def entries(shape: ModelShape, number: int, shared: str) -> list[Entry]:
    """Return the entries of a layer's router and experts, the norm before them included.

    The norm stands by itself, also in Transformer Engine's layers. `shared`: Hugging Face's name of the
    expert that all tokens go to.
    """
    hidden = shape.hidden_size
    norm = {"post_attention_layernorm.weight": (hidden,)}
    router = {"mlp.gate.weight": (shape.num_experts, hidden)}
    found = [
        of_layer(number, "pre_mlp_layernorm.weight", "whole", norm),
        of_layer(number, "mlp.router.weight", "whole", router),
    ]
    if shape.sigmoid_router:
        bias = {"mlp.gate.e_score_correction_bias": (shape.num_experts,)}
        found.append(of_layer(number, "mlp.router.expert_bias", "whole", bias, is_buffer=True))
    for expert in range(shape.num_experts):
        names = "mlp.experts.experts.", f"mlp.experts.{expert}."
        found += gated(number, hidden, shape.expert_ffn_size, *names, expert)
    if shape.shared_ffn_size:
        found += gated(number, hidden, shape.shared_ffn_size, "mlp.shared_experts.", f"mlp.{shared}.")
    if shape.is_shared_gated:
        gate = {f"mlp.{shared}_gate.weight": (1, hidden)}
        found.append(of_layer(number, "mlp.shared_experts.gate_weight", "whole", gate))
    return found
