"""Write data/train.jsonl and data/heldout.jsonl: all games are different, none is in both files.

python -m examples.game.make_data
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from examples.game.task import LEAST, MOST

NUM_HELDOUT = 80
DATA = Path(__file__).parent / "data"


def main() -> None:
    games = [(highest, secret) for highest in range(LEAST, MOST + 1) for secret in range(1, highest + 1)]
    random.Random(0).shuffle(games)
    rows = [json.dumps({"highest": highest, "secret": secret}) + "\n" for highest, secret in games]
    DATA.mkdir(exist_ok=True)
    (DATA / "heldout.jsonl").write_text("".join(rows[:NUM_HELDOUT]))
    (DATA / "train.jsonl").write_text("".join(rows[NUM_HELDOUT:]))


if __name__ == "__main__":
    main()
