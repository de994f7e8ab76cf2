"""The layouts and models that parity.py measures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

MEGATRON: dict[str, dict[str, Any]] = {  # fields of policy.megatron, by the name part that stands for them
    "overlap": {"overlap_grad_reduce": True, "bucket_size": 20_000},
    "recompute": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
}

# options of the objective, by the name part that stands for them; the second update's ratios leave the clips
OBJECTIVES: dict[str, dict[str, Any]] = {
    "cispo": {"kind": "cispo", "clip_low": 0.02, "clip_high": 0.02, "advantage": "batch_std"},
    "gspo": {"kind": "gspo", "clip_low": 0.01, "clip_high": 0.005, "importance": "none"},
    "gspo-mask": {
        "kind": "gspo", "clip_low": 0.01, "clip_high": 0.005, "importance": "sequence_mask",
        "importance_of": "all", "importance_band": (0.5, 3.0),
    },
    "no-std": {"advantage": "no_std"},
    "band": {"importance": "band", "importance_of": "all"},
    "mask": {"importance": "sequence_mask", "importance_band": (0.5, 2.0)},
}  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """How far a policy may be from the plain model in float32."""

    logprobs: float = 1e-5
    gradients: float = 1e-5  # before clipping, relative to the norm
    largest: float = 2e-5  # of a parameter's gradient, relative to its largest value
    params: float = 2e-5  # after three updates at a learning rate of 1e-3
    mismatch: float = 1e-5  # relative
    grad_norm: float = 1e-4  # relative
    direction: float = 0.9999  # cosine of the parameters' movement in the three updates


FLOAT32 = Bounds()
# states of many tokens: Hugging Face's own two ways of them are as far apart. Rounding differs by processor:
# on a Zen 5 one case had 8.6e-6, 1.5e-5 and 4.8e-5 in the first three
FLOAT32_DELTA = Bounds(logprobs=2e-5, gradients=5e-5, largest=1e-4, params=2e-4)
# 8 bits of mantissa in every parameter and activation. Adam turns the sign of a small gradient into a whole
# step, so one parameter in thousands goes the other way: params is the bound of two runs that disagree on it
# in every update, with the rounding of a norm's weight near 1 on top; direction says how few those are.
BFLOAT16 = Bounds(
    logprobs=0.1, gradients=0.05, largest=0.5, params=1e-2, mismatch=0.02, grad_norm=0.05, direction=0.98
)
BFLOAT16_DELTA = Bounds(
    logprobs=0.2, gradients=0.1, largest=0.5, params=1e-2, mismatch=0.05, grad_norm=0.15, direction=0.95
)
# a token between two experts goes to the other one
BFLOAT16_EXPERTS = Bounds(
    logprobs=0.4, gradients=0.1, largest=1.0, params=1e-2, mismatch=0.05, grad_norm=0.1, direction=0.97
)


@dataclass(frozen=True)
class Case:
    world: int
    tensor: int
    pipeline: int
    model: str
    is_tied: bool = False
    budget: int = 64  # tokens per microbatch: several of them
    normaliser: str = "token_mean"
    filtering: bool = False
    stale: bool = False  # some tokens were written by older weights
    overlap: bool = False  # gradients are reduced while the backward pass runs
    context: int = 1
    virtual: int = 1  # chunks of layers on a pipeline stage
    layers: int = 4
    # "recompute": every layer; "block": a chunk's first; "selective": attention and MLP; "moe": router and
    # experts
    recompute: str = ""
    dtype: str = "float32"
    fault: str = ""  # a wrong gradient scale: "context factor", "token mean", "expert factor"
    expert: int = 1  # ranks that share a layer's experts
    dispatcher: str = ""  # how tokens get to them: "" is the default
    objective: str = ""  # one of OBJECTIVES, or the default
    replay: str = ""  # routes that are replayed: "rollout" or "old"

    @property
    def megatron(self) -> dict[str, Any]:
        parts = [
            MEGATRON[part]
            for part in (self.recompute, "overlap" if self.overlap else "", self.dispatcher)
            if part
        ]
        return {name: value for part in parts for name, value in part.items()}

    @property
    def bounds(self) -> Bounds:
        is_delta = self.model.startswith(("qwen3_5", "qwen3_next"))
        if self.dtype == "float32":
            return FLOAT32_DELTA if is_delta else FLOAT32
        if is_delta:
            return BFLOAT16_DELTA
        return BFLOAT16_EXPERTS if re.search(r"moe|deepseek", self.model) else BFLOAT16

    @property
    def name(self) -> str:
        data = self.world // (self.tensor * self.pipeline * self.context)
        layout = f"tp{self.tensor}cp{self.context}pp{self.pipeline}vpp{self.virtual}dp{data}"
        for part in ("cp1", "vpp1"):
            layout = layout.replace(part, "")
        extras = [
            self.model,
            "tied" if self.is_tied else "",
            "" if self.dtype == "float32" else self.dtype,
            f"b{self.budget}",
            self.normaliser,
            self.objective,
            "filtered" if self.filtering else "",
            "stale" if self.stale else "",
            "overlap" if self.overlap else "",
            self.recompute,
            f"{self.layers}layers" if self.layers != 4 else "",
            f"ep{self.expert}" if self.expert > 1 else "",
            self.dispatcher,
            f"replay-{self.replay}" if self.replay else "",
            self.fault.replace(" ", "-"),
        ]
        return "-".join([layout, *filter(None, extras)])


CASES = [
    Case(1, 1, 1, "qwen2"),
    Case(1, 1, 1, "qwen2", budget=4096),
    Case(1, 1, 1, "qwen3", normaliser="group_token_mean", filtering=True),
    Case(1, 1, 1, "llama", is_tied=True, normaliser="sample_mean"),
    Case(1, 1, 1, "qwen2", stale=True),
    Case(1, 1, 1, "llama3"),
    Case(1, 1, 1, "mistral"),
    Case(1, 1, 1, "qwen3", recompute="recompute"),
    Case(1, 1, 1, "llama", recompute="selective"),
    Case(1, 1, 1, "qwen2", dtype="bfloat16"),
    Case(2, 2, 1, "qwen2", is_tied=True),
    Case(2, 2, 1, "llama", normaliser="group_token_mean"),
    Case(2, 2, 1, "qwen2", recompute="recompute"),
    Case(2, 2, 1, "qwen3", dtype="bfloat16"),
    Case(2, 1, 2, "qwen3"),
    Case(2, 1, 2, "qwen2", is_tied=True, stale=True),
    Case(2, 1, 1, "qwen2", filtering=True),
    Case(2, 1, 1, "llama", normaliser="sample_mean"),
    Case(2, 1, 1, "qwen2", is_tied=True, budget=40, overlap=True),
    Case(2, 2, 1, "qwen3", overlap=True, stale=True, filtering=True),
    Case(2, 2, 1, "qwen3-yarn"),
    Case(2, 1, 1, "qwen2", context=2),
    Case(2, 1, 1, "qwen3-yarn", context=2, budget=4096, stale=True, filtering=True),
    Case(
        2,
        1,
        1,
        "llama",
        context=2,
        is_tied=True,
        normaliser="sample_mean",
        overlap=True,
        recompute="selective",
    ),
    Case(2, 1, 2, "qwen2", virtual=2, budget=32),
    Case(
        2, 1, 2, "qwen3", virtual=2, budget=40, is_tied=True, stale=True, overlap=True, recompute="recompute"
    ),
    Case(2, 1, 2, "llama3", virtual=2, budget=4096),
    Case(4, 2, 2, "qwen3"),
    Case(4, 2, 1, "qwen3", context=2, recompute="recompute"),
    Case(4, 1, 1, "qwen3", context=4, normaliser="group_token_mean"),
    Case(4, 2, 2, "qwen3", virtual=2, is_tied=True, budget=32),
    Case(4, 1, 2, "qwen2", context=2, virtual=2, budget=40),
    Case(4, 2, 1, "qwen2", context=2, is_tied=True, dtype="bfloat16"),
    Case(4, 1, 4, "qwen2", is_tied=True, budget=40),  # stages in the middle
    Case(4, 1, 4, "qwen3", virtual=2, layers=8, budget=32, overlap=True),
    Case(4, 1, 2, "llama", virtual=2, layers=8, budget=40, recompute="block"),
]

LAYER_FAULTS = [
    Case(1, 1, 1, "qwen3_5_text", fault="swapped gate"),
    Case(2, 2, 1, "deepseek_v3", fault="heads not summed"),
    Case(2, 2, 1, "qwen3_5_text", fault="norm not summed"),
]

CASES += [  # other objectives, in every split
    Case(1, 1, 1, "qwen2", objective="cispo", normaliser="group_token_mean"),
    Case(1, 1, 1, "qwen3", objective="gspo", normaliser="sample_mean", stale=True),
    Case(1, 1, 1, "llama", objective="no-std", normaliser="constant"),
    Case(2, 2, 1, "qwen2", objective="cispo", filtering=True),
    Case(2, 2, 1, "qwen3", objective="gspo", normaliser="sample_mean"),
    Case(2, 1, 1, "qwen2", context=2, objective="gspo", normaliser="token_mean", stale=True),
    Case(2, 1, 1, "qwen3", context=2, objective="gspo-mask", normaliser="sample_mean", stale=True),
    Case(2, 1, 1, "llama", objective="gspo", normaliser="group_token_mean", filtering=True),
    Case(2, 1, 1, "qwen2", objective="no-std", normaliser="constant", filtering=True),
    Case(2, 1, 1, "qwen2", context=2, objective="band"),
    Case(2, 1, 2, "qwen3", objective="mask", stale=True),
    Case(2, 1, 1, "qwen2", context=2, objective="mask", stale=True),
    Case(4, 2, 1, "qwen2", context=2, objective="gspo-mask", normaliser="sample_mean", stale=True),
    Case(4, 1, 2, "qwen3", context=2, objective="cispo", normaliser="constant", stale=True),
    Case(4, 2, 2, "llama", objective="gspo", normaliser="sample_mean"),
]

FAULTS = [
    Case(2, 1, 1, "qwen2", context=2, fault="context factor"),
    Case(2, 1, 1, "qwen2", context=2, fault="token mean"),
    Case(2, 2, 1, "qwen3_moe", expert=2, fault="expert factor"),
]


def layouts(model: str, expert: int = 1) -> list[Case]:
    """Twelve layouts of one model. `expert`: ranks that share its experts, where there are so many."""
    two, four = min(expert, 2), expert
    return [
        Case(1, 1, 1, model, stale=True),
        Case(4, 2, 1, model, context=2, expert=four, recompute="recompute", budget=256),
        Case(2, 1, 1, model, context=2, budget=4096),
        Case(2, 1, 2, model, budget=96),
        Case(2, 2, 1, model, expert=two, recompute="moe" if expert > 1 else "selective", budget=96),
        Case(4, 2, 2, model, virtual=2, budget=96, is_tied=True, overlap=True),
        Case(1, 1, 1, model, recompute="recompute", budget=4096),
        Case(2, 2, 1, model, expert=two, stale=True, budget=96),
        Case(2, 1, 1, model, expert=two, overlap=True, normaliser="sample_mean"),
        Case(2, 1, 1, model, expert=two, dispatcher="allgather" if expert > 1 else "", budget=40),
        Case(4, 2, 2, model, expert=two, normaliser="group_token_mean", budget=96),
        Case(4, 1, 2, model, context=2, expert=two, is_tied=True, stale=True, budget=96),
    ]


NEW = {"deepseek_v3": 4, "qwen3_5_moe_text": 4, "qwen3_5_text": 1, "qwen3_next": 4, "glm4_moe_lite": 4}
ALL_LAYOUTS = [case for model, expert in NEW.items() for case in layouts(model, expert)]
# half of them here; benchmarks/model_parity.py measures all
CASES += [case for model, expert in NEW.items() for case in layouts(model, expert)[:6]]
CASES += [
    Case(2, 2, 1, "deepseek_v3-alike"),  # all layers have experts
    Case(2, 2, 1, "deepseek_v3", dtype="bfloat16"),
    Case(2, 2, 1, "qwen3_5_text", dtype="bfloat16"),
]

CASES += [  # mixture of experts
    Case(1, 1, 1, "qwen3_moe"),
    Case(1, 1, 1, "qwen3_moe-unnormalised", stale=True),
    Case(2, 1, 1, "qwen3_moe", expert=2),
    Case(2, 1, 1, "qwen3_moe-unnormalised", expert=2, dispatcher="allgather"),
    Case(2, 2, 1, "qwen3_moe", is_tied=True),  # experts whole on every rank, which sees a part of the tokens
    Case(2, 2, 1, "qwen3_moe", expert=2, budget=40),
    Case(4, 2, 1, "qwen3_moe", expert=2, overlap=True),  # over the tensor ranks, twice
    Case(4, 2, 1, "qwen3_moe-unnormalised", expert=4, dispatcher="allgather"),
    Case(4, 1, 2, "qwen3_moe", expert=2),
    Case(4, 1, 2, "qwen3_moe", expert=2, dispatcher="allgather", budget=40),
    Case(4, 1, 1, "qwen3_moe", context=2, expert=4, recompute="moe"),
    Case(4, 1, 2, "qwen3_moe", virtual=2, expert=2, budget=40),
    Case(2, 2, 1, "qwen3_moe", expert=2, dtype="bfloat16"),
    Case(4, 1, 1, "qwen3_moe-unnormalised", context=2, expert=2, dispatcher="allgather", budget=40),
]

CASES += [  # routes are told
    Case(1, 1, 1, "qwen3_moe", replay="rollout", recompute="recompute"),
    Case(1, 1, 1, "qwen3_moe-unnormalised", replay="old", stale=True),
    Case(2, 2, 1, "qwen3_moe", replay="rollout", stale=True),
    Case(2, 2, 1, "qwen3_moe", expert=2, replay="rollout", recompute="moe"),
    Case(2, 1, 2, "qwen3_moe", replay="rollout", recompute="recompute", budget=40),
    Case(2, 1, 2, "qwen3_moe", virtual=2, replay="rollout", recompute="block", budget=40),
    Case(2, 1, 1, "qwen3_moe", context=2, replay="rollout"),
    Case(2, 1, 1, "qwen3_moe", expert=2, replay="rollout", dispatcher="allgather", budget=40),
    Case(2, 1, 2, "qwen3_moe", replay="old", recompute="recompute", budget=40),
    Case(2, 2, 1, "deepseek_v3", expert=2, replay="rollout", budget=96),
    Case(2, 1, 2, "deepseek_v3", replay="old", budget=96),  # the first stage has a layer without experts
    Case(2, 1, 1, "qwen3_next", expert=2, replay="rollout", overlap=True),
    Case(4, 2, 2, "qwen3_moe", virtual=2, expert=2, replay="rollout", recompute="recompute", budget=40),
    Case(4, 2, 1, "deepseek_v3", context=2, expert=4, replay="rollout", recompute="recompute", budget=256),
]

ROUTE_FAULTS = [
    Case(1, 1, 1, "qwen3_moe", replay="rollout", recompute="recompute", fault="wrong expert"),
    Case(1, 1, 1, "qwen3_moe", replay="rollout", recompute="recompute", fault="another microbatch"),
    Case(2, 1, 2, "qwen3_moe", replay="rollout", recompute="recompute", budget=40, fault="left at forward"),
]

# alike others here: to be measured by a pattern in their name
MORE = [
    Case(1, 1, 1, "qwen3_moe", replay="rollout"),
    Case(2, 2, 1, "qwen3_moe", replay="rollout", recompute="recompute"),
    Case(2, 1, 2, "qwen3_moe", replay="rollout", budget=40),
    Case(2, 1, 1, "qwen3_moe", expert=2, replay="rollout"),
    Case(4, 2, 2, "qwen2", is_tied=True, normaliser="group_token_mean"),
    Case(4, 2, 1, "qwen2", filtering=True),
    Case(4, 2, 2, "mistral"),
    Case(4, 1, 2, "llama", budget=4096),
    Case(4, 1, 2, "qwen2", is_tied=True, budget=40, overlap=True),
    Case(4, 1, 2, "qwen2", context=2, is_tied=True),
    Case(4, 1, 1, "qwen2", context=2, overlap=True, stale=True),
    Case(4, 1, 2, "llama", virtual=2, budget=40, overlap=True),
    Case(4, 1, 1, "qwen3_moe", expert=4, is_tied=True),
    Case(4, 1, 1, "qwen3_moe-unnormalised", expert=2, budget=4096),
    Case(4, 2, 1, "qwen3_moe", context=2, expert=2),
]
