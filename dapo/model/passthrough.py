"""The one typed parse of policy.megatron. Its fields go to Megatron as they are, except those that something
else decides, and those that would make wrong numbers in silence: these are refused. No torch.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from dapo.config import ConfigError

_REASONS = {
    "config.json of policy.model decides it": """
        num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization
        layernorm_epsilon layernorm_zero_centered_gamma add_bias_linear add_qkv_bias qk_layernorm qk_l2_norm
        gated_linear_unit activation_func glu_linear_offset activation_func_clamp_value softmax_scale
        softmax_type attention_output_gate rotary_interleaved mrope_section no_rope_freq window_size
        window_attn_skip_freq multi_latent_attention experimental_attention_variant linear_attention_freq
        apply_residual_connection_post_layernorm is_hybrid_model heterogeneous_block_specs mtp_num_layers
        num_moe_experts moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size
        moe_shared_expert_gate moe_latent_size moe_apply_probs_on_input moe_router_topk moe_router_pre_softmax
        moe_router_score_function moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk
        moe_router_topk_limited_devices moe_router_enable_expert_bias moe_router_load_balancing_type""",
    "a token's log-prob must be the same whenever it is computed: nothing is dropped or drawn": """
        hidden_dropout attention_dropout moe_input_jitter_eps moe_token_dropping moe_token_drop_policy
        moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_router_force_load_balancing
        moe_enable_routing_replay""",
    "the objective is the paper's; Megatron would add this one times the number of tokens": """
        moe_aux_loss_coeff moe_z_loss_coeff""",
    "use parallel.tensor": "tensor_model_parallel_size",
    "it is on whenever parallel.tensor is above 1": "sequence_parallel",
    "use parallel.pipeline": "pipeline_model_parallel_size",
    "use parallel.virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "use parallel.context": """
        context_parallel_size hierarchical_context_parallel_sizes hybrid_context_parallel
        max_seqlen_per_dp_cp_rank""",
    "use parallel.expert": "expert_model_parallel_size expert_tensor_parallel_size moe_extended_tp",
    "every pipeline stage has as many layers, so that weights find their places": """
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage pipeline_model_parallel_layout
        mtp_standalone account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split""",
    "use policy.dtype; there is no loss scale": """
        params_dtype pipeline_dtype bf16 fp16 enable_autocast autocast_dtype fp32_residual_connection
        loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis""",
    "use optim.lr": "lr min_lr decoupled_lr decoupled_min_lr",
    "use optim.weight_decay": "weight_decay",
    "use optim.betas": "adam_beta1 adam_beta2",
    "use optim.clip_grad": "clip_grad",
    "it is AdamW": "optimizer decoupled_weight_decay",
    "the loss is a sum over tokens that nothing may divide, by a kernel of our own": """
        calculate_per_token_loss cross_entropy_loss_fusion cross_entropy_fusion_impl average_in_collective""",
    "gradients are summed in float32": "grad_reduce_in_fp32",
    "weight gradients are complete when the backward pass is": """
        delay_wgrad_compute defer_embedding_wgrad_compute wgrad_deferral_limit""",
    "stages may only exchange one message at a time, of any length": """
        variable_seq_lengths batch_p2p_comm batch_p2p_sync overlap_p2p_comm overlap_p2p_comm_warmup_flush
        use_ring_exchange_p2p deallocate_pipeline_outputs""",
    "microbatches come in groups of parallel.pipeline": "microbatch_group_size_per_vp_stage",
    "weights are read between updates, before they would have arrived": """
        overlap_param_gather overlap_param_gather_with_optimizer_step""",
    "use recompute_granularity": "num_microbatches_with_partial_activation_checkpoints",
    "weights are loaded, never drawn": """
        perform_initialization use_cpu_initialization init_model_with_meta_device init_method
        output_layer_init_method embedding_init_method""",
    "it is always the distributed optimizer, whose state moves between layouts": """
        use_distributed_optimizer num_distributed_optimizer_instances use_megatron_fsdp use_custom_fsdp
        data_parallel_sharding_strategy outer_dp_sharding_strategy""",
    "a checkpoint has the tensors of all layers in one, so that any layout reads it": """
        hetereogenous_dist_checkpoint""",
    "it is a function, which YAML cannot name": """
        finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func timers""",
}

REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}


@dataclass(frozen=True, config=ConfigDict(strict=True))
class Passthrough:
    """The fields of policy.megatron: those that our code reads too, with their defaults, and all of them."""

    verbatim: dict[str, Any]  # every field as it was given, for Megatron
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: list[str] | None = None
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float = 0.0
    use_precision_aware_optimizer: bool = False
    moe_token_dispatcher_type: str = "alltoall"

    @classmethod
    def of(cls, given: dict[str, Any]) -> Passthrough:
        """Parse `config.policy.megatron`; null is Megatron's default.

        Raises:
            ConfigError: a field is not the user's to set, and what to use instead; or it is of a wrong type.
        """
        for name in given:
            if name in REFUSED:
                raise ConfigError(f"policy.megatron.{name} cannot be set: {REFUSED[name]}")
        read = {name: value for name, value in given.items() if name in READ and value is not None}
        try:
            return cls(given, **read)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise ConfigError(f"policy.megatron.{name}={given[name]!r}: {first['msg'].lower()}") from None

    @property
    def is_allgather(self) -> bool:
        """True if every rank gathers all ranks' tokens for its experts: all must have equally many."""
        return self.moe_token_dispatcher_type == "allgather"

    @property
    def recomputed_together(self) -> int:
        """Number of layers that are recomputed at a time; or, with the method block, of those recomputed."""
        return self.recompute_num_layers or 1

    def recomputes(self, what: str) -> bool:
        """True if the backward pass computes it again: "full" for whole layers, or a module such as "mlp"."""
        if self.recompute_granularity == "selective":
            return what in (self.recompute_modules or ["core_attn"])
        return what == self.recompute_granularity


READ = {field.name for field in fields(Passthrough)} - {"verbatim"}  # type: ignore[arg-type]
