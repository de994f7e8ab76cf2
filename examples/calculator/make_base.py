"""Make the base policy: it can use the calculator, seldom does, and slips.

python -m examples.calculator.make_base        # about two minutes on one core
"""

from __future__ import annotations

import random
from pathlib import Path

from transformers.utils import get_json_schema

from examples.calculator.calculator import calculator
from examples.calculator.task import WORDS, Flaws, demonstrate, make_problem
from examples.tiny_chat import Messages, Phase, School, make_base, make_tokenizer

TARGET = Path(__file__).parent / "base"


def careful(rng: random.Random) -> Messages:
    return demonstrate(make_problem(rng), rng, Flaws(equals=0.15))


def careless(rng: random.Random) -> Messages:
    return demonstrate(make_problem(rng), rng, Flaws(guess=0.75, slip=0.06, equals=0.1))


PHASES = [Phase(1200, 5e-3, careful), Phase(400, 2e-3, careless)]


def main() -> None:
    make_base(TARGET, School(make_tokenizer(WORDS), [get_json_schema(calculator)]), PHASES)


if __name__ == "__main__":
    main()
