"""Chain sums of two to six one-digit terms, + and −, with no running total below 0.

`8+4-8+1=` is answered line by line.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

CHARACTERS = "0123456789+-=\n?Answer: "


@dataclass(frozen=True)
class Problem:
    """`Problem((8, 4, -8, 1))` asks for 8+4-8+1."""

    terms: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return str(self.terms[0]) + "".join(f"{term:+d}" for term in self.terms[1:]) + "="

    @property
    def answer(self) -> int:
        return sum(self.terms)


@dataclass(frozen=True)
class Flaws:
    """Rates at which a demonstration goes wrong, each a fraction."""

    slip: float = 0.0  # of lines: a wrong total, used in the next line
    guess: float = 0.0  # of responses: the answer without the work
    ramble: float = 0.0  # of responses: lines repeated after "?", again and again with probability 1/2


def make_problem(rng: random.Random) -> Problem:
    total = rng.randint(1, 9)
    terms = [total]
    for _ in range(rng.randint(1, 5)):
        term = rng.randint(1, 9)
        if total >= term and rng.random() >= 0.6:
            term = -term
        terms.append(term)
        total += term
    return Problem(tuple(terms))


def demonstrate(problem: Problem, rng: random.Random, flaws: Flaws) -> str:
    """Write a worked response, with flaws at their rates: `8+4=12\\n12-8=4\\n4+1=5\\nAnswer: 5`."""
    if rng.random() < flaws.guess:
        return f"Answer: {problem.answer}"
    total, lines = problem.terms[0], []
    is_rambling = rng.random() < flaws.ramble
    for term in problem.terms[1:]:
        result = total + term
        if rng.random() < flaws.slip:
            result = max(0, result + rng.choice([-10, -2, -1, 1, 2, 10]))
        line = f"{total}{term:+d}={result}\n"
        lines.append(line)
        while is_rambling and rng.random() < 0.5:
            lines.append("?" + line)
        total = result
    return "".join(lines) + f"Answer: {total}"
