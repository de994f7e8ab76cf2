"""Products of two-digit numbers, and sums of them: `47*83-12=` is too much to do in the head."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from examples.calculator.calculator import calculator

SHAPES = ["{}*{}", "{}*{}+{}", "{}*{}-{}", "{}*{}+{}*{}"]
CALL, CALL_ENDS = '{"name": "calculator", "arguments": {"expression": "', '"}}'
WORDS = [CALL, CALL_ENDS, "calculator", "Answer: ", "Tools: ", "Error: ValueError: "]  # a token each


@dataclass(frozen=True)
class Problem:
    """`Problem("47*83-12")` asks for its value."""

    expression: str

    @property
    def prompt(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": f"{self.expression}="}]

    @property
    def answer(self) -> int:
        return int(calculator(self.expression))


@dataclass(frozen=True)
class Flaws:
    """Rates at which a demonstration goes wrong, each a fraction."""

    guess: float = 0.0  # of episodes: an answer of about the right size, without a call
    slip: float = 0.0  # of calls and answers: a wrong digit
    equals: float = 0.0  # of calls: the "=" is copied too, which the calculator refuses; then another call


def make_problem(rng: random.Random) -> Problem:
    return Problem(rng.choice(SHAPES).format(*(rng.randint(11, 99) for _ in range(4))))


def demonstrate(problem: Problem, rng: random.Random, flaws: Flaws) -> list[dict[str, Any]]:
    """Write an episode, with flaws at their rates, as chat messages; the last one gives the answer."""
    episode = [*problem.prompt]
    if rng.random() < flaws.guess:
        guess = round(problem.answer * rng.uniform(0.8, 1.25))
        return [*episode, {"role": "assistant", "content": f"Answer: {guess}"}]
    if rng.random() < flaws.equals:
        episode += called(problem.expression + "=")
    expression = slipped(problem.expression, rng) if rng.random() < flaws.slip else problem.expression
    episode += called(expression)
    answer = episode[-1]["content"]
    answer = slipped(answer, rng) if rng.random() < flaws.slip else answer
    return [*episode, {"role": "assistant", "content": f"Answer: {answer}"}]


def called(expression: str) -> list[dict[str, Any]]:
    """Return a call, as the policy writes it, and the calculator's answer."""
    try:
        answer = calculator(expression)
    except ValueError as error:
        answer = f"Error: ValueError: {error}"  # as the policy will read it
    call = f"<tool_call>\n{CALL}{expression}{CALL_ENDS}\n</tool_call>"
    return [
        {"role": "assistant", "content": call},
        {"role": "tool", "name": "calculator", "content": answer},
    ]


def slipped(text: str, rng: random.Random) -> str:
    """Return the text with another digit, no 0, in place of one."""
    place = rng.choice([i for i, character in enumerate(text) if character.isdigit()])
    digit = rng.choice([digit for digit in "123456789" if digit != text[place]])
    return f"{text[:place]}{digit}{text[place + 1 :]}"
