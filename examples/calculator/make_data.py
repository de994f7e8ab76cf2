"""Write data/train.jsonl and data/heldout.jsonl: all problems are different, none is in both files.

python -m examples.calculator.make_data
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from examples.calculator.task import Problem, make_problem

NUM_TRAIN, NUM_HELDOUT = 2000, 200
DATA = Path(__file__).parent / "data"


def main() -> None:
    rng = random.Random(0)
    problems: dict[Problem, None] = {}
    while len(problems) < NUM_TRAIN + NUM_HELDOUT:
        problems.setdefault(make_problem(rng))
    rows = [json.dumps({"prompt": p.prompt, "answer": str(p.answer)}) + "\n" for p in problems]
    DATA.mkdir(exist_ok=True)
    (DATA / "heldout.jsonl").write_text("".join(rows[:NUM_HELDOUT]))
    (DATA / "train.jsonl").write_text("".join(rows[NUM_HELDOUT:]))


if __name__ == "__main__":
    main()
