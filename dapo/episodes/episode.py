"""An episode that is being played: its tokens, and the sample that it becomes.

p = tokens of the first messages, n = tokens after them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from dapo.episodes.environment import Message
from dapo.types import Episode, FinishReason, Request, Sample


@dataclass(eq=False)
class Playing:
    """An episode that is being played."""

    request: Request
    number: int = -1  # of this attempt, among all attempts at all episodes
    attempt: int = 1
    turn_id: str = ""  # of the request for the turn that was last asked for
    prompt: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # [p]
    turns: list[Sample] = field(default_factory=list)  # of the policy
    asked: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # the last turn's input
    suffixes: list[np.ndarray] = field(default_factory=list)  # after each turn but the last
    messages: list[Message] = field(default_factory=list)
    counts: Episode = field(default_factory=lambda: Episode([]))
    reward: float = 0.0
    is_correct: bool | None = None
    is_wanted: bool = True  # neither aborted nor read

    @property
    def length(self) -> int:
        """Number of tokens after the prompt."""
        return sum(turn.length for turn in self.turns) + sum(map(len, self.suffixes))

    def next_input(self) -> np.ndarray:
        """Return all tokens so far, [p + n], int32: the next turn is asked for with these."""
        tokens = np.concatenate([self.prompt, *(tokens for tokens, _ in self.parts())])
        last = len(self.asked)
        assert np.array_equal(tokens[:last], self.asked), "a turn's input extends that before"
        self.asked = tokens
        return tokens

    def begin(self, number: int) -> None:
        """Forget what was played, and begin an attempt."""
        self.number = number
        self.prompt = self.asked = np.zeros(0, np.int32)
        self.turns, self.suffixes, self.messages = [], [], []
        self.reward, self.is_correct = 0.0, None
        self.counts = Episode([])

    def add(self, turn: Sample) -> None:
        """Add the policy's turn."""
        self.turns.append(turn)
        self.counts.cached.append([len(self.asked), turn.num_cached])

    def parts(self) -> Iterator[tuple[np.ndarray, Sample | None]]:
        """Yield the tokens after the prompt, by turn: the policy's with their sample, and the others."""
        for i, turn in enumerate(self.turns):
            yield turn.tokens, turn
            if i < len(self.suffixes):
                yield self.suffixes[i], None

    def sample(self, finish_reason: FinishReason, correct_above: float, text: str) -> Sample:
        """Return the episode as one sample. `text`: of the last turn."""
        parts = list(self.parts())
        masks = [np.full(len(tokens), turn is not None) for tokens, turn in parts]
        logprobs = [
            np.zeros(len(tokens), np.float32) if turn is None else turn.behavior_logprobs
            for tokens, turn in parts
        ]
        starts = np.cumsum([0, *(len(tokens) for tokens, _ in parts)]).tolist()
        versions = tuple(
            (version, start + first, start + end)
            for start, (_, turn) in zip(starts, parts, strict=False)
            for version, first, end in (turn.versions if turn else ())
        )
        is_correct = self.reward > correct_above if self.is_correct is None else self.is_correct
        return Sample(
            self.request.group,
            self.request.index,
            np.concatenate([tokens for tokens, _ in parts]),
            np.concatenate(logprobs),
            np.concatenate(masks),
            versions,
            finish_reason,
            text,
            is_correct,
            self.reward,
            routes=self._routes(),
            episode=replace(
                self.counts,
                messages=self.messages,
                num_turns=len(self.turns),
                num_attempts=self.attempt,
                prompt_tokens=self.prompt,
            ),
        )

    def _routes(self) -> np.ndarray | None:
        """Return the routes of all tokens that were fed: those of a token's first time."""
        rows: list[np.ndarray] = []
        count = 0
        for turn in self.turns:
            if turn.routes is None:
                return None
            rows.append(turn.routes[count:])
            count = len(turn.routes)
        return np.concatenate(rows)
