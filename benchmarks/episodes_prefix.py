"""How much of a later turn's input does a real SGLang server find in its prefix cache?

python benchmarks/episodes_prefix.py engine.python=…
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from record import ROOT, heading, save, table

from dapo.rollout import dump

STEPS = 5


def main() -> None:
    turns: dict[int, list[list[int]]] = defaultdict(list)  # turn → [tokens asked with, tokens in the cache]
    with tempfile.TemporaryDirectory() as directory:
        options = [f"run.dir={directory}", f"run.steps={STEPS}", "rollout.dump_share=1.0", "eval.data=null"]
        command = [sys.executable, "-m", "dapo", "train", "examples/game/config.yaml", "--nproc", "1"]
        subprocess.run([*command, *options, "engine.kind=sglang", *sys.argv[1:]], check=True, cwd=ROOT)
        for step in range(STEPS):
            buffer = dump.read(dump.path_of(Path(directory) / "rollouts", step), 16)
            for group in buffer.asked:
                for sample in group.samples:
                    assert sample.episode
                    for number, turn in enumerate(sample.episode.cached, start=1):
                        turns[number].append(turn)
    rows = []
    for number, found in sorted(turns.items()):
        asked, cached = np.array(found).sum(axis=0).tolist()
        rows.append([number, len(found), f"{asked / len(found):.1f}", f"{cached / asked:.1%}"])
    text = f"""{heading("The prefix cache over the turns of an episode")}
{STEPS} steps of examples/game on a real SGLang server on a CPU, its caches as they are by default; weights
change after every step. A turn is asked for with all tokens before it: the last token is always computed, and
so is what the environment said since the turn before.

{table(["turn", "requests", "tokens asked with, mean", "of them in the cache"], rows)}"""
    save("episodes_prefix.md", text)


if __name__ == "__main__":
    main()
