"""The layouts and models that parity.py measures."""

from __future__ import annotations

from dataclasses import dataclass


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
    expert: int = 1  # ranks that share a layer's experts
    dispatcher: str = ""  # how tokens get to them; "": the default

    @property
    def name(self) -> str:
        data = self.world // (self.tensor * self.pipeline)
        extras = [
            self.model,
            "tied" if self.is_tied else "",
            f"b{self.budget}",
            self.normaliser,
            "filtered" if self.filtering else "",
            "stale" if self.stale else "",
            "overlap" if self.overlap else "",
            f"ep{self.expert}" if self.expert > 1 else "",
            self.dispatcher,
        ]
        return "-".join([f"tp{self.tensor}pp{self.pipeline}dp{data}", *filter(None, extras)])


CASES = [
    Case(1, 1, 1, "qwen2"),
    Case(1, 1, 1, "qwen2", budget=4096),
    Case(1, 1, 1, "qwen3", normaliser="group_token_mean", filtering=True),
    Case(1, 1, 1, "llama", is_tied=True, normaliser="sample_mean"),
    Case(1, 1, 1, "qwen2", stale=True),
    Case(2, 2, 1, "qwen2", is_tied=True),
    Case(2, 2, 1, "llama", normaliser="group_token_mean"),
    Case(2, 1, 2, "qwen3"),
    Case(2, 1, 2, "qwen2", is_tied=True, stale=True),
    Case(2, 1, 1, "qwen2", filtering=True),
    Case(2, 1, 1, "llama", normaliser="sample_mean"),
    Case(2, 1, 1, "qwen2", is_tied=True, budget=40, overlap=True),
    Case(2, 2, 1, "qwen3", overlap=True, stale=True, filtering=True),
    Case(4, 2, 2, "qwen3"),
    Case(4, 2, 2, "qwen2", is_tied=True, normaliser="group_token_mean"),
    Case(4, 2, 1, "qwen2", filtering=True),
    Case(4, 1, 2, "llama", budget=4096),
    Case(4, 1, 2, "qwen2", is_tied=True, budget=40, overlap=True),
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
    Case(4, 1, 1, "qwen3_moe", expert=4, is_tied=True),
    Case(4, 1, 1, "qwen3_moe-unnormalised", expert=2, budget=4096),
]
