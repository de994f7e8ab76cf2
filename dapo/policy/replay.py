"""Routing replay: tokens go to the experts that they went to before, when they were sampled or scored
(arXiv:2510.11370). The router's weights of those experts are computed anew, so it learns as always.

T/tp = tokens of a microbatch on a rank, k = experts of a token, E = experts, C = columns of routes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from dapo.learn.batch import Microbatch
from dapo.model.passthrough import Passthrough
from dapo.model.routing import Routing

Source = Literal["router", "record", "replay"]  # of a pass: the router chooses; it is kept; it was given
TopK = Callable[..., tuple[Tensor, Tensor]]


class Replay:
    """Chooses the experts of tokens for one router: Megatron's calls `get_replay_topk`.

    With recomputation the backward pass runs the router a second time, and has to get the same routes:
    microbatches come back in the order of their forward passes.
    """

    def __init__(self) -> None:
        self.source: Source = "router"
        self.rows = torch.empty(0)  # [T/tp, k], of the forward pass that is underway: replayed, or to be kept
        self.is_counted: Tensor | None = None  # [T/tp]: tokens whose own experts are compared
        self.is_forward = False
        self.later: deque[Tensor] = deque()  # rows of the forward passes that may be computed again
        self.num_other: Tensor | int = 0  # of the counted tokens: those that the router would send elsewhere

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the scores and the numbers of each token's experts, [T/tp, k]; `scores`: [T/tp, E]."""
        assert default_compute_topk
        if self.source != "replay":
            chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
            if self.source == "record" and self.is_forward:
                self.rows.copy_(chosen[1])
            return chosen
        given = (self.rows if self.is_forward else self.later.popleft()).long()
        assert given.shape == (len(scores), topk), f"routes {[*given.shape]} for scores {[*scores.shape]}"
        if self.is_forward and self.is_counted is not None:
            own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)[1]
            differs = (own.sort(-1).values != given.sort(-1).values).any(-1)
            self.num_other = self.num_other + (differs & self.is_counted).sum()
        return scores.gather(1, given), given


class Routes:
    """The routers of this rank's part of the model, by chunk; none if nothing is replayed."""

    def __init__(
        self, chunks: Sequence[Any], routing: Routing, sequence_parallel: bool, megatron: Passthrough
    ):
        """Take over the routers of `chunks`: their models."""
        self.routing = routing
        self.tensor_rank, self.tensor = 0, 1
        if sequence_parallel:
            self.tensor_rank = parallel_state.get_tensor_model_parallel_rank()
            self.tensor = parallel_state.get_tensor_model_parallel_world_size()
        # True if each layer's router runs again in the backward pass
        self.is_recomputed = megatron.recomputes("moe") or (
            megatron.recomputes("full") and megatron.recompute_method == "uniform"
        )
        self.layers: list[int] = []  # of the model, in the order of a microbatch's columns
        self.chunks: list[list[Replay]] = []
        for chunk in chunks:
            routers = [
                (layer.layer_number - 1, layer.mlp.router)
                for layer in chunk.decoder.layers
                if hasattr(layer.mlp, "router")
            ]
            for _, router in routers:
                router.router_replay = Replay()
            self.layers += [number for number, _ in routers]
            self.chunks.append([router.router_replay for _, router in routers])

    @property
    def num_columns(self) -> int:
        return len(self.layers) * self.routing.per_token

    def own(self, routes: np.ndarray) -> np.ndarray:
        """Return this tensor rank's rows of routes, [T, C]: sequence parallelism gives it one stretch."""
        return np.array_split(routes, self.tensor)[self.tensor_rank]

    def blank(self, microbatch: Microbatch[Tensor]) -> Tensor:
        """Make room for the routes of a microbatch, [T/tp, C], on its device."""
        dtype = torch.from_numpy(np.empty(0, self.routing.dtype)).dtype
        num_rows = len(microbatch.tokens) // self.tensor
        return torch.zeros(num_rows, self.num_columns, dtype=dtype, device=microbatch.tokens.device)

    @contextmanager
    def replayed(
        self, source: Source, is_counted: bool = False, has_backward: bool = False
    ) -> Iterator[None]:
        """A block in which passes get their routes from `source`.

        `is_counted`: compare them with the routers' own; `has_backward`: gradients are computed, perhaps with
        recomputation.
        """
        replays = [replay for chunk in self.chunks for replay in chunk]
        for replay in replays:
            replay.source = source
        self._is_counted, self._has_backward = is_counted, has_backward and source == "replay"
        yield
        left = {len(replay.later) for replay in replays}
        assert not (self._has_backward and self.is_recomputed and any(left)), (
            f"{left} routes were not asked for"
        )
        for replay in replays:
            replay.source = "router"
            replay.later.clear()

    @contextmanager
    def forward(self, chunk: int, microbatch: Microbatch[Tensor]) -> Iterator[None]:
        """A block in which the chunk's forward pass of a microbatch runs."""
        k, replays = self.routing.per_token, self.chunks[chunk]
        place = sum(map(len, self.chunks[:chunk]))
        for i, replay in enumerate(replays, place):
            if replay.source == "router":
                continue
            assert microbatch.routes is not None
            replay.rows = microbatch.routes[:, i * k : (i + 1) * k]
            replay.is_forward = True
            replay.is_counted = None
            if self._is_counted:
                of_current = microbatch.loss_mask & ~microbatch.is_stale
                replay.is_counted = of_current.chunk(self.tensor)[self.tensor_rank]
            if self._has_backward:
                replay.later.append(replay.rows)
        yield
        for replay in replays:
            replay.is_forward = False  # a router that runs from here on belongs to a backward pass

    def take_others(self) -> dict[int, float]:
        """Return, by number of a layer of this stage, how many counted tokens' own experts were others."""
        replays = [replay for chunk in self.chunks for replay in chunk]
        found = {layer: float(replay.num_other) for layer, replay in zip(self.layers, replays, strict=True)}
        for replay in replays:
            replay.num_other = 0
        return found
