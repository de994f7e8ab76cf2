"""What `dapo plan` expects a step to ask for, and what a step says it saved, against the asking itself."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dapo.__main__ import main
from dapo.rollout import estimate, record
from dapo.rollout.asking import Asking
from dapo.rollout.buffer import Buffer
from dapo.rollout.forecast import Asked, Forecast, Rules
from dapo.rollout.prompts import PromptStream
from dapo.types import Group, Prompt, Sample
from tests.conftest import make_config

GROUP, NUM_PROMPTS = 8, 3000
PLAIN = Rules(GROUP, floor=0.25, sharpness=0.6, stop_below=0.4)
TOKENS = np.zeros(1, np.int32)
CONFIG = "examples/arithmetic/config.yaml"


def learnt(num_prompts: int = NUM_PROMPTS, rules: Rules = PLAIN) -> Forecast:
    """Four of five prompts asked for, most of them all right or all wrong."""
    rng, known = np.random.default_rng(1), Forecast(num_prompts, rules)
    solved = rng.beta(0.3, 0.4, num_prompts)
    for step in range(4):
        prompts = np.arange(step, num_prompts, 5)
        groups = []
        for index, odds in zip(prompts.tolist(), known.odds(prompts, step), strict=True):
            right = rng.random(rules.group_size) < solved[index]
            counts = int(right.sum()), rules.group_size, int(right[: rules.wave].sum())
            groups.append(Asked(index, 0, odds, *counts, 1.0))
        known.learn(step, groups)
    return known


def sampled(known: Forecast, rounds: int) -> tuple[float, float]:
    """Samples that are asked for until a group is mixed, and those that the ledger says were saved. Each time
    p is drawn from the posterior.
    """
    rng = np.random.default_rng(0)
    prompts = [Prompt(index, TOKENS, "") for index in range(NUM_PROMPTS)]
    size, num_samples, num_mixed, saved = known.rules.group_size, 0, 0, 0.0
    for seed in range(rounds):
        asking = Asking(PromptStream(prompts, seed), known, seed, known.num_steps)
        buffer = Buffer(NUM_PROMPTS, is_dynamic=True)
        while len(asking.recent) < NUM_PROMPTS * 0.97:  # later prompts are asked for that came by before
            group = asking.next()
            odds = asking.questions[group.id].odds
            right = rng.random(size) < rng.beta(odds.alpha, odds.beta)
            first = asking.num_at_first(group)
            group.samples = samples(group, right[:first])
            if first < size and not asking.is_stopped(group):
                group.samples = samples(group, right)
            num_samples += len(group.samples)
            buffer.offer(group)
        asking.finish_batch(buffer.decided)
        num_mixed += len(buffer.kept)
        saved += asking.ledger(buffer).get("forecast/samples_saved", 0.0)
    return num_samples / num_mixed, saved / num_mixed


def samples(group: Group, right: np.ndarray) -> list[Sample]:
    fields = {"behavior_logprobs": TOKENS, "loss_mask": TOKENS, "versions": (), "finish_reason": "stop"}
    made = [Sample(group.id, index, TOKENS, **fields) for index in range(len(right))]  # type: ignore[arg-type]
    for sample, is_right in zip(made, right, strict=True):
        sample.is_correct = bool(is_right)
    return made


@pytest.mark.parametrize(
    ("is_skipping", "first_wave", "least", "most"),
    [(False, 0, 0.98, 1.02), (True, 0, 0.6, 0.9), (False, 3, 0.6, 0.9), (True, 3, 0.4, 0.8)],
    ids=["plain", "skip", "first wave", "both"],
)
def test_the_estimate_is_what_asking_costs(
    is_skipping: bool, first_wave: int, least: float, most: float
) -> None:
    known = learnt()
    known.of_formula[:] = 0  # the formulas are right, as p is drawn from what they assume
    known.is_dropped[::7] = True
    plain = estimate.cost(known).per_used
    known.rules = replace(PLAIN, is_skipping=is_skipping, first_wave=first_wave)
    found = estimate.cost(known).per_used
    assert least < found / plain < most
    taken, saved = sampled(known, rounds=20)
    assert found == pytest.approx(taken, rel=0.012)
    assert saved == pytest.approx(plain - found, abs=0.012 * plain)


def test_where_nothing_was_left_out_nothing_was_saved() -> None:
    known = learnt()
    known.rules = replace(PLAIN, first_wave=3, stop_below=0.0)
    assert sampled(known, rounds=1)[1] == 0


def test_chances_are_the_calibrated_ones() -> None:
    known = learnt()
    known.of_formula[:] = 0
    before = estimate.cost(known)
    known.of_formula[:] = (1e6, 1e6, 5e5)  # half as many are mixed as the formulas say
    after = estimate.cost(known)
    assert after.mixed == pytest.approx(before.mixed / 2, rel=1e-3) and after.samples == before.samples


def test_where_every_prompt_has_left_nothing_is_asked() -> None:
    known = learnt()
    known.is_dropped[:] = True
    assert estimate.cost(known) == (0, 0)


def write(path: Path, group_size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    record.write(path, learnt(500, Rules(group_size)), "digest")
    return path


def test_the_lines_name_the_ways_with_the_configs_options(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.parquet")
    first, second = estimate.describe(path, make_config(tmp_path, "rollout.group_size=8").rollout)
    assert "400 of 500 prompts were asked for in 4 steps;" in first and first.endswith("expected to be mixed")
    assert second.count("(") == 4 and "first_wave=2 " in second, "a quarter of the group"
    options = [
        "rollout.group_size=8",
        "rollout.first_wave=3",
        "rollout.forecast=skip",
        "rollout.max_rounds=1",
    ]
    _, other = estimate.describe(path, make_config(tmp_path, *options).rollout)
    assert "first_wave=3 " in other and other.split("with")[0] == second.split("with")[0]
    assert "rollout.max_rounds allows" in other and "allows" not in second


@pytest.mark.parametrize("content", [None, b"", b"PAR1", "torn", "larger groups"], ids=str)
def test_a_record_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: Any, content: bytes | str) -> None:
    path = write(tmp_path / "prompts.parquet", 16 if content == "larger groups" else 8)
    if content is None:
        path.unlink()
    elif content != "larger groups":
        path.write_bytes(path.read_bytes()[:-9] if content == "torn" else content)
    assert main(["plan", CONFIG, "--gpu", "cpu", "--record", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {path}") and printed.err.count("\n") == 1


def test_the_plan_of_a_run_that_has_a_record_reads_it_without_torch(tmp_path: Path) -> None:
    write(tmp_path / "run" / record.NAME)
    code = f"""
import sys
from dapo.__main__ import main
status = main(["plan", {CONFIG!r}, "--gpu", "cpu", "run.dir={tmp_path / "run"}"])
sys.exit("torch" in sys.modules or status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("record", "sampling"))] == [
        "record",
        "sampling",
    ]
    assert lines[-1].startswith("fits")
