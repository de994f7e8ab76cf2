"""The class that a user writes. It runs in worker processes: this must not import torch, even indirectly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]  # {"role": "user", "content": "…"}: as chat templates take it


@dataclass(frozen=True)
class ToolCall:
    """A tool that the policy calls in its turn, or wanted to: then `error` says why the call is unreadable,
    and there is neither name nor arguments.
    """

    name: str
    arguments: dict[str, Any]
    error: str = ""


@dataclass(frozen=True)
class Reply:
    """The policy's turn."""

    text: str  # without the token that ends the turn
    tool_calls: list[ToolCall] = field(default_factory=list)  # if the environment has tools
    is_truncated: bool = False  # the token budget has ended in it: no other turn follows


@dataclass(frozen=True)
class Turn:
    """The environment's answer: what the policy reads next, or the end of the episode."""

    messages: list[Message] = field(default_factory=list)  # none if it is done
    is_done: bool = False
    reward: float = 0.0  # the rewards of all turns are added up
    # of the whole episode (Eq. 11); the last turn that says so decides. None in all: correct if the reward is
    # above reward.correct_above
    is_correct: bool | None = None


class Environment:
    """One episode's environment, made without arguments. Each method may be async.

    Calls that are not async run one after the other in a worker process, so one that waits for something
    should be async. Nothing may be shared between episodes.
    """

    def reset(self, row: dict[str, Any], seed: int) -> list[Message]:
        """Return the first messages. `row`: the prompt's row of the data file, all its columns.

        `seed` is the group's: its episodes begin with the same messages, so all chance must come from it.
        """
        raise NotImplementedError

    def step(self, reply: Reply) -> Turn:
        """Answer the policy's turn. An exception is no answer: the episode begins again."""
        raise NotImplementedError

    def tools(self) -> list[dict[str, Any]]:
        """Return the tools that the policy may call, as JSON schemas for the chat template."""
        return []

    def close(self) -> None:
        """Free what the episode holds."""
