"""Can a layout hold the model? A config is checked against the model's sizes, before anything is built."""

from __future__ import annotations

from dapo.config import Config, ConfigError, Parallel
from dapo.model.passthrough import FP8_MULTIPLES, Passthrough
from dapo.model.shape import ModelShape, max_tokens


def check_layout(shape: ModelShape, config: Config) -> None:
    """Check that the config can hold and train the model. Raise ConfigError with all that is wrong."""
    megatron = Passthrough.of(config.policy.megatron)
    checks = _divisions(shape, config.parallel, megatron) + _recompute(shape, megatron)
    checks += _offload(megatron, config.policy.dtype) + _fp8(shape, config, megatron)
    checks += _replay(shape, config, megatron) + _deterministic(shape, config, megatron)
    if wrong := [message for is_wrong, message in checks if is_wrong]:
        raise ConfigError("; ".join(wrong))


def check_length(config: Config) -> None:
    """Raise ConfigError if the model has too few positions for a prompt and its response."""
    data, rollout = config.data, config.rollout
    longest = data.max_prompt_length + rollout.max_response_length
    if (most := max_tokens(config.policy.model)) is not None and longest > most:
        options = f"data.max_prompt_length={data.max_prompt_length} + rollout.max_response_length"
        has = f"policy.model={config.policy.model} has {most} (max_position_embeddings in its config.json)"
        raise ConfigError(
            f"{options}={rollout.max_response_length} are {longest} positions, and {has}: lower one of them, "
            "or stretch the model's positions by rope_scaling there"
        )


Checks = list[tuple[bool, str]]  # whether something is wrong, and the message if it is


