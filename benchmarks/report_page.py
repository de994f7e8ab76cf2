"""Seconds to make the report of a 1,000-step run, and to open it in headless Chromium.

python benchmarks/report_page.py. The runs are synthetic: curves of the paper's shape, dumps written by
dapo/rollout/dump.py, long responses tokenized by a tokenizer trained here on this repository's own text.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
from record import heading, save, spread, table

from dapo.learn.traces import Trace
from dapo.report import page
from dapo.rollout import dump
from dapo.rollout.buffer import Buffer
from dapo.types import Group, Prompt, Sample

ROOT = Path(__file__).parents[1]
STEPS, OPENINGS = 1000, 5
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def train_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    patterns = ("*.md", "dapo/**/*.py", "kernels/**/*.py")
    files = [str(path) for pattern in patterns for path in ROOT.glob(pattern)]
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train(files, vocab_size=8000, show_progress=False)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def rows(rng: np.random.Generator) -> Iterator[dict[str, float]]:
    """Yield metrics of a long run: saturating accuracy, growing responses, falling entropy, and noise."""
    for step in range(STEPS):
        done = 1 - math.exp(-step / 300)
        noise = rng.normal(0, 1, 30)
        asked = 1536 * (1 + (step > 600))
        correct, wrong = round(asked * (0.05 + 0.4 * done)), round(asked * (0.35 - 0.25 * done))
        rollout, update = 420 + 900 * done + 40 * noise[0], 300 + 500 * done + 20 * noise[1]
        evaluation = {
            "eval/accuracy": 0.5 * done + 0.02 * noise[2],
            "eval/aime/pass": 0.75 * done + 0.03 * noise[3],
        }
        yield {
            "step": step,
            **(evaluation if step % 5 == 0 else {}),
            "groups/asked": asked,
            "groups/kept": 512,
            "groups/all_correct": correct,
            "groups/all_wrong": wrong,
            "groups/surplus": max(0, asked - 512 - correct - wrong),
            "rollout/accuracy": 0.1 + 0.5 * done + 0.02 * noise[4],
            "rollout/reward": -0.8 + 1.0 * done + 0.03 * noise[5],
            "rollout/truncated": max(0.0, 0.02 + 0.02 * noise[6]),
            "rollout/length": 900 + 4200 * done + 120 * noise[7],
            "rollout/length_max": 20480,
            "rollout/tokens": 16 * asked * (900 + 4200 * done),
            "policy/mismatch": 0.004 + 0.0005 * noise[8],
            "policy/mismatch_max": 1.5 + 0.2 * noise[9],
            "policy/loss": 0.002 * noise[10],
            "policy/entropy": 0.3 + 0.9 * math.exp(-step / 120) + 0.02 * noise[11],
            "policy/probability": 0.75 + 0.12 * done + 0.004 * noise[12],
            "policy/clip_low": 0.0008 * math.exp(0.3 * noise[13]),
            "policy/clip_high": 0.0006 * math.exp(0.3 * noise[14]),
            "policy/grad_norm": 0.12 * math.exp(0.25 * noise[15]),
            "policy/lr": 1e-6 * min(1, (step + 1) / 20),
            "time/sync": 9 + noise[16],
            "time/rollout": rollout,
            "time/old_logprobs": 0.3 * update,
            "time/update": update,
            "time/step": rollout + 1.3 * update + 25,
            "perf/tokens_per_second": 30000 + 900 * noise[17],
            "perf/peak_memory_gib": 71.5,
        }


def write_run(
    directory: Path,
    model: Path,
    tokenizer: tokenizers.Tokenizer,
    *,
    length: int,
    group_size: int,
    every: int,
    seed: int,
) -> None:
    """Write a run of STEPS steps that dumped each `every`-th.

    A dump has a group of each kind and one more, of responses of about `length` tokens.
    """
    rng = np.random.default_rng(seed)
    directory.mkdir()
    config = f"run: {{dir: {directory}, seed: {seed}}}\npolicy: {{model: {model}}}\n"
    (directory / "config.yaml").write_text(config)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(rng)))
    documents = "\n".join(path.read_text() for path in sorted(ROOT.glob("*.md")))
    corpus = np.array(tokenizer.encode(documents).ids, np.int32)
    rollouts = directory / "rollouts"
    for step in range(0, STEPS, every):
        buffer = Buffer(3, is_dynamic=True)
        for place, num_correct in enumerate([group_size // 2, group_size // 4, group_size, 0]):
            group = Group((step << 20) + place, Prompt(place, excerpt(rng, corpus, 120), "42"))
            for index in range(group_size):
                sample = make_sample(rng, corpus, tokenizer, group.id, index, length, index < num_correct)
                group.samples.append(sample)
            buffer.offer(group)
        traces = [trace(rng, sample) for group in buffer.kept for sample in group.samples]
        with dump.Writer() as writer:
            writer.write(dump.path_of(rollouts, step), buffer, 1.0)
            writer.write_traces(dump.traces_path_of(rollouts, step), traces)


def make_sample(
    rng: np.random.Generator,
    corpus: np.ndarray,
    tokenizer: tokenizers.Tokenizer,
    group: int,
    index: int,
    length: int,
    is_correct: bool,
) -> Sample:
    tokens = excerpt(rng, corpus, int(length * rng.lognormal(0, 0.4)) + 1)
    n = len(tokens)
    # most tokens all but certain, some not at all
    logprobs = np.log(rng.beta(0.6, 0.1, n).clip(1e-6, 1)).astype(np.float32)
    return Sample(
        group,
        index,
        tokens,
        logprobs,
        loss_mask=np.ones(n, bool),
        versions=((0, 0, n),),
        finish_reason="stop" if rng.random() < 0.95 else "length",
        text=tokenizer.decode(tokens.tolist()),
        is_correct=is_correct,
        reward=1.0 if is_correct else -1.0,
        advantage=float(rng.normal()),
    )


def excerpt(rng: np.random.Generator, corpus: np.ndarray, length: int) -> np.ndarray:
    """Join pieces of the corpus, each some sentences long."""
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < length:
        start = int(rng.integers(0, len(corpus) - 60))
        parts.append(corpus[start : start + int(rng.integers(10, 60))])
    return np.concatenate(parts)[:length]


def trace(rng: np.random.Generator, sample: Sample) -> Trace:
    low, high = rng.random((2, sample.length)) < 0.001
    old = sample.behavior_logprobs
    new = old + np.where(low, -0.3, np.where(high, 0.3, 0)).astype(np.float32)
    return Trace(sample.group, sample.index, old, new, low, high)


def open_page(chromium: str, file: Path, folder: Path) -> tuple[float, float]:
    """Return seconds until the page's script has drawn everything, and seconds of the whole process.

    The first are counted by the page's own clock from the start of navigation. The process starts the
    browser, opens the page, paints it and exits.
    """
    options = "--headless=new --no-sandbox --disable-gpu --window-size=1500,1000"
    command = [chromium, *options.split(), f"--user-data-dir={folder / 'profile'}"]

    def run(option: str) -> str:
        browse = [*command, option, file.as_uri()]
        return subprocess.run(browse, capture_output=True, text=True, timeout=120, check=True).stdout

    dom = run("--dump-dom")
    found = re.search(r'data-opened="(\d+)"', dom)
    if found is None:
        raise SystemExit(f"{file} did not open:\n{dom[:2000]}")
    start = time.perf_counter()
    run(f"--screenshot={folder / file.stem}.png")
    return int(found[1]) / 1000, time.perf_counter() - start


def main() -> None:
    chromium = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if chromium is None:
        raise SystemExit(f"none of {', '.join(CHROMIUM)} is on PATH")
    version = subprocess.run([chromium, "--version"], capture_output=True, text=True).stdout.strip()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        tokenizer = train_tokenizer(model)
        kinds = {
            "long": dict(length=4000, group_size=16, every=40, seed=1),  # more than a page holds
            "short": dict(length=40, group_size=8, every=1, seed=2),
        }
        for kind, options in kinds.items():
            write_run(folder / kind, model, tokenizer, **options)
        pages = {
            "long responses": ["long"],
            "short responses": ["short"],
            "both, side by side": ["long", "short"],
        }
        for title, names in pages.items():
            file = folder / f"{len(results)}.html"
            start = time.perf_counter()
            page.write([folder / name for name in names], file, samples_mib=16)
            making = time.perf_counter() - start
            num_samples = sum(len(entry["outcomes"]) for entry in page_data(file))
            opened, process = zip(*(open_page(chromium, file, folder) for _ in range(OPENINGS)), strict=True)
            size = f"{file.stat().st_size / 2**20:.1f}"
            times = f"{making:.1f}", spread(opened, 2), spread(process, 2)
            results.append([title, size, num_samples, *times])
            print(results[-1], file=sys.stderr, flush=True)
    text = heading(f"Opening the report of {STEPS:,} steps")
    load = f"load average {os.getloadavg()[0]:.0f}, this benchmark's own included"
    text += f"""
{version}, headless, without a GPU; {load}. Seconds: median (least–most) of {OPENINGS}.
Opened: from the start of navigation until the page's script has drawn every curve, by the page's clock.
Process: start the browser, open, paint, write a screenshot, exit. Required: opened in at most 2 s.

"""
    header = ["1,000 steps", "MiB", "samples in it", "made in s", "opened", "process"]
    save("report_page.md", text + table(header, results))


def page_data(file: Path) -> list[dict[str, str]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text())
    assert found is not None
    return [entry for run in json.loads(found[1])["runs"] for entry in run["groups"]]


if __name__ == "__main__":
    main()
