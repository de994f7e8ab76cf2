"""Make the base policy: it knows how to play, and plays badly.

python -m examples.game.make_base        # about two minutes on one core
"""

from __future__ import annotations

import random
from pathlib import Path

from examples.game.task import WORDS, Flaws, demonstrate, make_row
from examples.tiny_chat import Messages, Phase, School, make_base, make_tokenizer

TARGET = Path(__file__).parent / "base"


def careful(rng: random.Random) -> Messages:
    return demonstrate(make_row(rng), rng, Flaws(random=0.3))


def careless(rng: random.Random) -> Messages:
    return demonstrate(make_row(rng), rng, Flaws(random=0.5, forgetful=0.35, illegal=0.05))


PHASES = [Phase(2500, 5e-3, careful), Phase(150, 1e-3, careless)]


def main() -> None:
    make_base(TARGET, School(make_tokenizer(WORDS)), PHASES)


if __name__ == "__main__":
    main()
