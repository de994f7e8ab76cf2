"""Routes: the experts that a token goes to, in every layer that has experts. No torch.

A sequence's routes are [tokens that are fed, columns]: a layer's k experts after another's, in the order of
the layers, and no column for a layer without experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dapo.config import Config
from dapo.model.families import read_shape
from dapo.model.shape import ModelShape


def sampled_routing(config: Config) -> Routing | None:
    """Return the routing of policy.model if samples have to come with their routes.

    Raises:
        ConfigError: the model's config.json cannot be used.
    """
    return Routing(read_shape(config.policy.model)) if config.policy.routing_replay == "rollout" else None


@dataclass(frozen=True)
class Routing:
    """Says which routes a model can have."""

    shape: ModelShape

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that have experts."""
        return [layer for layer in range(self.shape.num_layers) if self.shape.has_experts(layer)]

    @property
    def per_token(self) -> int:
        """Number of a token's experts in a layer, k."""
        return self.shape.experts_per_token

    @property
    def num_columns(self) -> int:
        return len(self.layers) * self.per_token

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that holds a number of an expert."""
        return np.dtype(np.uint8 if self.shape.num_experts <= 256 else np.int16)

    def columns(self, layers: Iterable[int]) -> np.ndarray:
        """Return the numbers of the columns of these layers, in their order: int64 [·]."""
        places = [self.layers.index(layer) for layer in layers if self.shape.has_experts(layer)]
        first = np.array(places, np.int64)[:, None] * self.per_token
        return (first + np.arange(self.per_token)).ravel()

    def read(self, answered: bytes, num_rows: int) -> np.ndarray:
        """Return the routes in what a server answered: int32 [rows, layers, k], of all layers.

        Raises:
            ValueError: it has another number of rows, or a row cannot be a token's route.
        """
        numbers, all_layers = np.frombuffer(answered, np.int32), (self.shape.num_layers, self.per_token)
        size = all_layers[0] * all_layers[1]
        if numbers.size != num_rows * size:
            rows = f"{numbers.size / size:g} rows of {all_layers[0]} layers and {all_layers[1]} experts"
            raise ValueError(f"routes of {rows} for {num_rows} tokens")
        routes = numbers.reshape(num_rows, *all_layers)[:, self.layers]
        if fault := self.fault(routes.reshape(num_rows, self.num_columns)):
            raise ValueError(fault)
        return routes.astype(self.dtype).reshape(num_rows, self.num_columns)

    def fault(self, routes: np.ndarray) -> str:
        """Say why routes, [rows, columns], cannot be a model's; "" if they can."""
        if routes.ndim != 2 or routes.shape[1] != self.num_columns:
            each = f"{len(self.layers)} layers × {self.per_token} experts"
            return f"routes of shape {[*routes.shape]}, where each token has {each}"
        if routes.size and not 0 <= routes.min() <= routes.max() < self.shape.num_experts:
            wrong = routes[(routes < 0) | (routes >= self.shape.num_experts)][0]
            return f"a token goes to expert {wrong}, where a layer has {self.shape.num_experts}"
        experts = routes.reshape(-1, self.per_token).T
        for i in range(1, self.per_token):
            for j in range(i):
                if (is_same := experts[i] == experts[j]).any():
                    row, place = divmod(int(is_same.argmax()), len(self.layers))
                    twice = f"twice to expert {experts[i][is_same][0]} of layer {self.layers[place]}"
                    return f"token {row} goes {twice}: nothing was recorded for it"
        return ""

    def filler(self, num_rows: int, num_columns: int) -> np.ndarray:
        """Return routes of padding, whose results nobody reads: as many tokens to each expert."""
        k = np.arange(self.per_token)
        experts = (np.arange(num_rows)[:, None] * self.per_token + k) % self.shape.num_experts
        return np.tile(experts.astype(self.dtype), num_columns // self.per_token)
