"""Demonstrations of the game: players who halve what is left, and others who do not."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from dapo.episodes import Reply
from examples.game.game import GuessNumber

LEAST, MOST = 16, 31  # of the highest number
WORDS = ["Guess my number from 1 to ", "higher", "lower"]  # a token each


@dataclass(frozen=True)
class Flaws:
    """Rates at which a guess is none of the best; each a fraction of guesses."""

    random: float = 0.0  # any number that is still possible
    forgetful: float = 0.0  # any number of the game
    illegal: float = 0.0  # a number that the game does not have


def make_row(rng: random.Random) -> dict[str, int]:
    highest = rng.randint(LEAST, MOST)
    return {"highest": highest, "secret": rng.randint(1, highest)}


def demonstrate(row: dict[str, int], rng: random.Random, flaws: Flaws) -> list[dict[str, Any]]:
    """Play an episode, with flaws at their rates; return its messages, up to the player's last."""
    game = GuessNumber()
    episode = game.reset(row, seed=0)
    low, high = 1, row["highest"]
    while True:
        guess = _guess(low, high, row["highest"], rng, flaws)
        episode.append({"role": "assistant", "content": str(guess)})
        turn = game.step(Reply(str(guess)))
        if turn.is_done:
            return episode
        episode += turn.messages
        if turn.messages[0]["content"] == "higher":
            low = max(low, guess + 1)
        elif turn.messages[0]["content"] == "lower":
            high = min(high, guess - 1)


def _guess(low: int, high: int, highest: int, rng: random.Random, flaws: Flaws) -> int:
    kinds = [flaws.random, flaws.forgetful, flaws.illegal]
    [kind] = rng.choices(["random", "forgetful", "illegal", "best"], [*kinds, 1 - sum(kinds)])
    match kind:
        case "random":
            return rng.randint(low, high)
        case "forgetful":
            return rng.randint(1, highest)
        case "illegal":
            return rng.randint(highest + 1, 99)
    middle = (low + high) / 2
    return rng.choice([int(middle), int(middle + 0.5)])
