"""Watches where a Hugging Face model's routers send tokens, while it generates.

B = rows that go on, P = distinct prompts, L = tokens of the longest prompt, C = columns of routes
(model.routing).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dapo.model.routing import Routing


class RouteWatch:
    """A block in which the routes of all forward passes are kept."""

    def __init__(self, model: torch.nn.Module, routing: Routing):
        self.routing = routing
        found = [module for name, module in model.named_modules() if name.endswith(".experts")]
        assert len(found) == len(routing.layers), (
            f"{len(found)} layers with experts in {type(model).__name__}"
        )
        self.experts = found
        self.dtype = torch.from_numpy(np.empty(0, routing.dtype)).dtype
        self.seen: list[Tensor] = []  # [tokens, k] of each layer, in the pass that is underway

    def __enter__(self) -> RouteWatch:
        self.hooks = [experts.register_forward_pre_hook(self._note) for experts in self.experts]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def begin(self, is_real: Tensor, owner: Tensor, limit: int) -> None:
        """Keep the prompts' pass.

        `is_real`: which of the tokens fed are no padding, bool [P, L]; `owner`: the prompt of each row;
        `limit`: most tokens of a response.
        """
        self.is_real, self.owner = is_real, owner
        self.prompts = self._take().view(*is_real.shape, -1)  # [P, L, C]
        self.responses = torch.zeros(
            len(owner), limit, self.routing.num_columns, dtype=self.dtype, device=owner.device
        )

    def step(self, step: int, rows: Tensor) -> None:
        """Keep the pass of each row's response token `step`; `rows`: whose it is, [B]."""
        self.responses[rows, step] = self._take()

    def of(self, row: int, num_prompt_tokens: int, length: int) -> np.ndarray:
        """Return the routes of a row's prompt and response of `length` tokens, [p + length − 1, C]."""
        owner = self.owner[row]
        prompt = self.prompts[owner][self.is_real[owner]]
        assert len(prompt) == num_prompt_tokens
        return torch.cat([prompt, self.responses[row, : length - 1]]).cpu().numpy()

    def _note(self, experts: torch.nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        """`arguments`: hidden states, each token's experts, their weights."""
        self.seen.append(arguments[1].to(self.dtype))

    def _take(self) -> Tensor:
        """Return the last pass's routes, [tokens, C]."""
        taken, self.seen = torch.cat(self.seen, dim=-1), []
        return taken
