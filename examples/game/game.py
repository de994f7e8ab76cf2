"""The game: guess a number, with "higher" or "lower" after each guess. It runs in worker processes."""

from __future__ import annotations

from typing import Any

from dapo.episodes import Environment, Message, Reply, Turn

GUESSES = 5  # enough for 1 … 31, if each guess halves what is left


def user(content: str) -> Message:
    return {"role": "user", "content": content}


class GuessNumber(Environment):
    """Rows are {"highest": 31, "secret": 16}. An episode is correct if the secret is guessed in time."""

    def reset(self, row: dict[str, Any], seed: int) -> list[Message]:
        """Ask for a number. `seed` has no use here: the row decides everything."""
        self.highest, self.secret = row["highest"], row["secret"]
        self.guesses_left = GUESSES
        return [user(f"Guess my number from 1 to {self.highest}.")]

    def step(self, reply: Reply) -> Turn:
        self.guesses_left -= 1
        guess = int(reply.text) if reply.text.isdecimal() and len(reply.text) <= 9 else 0
        if guess == self.secret:
            return Turn(is_done=True, reward=1.0, is_correct=True)
        if not self.guesses_left:
            return Turn(is_done=True, reward=-1.0, is_correct=False)
        if not 1 <= guess <= self.highest:
            return Turn([user("no")])
        return Turn([user("higher" if self.secret > guess else "lower")])