def _divisions(shape: ModelShape, parallel: Parallel, megatron: Passthrough) -> Checks:
    """Return a check for each of the model's numbers that an option must divide."""
    tensor, expert = f"parallel.tensor={parallel.tensor}", f"parallel.expert={parallel.expert}"
    stages, chunks = f"parallel.pipeline={parallel.pipeline}", parallel.pipeline * parallel.virtual_pipeline
    layers = "a stage's layers"
    if parallel.virtual_pipeline > 1:
        stages += f" × parallel.virtual_pipeline={parallel.virtual_pipeline}"
        layers = "a stage's chunk of layers"
    # Megatron would fail in its first forward pass
    unit = megatron.recomputed_together if megatron.recompute_method == "uniform" else 1
    # tensor ranks do not split experts, but the one that all tokens go to
    columns = 0 if shape.num_experts and not shape.num_dense_layers else shape.ffn_size
    shared, both = shape.shared_ffn_size, f"{tensor} × parallel.context={parallel.context}"
    key_heads = shape.delta.num_key_heads if shape.delta else 0
    numbers = [
        (tensor, parallel.tensor, "the model's num_attention_heads", shape.num_heads),
        (tensor, parallel.tensor, "the model's num_key_value_heads", shape.num_kv_heads),
        (tensor, parallel.tensor, "the model's intermediate_size", columns),
        (tensor, parallel.tensor, "the shared expert's intermediate size", shared),
        (both, parallel.tensor * parallel.context, "the model's linear_num_key_heads", key_heads),
        (stages, chunks, "the model's num_hidden_layers", shape.num_layers),
        (f"policy.megatron.recompute_num_layers={unit}", unit, layers, shape.num_layers // chunks),
        (expert, parallel.expert, "the model's num_experts", shape.num_experts),
    ]
    no_experts = f"{expert}, but {shape.model_type} has no experts: leave it 1"
    return [
        *[(n % by != 0, f"{option} does not divide {what}={n}") for option, by, what, n in numbers],
        (parallel.expert > 1 and not shape.num_experts, no_experts),
    ]


def _recompute(shape: ModelShape, megatron: Passthrough) -> Checks:
    """Return the checks of recomputation that Megatron lacks, or makes late."""
    modules, prefix = megatron.recompute_modules or [], "policy.megatron.recompute_modules:"
    is_complete = megatron.recompute_method in ("uniform", "block") and megatron.recompute_num_layers
    return [
        (megatron.recomputes("full") and not is_complete,
         "policy.megatron.recompute_granularity=full wants recompute_method=uniform or block, and "
         "recompute_num_layers"),
        # Megatron wants Transformer Engine for it, whose layers have no separate norm
        ("layernorm" in modules, f"{prefix} layernorm cannot be recomputed by itself; core_attn and mlp can"),
        ("mla_up_proj" in modules, f"{prefix} mla_up_proj cannot be recomputed by itself; core_attn can"),
        ("moe" in modules and not shape.num_experts,
         f"{prefix} moe, but there are no experts; the other is mlp"),
        ("mlp" in modules and shape.num_experts > 0 and not shape.num_dense_layers,
         f"{prefix} mlp recomputes nothing where every layer has experts; moe does"),
    ]  # fmt: skip


def _replay(shape: ModelShape, config: Config, megatron: Passthrough) -> Checks:
    """Return the checks of routing replay, which nothing else would notice."""
    asked = f"policy.routing_replay={config.policy.routing_replay}"
    is_replayed = config.policy.routing_replay != "off"
    from_servers = config.policy.routing_replay == "rollout"
    arguments = {name.replace("_", "-"): value for name, value in config.engine.sglang.items()}
    return [
        (is_replayed and not shape.num_experts,
         f"{asked}, but {shape.model_type} has no experts: leave it off"),
        (is_replayed and megatron.moe_router_fusion,
         f"{asked} with policy.megatron.moe_router_fusion: the fused router takes no routes; leave it out"),
        *[(from_servers and bool(arguments.get(name)),
           f"{asked} with engine.sglang.{name}: a prompt that comes back into the cache has another prompt's "
           "routes; leave it out")
          for name in ("enable-hierarchical-cache", "enable-lmcache", "enable-flexkv")],
        (from_servers and bool(arguments.get("speculative-algorithm")),
         f"{asked} with engine.sglang.speculative-algorithm: SGLang does not record its routes; leave it "
         "out"),
        (from_servers and arguments.get("enable-return-routed-experts") is False,
         f"{asked} with engine.sglang.enable-return-routed-experts=false: the run sets it; leave it out"),
    ]  # fmt: skip


def _offload(megatron: Passthrough, dtype: str) -> Checks:
    """Return the check of optimizer state in main memory: Megatron 0.19.2 resumes it in one way only."""
    wants = [
        (not megatron.use_precision_aware_optimizer,
         "policy.megatron.use_precision_aware_optimizer=true: without it no checkpoint can be loaded"),
        (megatron.optimizer_offload_fraction != 1.0,
         "policy.megatron.optimizer_offload_fraction=1.0: a part left on the GPU resumes with a wrong count "
         "of its steps"),
        (dtype != "bfloat16", "policy.dtype=bfloat16: 32-bit parameters cannot be offloaded"),
    ]  # fmt: skip
    missing = [option for is_missing, option in wants if is_missing]
    message = f"policy.megatron.optimizer_cpu_offload wants {'; '.join(missing)}"
    return [(megatron.optimizer_cpu_offload and bool(missing), message)]


def _fp8(shape: ModelShape, config: Config, megatron: Passthrough) -> Checks:
    """Return the checks of FP8, which Megatron makes at the first forward pass, or not at all."""
    if not megatron.fp8:
        return []
    recipe = f"policy.megatron.fp8_recipe={megatron.fp8_recipe}"
    multiple, tensor = FP8_MULTIPLES.get(megatron.fp8_recipe, 1), config.parallel.tensor
    heads, all_heads = shape.num_heads // tensor, (shape.num_heads + 2 * shape.num_kv_heads) // tensor
    ffn = shape.expert_ffn_size if shape.num_experts else shape.ffn_size // tensor
    sizes = {
        "columns of hidden states": shape.hidden_size,
        "columns of heads": heads * shape.head_dim,
        "columns of queries, keys and values": all_heads * shape.head_dim,
        "columns of an expert" if shape.num_experts else "columns of the MLP": ffn,
    }
    return [
        (megatron.fp8 not in ("e4m3", "hybrid"), f"policy.megatron.fp8={megatron.fp8}: use e4m3 or hybrid"),
        (megatron.fp8_recipe not in FP8_MULTIPLES,
         f"{recipe}: use one of {', '.join(FP8_MULTIPLES)}, whose scales do not depend on what was computed "
         "before, as a token's log-prob must not"),
        (config.policy.dtype != "bfloat16", "policy.megatron.fp8 wants policy.dtype=bfloat16"),
        (shape.delta is not None or shape.latent is not None,
         f"policy.megatron.fp8 is not known with the attention of {shape.model_type}: leave it out"),
        *[(n % multiple != 0, f"{recipe}: {what} on a rank, {n}, are no multiple of {multiple}")
          for what, n in sizes.items()],
    ]  # fmt: skip


def _deterministic(shape: ModelShape, config: Config, megatron: Passthrough) -> Checks:
    """Return the checks of what cannot be repeated to the bit."""
    asked = "run.deterministic=true"
    return [
        (config.run.deterministic and shape.delta is not None,
         f"{asked}: Megatron has no deterministic DeltaNet for packed sequences, as in {shape.model_type}"),
        (config.run.deterministic and bool(megatron.verbatim.get("tp_comm_overlap")),
         f"policy.megatron.tp_comm_overlap=true with {asked}: its sums come in any order; leave it out"),
    ]  # fmt: skip


def padded_vocab(shape: ModelShape, tensor: int) -> int:
    """Number of vocabulary rows, rounded up so that each tensor rank has a multiple of 16: aligned loads."""
    return -(-shape.vocab_size // (16 * tensor)) * 16 * tensor
