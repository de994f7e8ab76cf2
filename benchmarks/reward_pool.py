"""Answers that the reward pool scores in a second, and seconds that hostile responses add to a step.

python benchmarks/reward_pool.py
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # workers import this file again: nothing heavy up here

LENGTHS = {"200 characters": 200, "4,000 characters": 4_000, "60,000 characters (20 k tokens)": 60_000}
GROUP = 16  # samples of one prompt
HOSTILE = [
    "Answer: " + "(" * 10**6,
    "Answer: " + "\\" * 10**6,
    "\0" * 10**6,
    r"Answer: \binom{99999}{49999}",
    "Answer: 9^{9^{9^9}}",
]


def integer(i: int) -> tuple[str, str]:
    """Return the gold answer, and the answer of sample i."""
    return str(i // GROUP), f"**{i // GROUP}**"


def fraction(i: int) -> tuple[str, str]:
    """Write the group's fraction in a way of its own for each sample."""
    a, factor = i // GROUP + 1, i % GROUP + 1
    return f"\\frac{{{a}}}{{{a + 1}}}", f"$\\frac{{{a * factor}}}{{{(a + 1) * factor}}}$"


def root(i: int) -> tuple[str, str]:
    """Write roots that are compared by computing them."""
    a, factor = i // GROUP + 1, i % GROUP + 2
    return f"{a * factor}\\sqrt{{2}}", f"${a}\\sqrt{{{2 * factor**2}}}$"


def make_pairs(texts: Sequence[str], golds: Sequence[str]) -> list:
    import numpy as np

    from dapo.types import Prompt, Sample

    none = np.zeros(0, np.int32)
    return [
        (Prompt(i, none, gold), Sample(0, i, none, none, none, (), "stop", text))
        for i, (text, gold) in enumerate(zip(texts, golds, strict=True))
    ]


def seconds(reward, pairs: list) -> float:
    """Score, and return the CPU seconds of this process and the workers, which other load does not change."""
    start = cpu_seconds(reward)
    reward.score(pairs)
    taken = cpu_seconds(reward) - start
    assert all(sample.is_correct for _, sample in pairs)
    return taken


def cpu_seconds(reward) -> float:
    workers = reward.workers.workers if reward.workers else []
    pids = [os.getpid(), *(worker.pid for worker in workers)]
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def response(length: int, answer: str, i: int) -> str:
    line = f"Then $x_{{{i}}} = {i}$, and so the area is ${i}^2$.\n"
    return (line * (length // len(line) + 1))[:length] + f"\nAnswer: {answer}"


def runaway(response: str, answer: str) -> bool:
    while response == "hang":
        pass
    return response == answer


def main() -> None:
    from record import heading, save, spread, table

    from dapo.config import Reward as Options
    from dapo.reward import answer
    from dapo.reward.pool import Reward

    rows = []
    for length_name, length in LENGTHS.items():
        for kind in (integer, fraction, root):
            count = 500 if kind is root or length == 60_000 else 4_000
            golds, answers = zip(*map(kind, range(count)), strict=True)
            pairs = make_pairs([response(length, text, i) for i, text in enumerate(answers)], golds)
            row: list[object] = [length_name, kind.__name__]
            for workers in (0, 1, 4):
                speeds = []
                for _ in range(3):
                    reward = Reward(Options(workers=workers, soft_overlong_punishment=False), 1)
                    seconds(reward, make_pairs(["Answer: 0.25"] * 256, ["1/4"] * 256))  # starts and imports
                    answer._parse.cache_clear()
                    speeds.append(count / seconds(reward, pairs))
                    reward.close()
                row.append(spread(speeds, 0))
            rows.append(row)
    text = heading("The reward pool")
    text += f"""
Answers by dapo.reward:is_correct per second of CPU time, this process and the workers together: so many a
second on one core. Groups of {GROUP} samples; fractions and roots all written in different ways; median
(range) of three.

"""
    text += table(["response", "gold answer", "workers 0", "workers 1", "workers 4 (default)"], rows)

    rows = []
    ordinary = [response(4_000, "34", i) for i in range(2_000)]
    for name, function, hostile, gold in [
        ("none", "dapo.reward:is_correct", [], "34"),
        (f"{len(HOSTILE)} kinds × 4, gold an integer", "dapo.reward:is_correct", HOSTILE * 4, "34"),
        (f"{len(HOSTILE)} kinds × 4, gold a fraction", "dapo.reward:is_correct", HOSTILE * 4, r"\frac{1}{2}"),
        ("8 endless loops in a user's function", "benchmarks.reward_pool:runaway", ["hang"] * 8, "34"),
    ]:
        reward = Reward(Options(function=function, soft_overlong_punishment=False), 1)
        pairs = make_pairs(ordinary + hostile, [gold] * (len(ordinary) + len(hostile)))
        start = time.perf_counter()
        reward.score(pairs)
        taken = time.perf_counter() - start
        assert not any(sample.is_correct for _, sample in pairs[len(ordinary) :])
        rows.append([name, f"{taken:.2f}", int(reward.take_metrics()["reward/timeouts"])])
        reward.close()
    text += f"""
A step of {len(ordinary)} ordinary responses of 4,000 characters and some hostile ones, time_limit 5 s,
4 workers; wall seconds, the start of the workers included. Every hostile one was wrong.

"""
    text += table(["hostile responses", "wall seconds", "cut off"], rows)
    save("reward_pool.md", text)


if __name__ == "__main__":
    main()
