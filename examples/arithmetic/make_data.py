"""Write data/train.jsonl and data/heldout.jsonl: all problems are different, none is in both files.

python examples/arithmetic/make_data.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from task import Problem, make_problem

NUM_TRAIN, NUM_HELDOUT = 4000, 200
HERE = Path(__file__).parent


def main() -> None:
    rng = random.Random(0)
    problems: dict[str, Problem] = {}
    while len(problems) < NUM_TRAIN + NUM_HELDOUT:
        problem = make_problem(rng)
        problems.setdefault(problem.prompt, problem)
    rows = [json.dumps({"prompt": p.prompt, "answer": str(p.answer)}) + "\n" for p in problems.values()]
    rng.shuffle(rows)
    (HERE / "data").mkdir(exist_ok=True)
    (HERE / "data" / "heldout.jsonl").write_text("".join(rows[:NUM_HELDOUT]))
    (HERE / "data" / "train.jsonl").write_text("".join(rows[NUM_HELDOUT:]))


if __name__ == "__main__":
    main()
