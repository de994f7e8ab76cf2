"""Every command that a README or a page of docs/ shows, run as it stands, in its order, in a fresh copy of
the repository; and what the quickstart leaves.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dapo import config
from dapo.report import glossary
from tests.checkout import copy_repository
from tests.dapo.plan.test_plan import write_model

ROOT = Path(__file__).parents[1]
READMES = [
    path.relative_to(ROOT) for path in [ROOT / "README.md", *sorted(ROOT.glob("examples/*/README.md"))]
]
PAGES = [path.relative_to(ROOT) for path in sorted(ROOT.glob("docs/*.md"))]
PAGES.sort(key=lambda page: page.name != "your_run.md")  # other pages show what it makes
PREPARE, DOWNLOAD = ".venv/bin/python tools/prepare_data.py", ".venv/bin/hf download"
DATA_SET = '--repo-type dataset --include "data/*" --local-dir .'
DOCTOR = ".venv/bin/dapo doctor"  # what is wrong with this machine is right to say
NOT_RUN = {  # with whatever follows
    'pip install -c constraints/python3.12.txt -e ".[dev,sglang]"': "downloads 11 GB; `make env-check` does",
    'pip install -c constraints/python3.12.txt --no-build-isolation -e ".[gpu]"': "compiles for a GPU",
    "sbatch examples/qwen2.5_32b_paper/launch.sh": "wants SLURM and 128 GPUs; the script runs below",
    "sbatch examples/qwen3_30b_a3b/launch.sh": "wants SLURM and 16 GPUs; much like the 32B's",
    "bash examples/qwen2.5_7b/launch.sh": "wants eight GPUs; test_examples.py checks the rest",
    "sbatch examples/qwen2.5_7b/slurm.sbatch": "wants a cluster",
    "make -B .venv/.ready EXTRAS=dev,gpu,sglang": "installs for a GPU",
    f"{DOWNLOAD} Qwen/Qwen2.5-7B --local-dir models/Qwen2.5-7B": "downloads 15 GB",
    f"{PREPARE} data/dapo-math-17k.parquet --out data/prompts.parquet": "wants the data",
    f"{DOWNLOAD} BytedTsinghua-SIA/DAPO-Math-17k {DATA_SET}": "downloads it",
    f"{DOWNLOAD} BytedTsinghua-SIA/AIME-2024 {DATA_SET}": "downloads it",
    ".venv/bin/dapo train 7b.yaml --nproc 4 optim.lr=2e-6": "wants eight GPUs",
    ".venv/bin/dapo bench 7b.yaml --nproc 4": "wants eight GPUs; another config is measured",
    ".venv/bin/dapo report runs/7b": "wants that run; others are reported",
    "pip install --no-deps .": "installs into the reader's environment",
    "make test-fast": "runs tests, as this one",
    "make peers-bench": "takes 20 minutes and two environments",
    "make ladder": "takes an hour",
    ".venv/bin/torchrun --nproc-per-node 2 my_run.py": "test_docs.py runs the file, on one rank",
    ".venv/bin/python my_run.py": "test_docs.py does",
}
EDITOR = """#!/bin/sh
sed -i 's|train: .*|train: mine/my_data.jsonl|; s|  steps: .*|  steps: 1|' mine/config.yaml
"""


def commands(document: Path) -> list[str]:
    """The indented lines that a reader would type. Other indented text (a prompt, a sample) does not begin
    with a program's name.
    """
    lines = [
        line[4:].partition(" #")[0].strip()
        for line in (ROOT / document).read_text().splitlines()
        if line.startswith("    ")
    ]
    programs = (
        "git",
        "make",
        "cp",
        "python",
        ".venv/",
        "PYTHONPATH=",
        "$EDITOR",
        "sbatch",
        "bash",
        "pip",
        "torchrun",
    )
    return [line for line in lines if line.startswith(programs)]


def not_run(command: str) -> str | None:
    """Return the entry of NOT_RUN that the command is, or begins with."""
    return next((known for known in NOT_RUN if f"{command} ".startswith(f"{known} ")), None)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files, with the environment that runs the tests as .venv, and what the README's reader
    is said to have.
    """
    folder = tmp_path_factory.mktemp("clone") / "dapo"
    copy_repository(folder)
    (folder / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".ready":
            (folder / ".venv" / entry.name).symlink_to(entry)
    # make has nothing to install: it would point the environment at this copy
    (folder / ".venv/.ready").touch()
    (folder / "base").symlink_to("examples/arithmetic/base")
    write_model(folder / "models/Qwen2.5-7B", "Qwen2.5-7B")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "examples/arithmetic/base" / name, folder / "models/Qwen2.5-7B")
    shutil.copy(ROOT / "examples/arithmetic/data/train.jsonl", folder / "prompts.jsonl")
    (folder / "path/to/Qwen2.5-32B").mkdir(parents=True)
    write_model(folder / "path/to/Qwen2.5-32B", "Qwen2.5-32B")
    write_model(folder / "path/to/Qwen3-30B-A3B-Base", "Qwen3-30B-A3B")
    my = yaml.safe_load((ROOT / "examples/arithmetic/config.yaml").read_text())
    my["run"] |= {"dir": "runs/mine", "steps": 1}
    my["eval"] |= {"every": 100, "samples": 2}
    (folder / "my.yaml").write_text(yaml.safe_dump(my))
    (folder / "edit").write_text(EDITOR)
    (folder / "edit").chmod(0o755)
    return folder


@functools.cache
def run(clone: Path, command: str) -> None:
    """Once: what several documents show runs for the first of them."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "EDITOR": str(clone / "edit"),
        "PYTHONPATH": str(clone / "kernels"),
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=clone,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    is_fine = done.returncode == 0 or (command == DOCTOR and done.stdout.endswith(" to mend\n"))
    assert is_fine, f"{command}\n{done.stdout[-4000:]}"


@pytest.fixture(scope="module")
def quickstart(clone: Path) -> Path:
    run(clone, "make quickstart")
    return clone / "runs/arithmetic"


@pytest.fixture(scope="module")
def from_servers(clone: Path) -> Path:
    run(clone, "make quickstart ENGINE=sglang RUN=runs/sglang")
    return clone / "runs/sglang"


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def accuracy_of(run: Path) -> dict[float, float]:
    return {row["step"]: row["eval/accuracy"] for row in rows_of(run) if "eval/accuracy" in row}


def test_the_quickstart_learns(quickstart: Path) -> None:
    accuracy = accuracy_of(quickstart)
    assert accuracy[0] <= 0.45
    assert accuracy[40] >= 0.85


def test_sampling_from_a_real_server_learns_as_much(quickstart: Path, from_servers: Path) -> None:
    assert accuracy_of(from_servers)[40] == pytest.approx(accuracy_of(quickstart)[40], abs=0.05)
    assert max(row["policy/mismatch"] for row in rows_of(from_servers)[:-1]) <= 1e-4, (
        "mean |old − behavior log-prob| of a step"
    )


def test_every_step_has_every_metric(quickstart: Path) -> None:
    names = """groups/asked groups/kept groups/all_correct groups/all_wrong rollout/accuracy rollout/reward
        rollout/truncated rollout/length rollout/length_max rollout/length_kept rollout/length_turned_away
        policy/loss policy/entropy policy/probability policy/clip_low policy/clip_high policy/grad_norm
        policy/updates_skipped policy/lr policy/mismatch rollout/no_gradient
        time/rollout time/update time/sync
        time/old_logprobs time/step perf/tokens_per_second perf/peak_memory_gib
        perf/bytes_received perf/bytes_received_max"""
    for row in rows_of(quickstart)[:-1]:
        assert set(names.split()) <= set(row)
        assert ("policy/clip_high_probability" in row) == (row["policy/clip_high"] > 0)
        assert row["policy/updates_skipped"] == 0
        assert row["policy/mismatch_max"] < 1e-4, (
            "the sampler and the trainer disagree: a weight sync went wrong"
        )
        assert row["groups/asked"] == sum(
            row[f"groups/{kind}"] for kind in ("kept", "all_correct", "all_wrong", "surplus")
        )


def test_the_run_directory_holds_curves_config_model_and_semantics(quickstart: Path) -> None:
    rows = rows_of(quickstart)
    shown = [*glossary.columns(), *(metric.name for metric in glossary.monitors())]
    assert not [name for name in shown if not any(name in row for row in rows)]
    assert imread(quickstart / "curves.png").min() < 0.5, "something is drawn"
    board = EventAccumulator(str(quickstart / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for name in set().union(*rows):
        logged = {row["step"]: row[name] for row in rows if name in row}
        assert {event.step: event.value for event in board.Scalars(name)} == pytest.approx(logged), name
    assert config.load(quickstart / "config.yaml").run.steps == 40
    assert (
        json.loads((quickstart / "semantics.json").read_text())["choices"]["objective.normaliser"]
        == "token_mean"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(quickstart / "hf")
    assert sum(p.numel() for p in model.parameters()) == 75_904
    assert transformers.AutoTokenizer.from_pretrained(quickstart / "hf")("1+1=")["input_ids"] == [
        3,
        12,
        3,
        14,
    ]


def test_commands_are_found_in_every_readme() -> None:
    assert all(map(commands, READMES)), "none in one of them that is known by its program's name"
    assert sum(bool(commands(page)) for page in PAGES) >= 8


def test_what_is_not_run_is_in_some_document() -> None:
    assert NOT_RUN.keys() == {*map(not_run, itertools.chain(*map(commands, [*READMES, *PAGES])))} - {None}


def test_no_command_of_a_page_is_overlooked() -> None:
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
        lines = re.findall(r"^ {4}(?!(?:error|stalled): |# )(.*)$", text, re.M)
        assert len(lines) == len(commands(page)), f"{page}: a program that is not known: {lines}"


@pytest.mark.parametrize("document", [*READMES, *filter(commands, PAGES)], ids=str)
def test_every_command_of_the_document_runs(document: Path, clone: Path, quickstart: Path) -> None:
    for command in commands(document):
        if not not_run(command):
            run(clone, command.replace("--nproc 8", "--nproc 2"))  # a rank for each GPU there; two cores here


def test_the_launch_script_trains_where_there_is_no_slurm(clone: Path) -> None:
    variables = "CONFIG=examples/arithmetic/config.yaml NODES=1 GPUS=2 HEAD=localhost PORT=0"
    run(
        clone,
        f"{variables} bash examples/qwen2.5_32b_paper/launch.sh run.dir=runs/launched run.steps=1 "
        "eval.data=null parallel.tensor=2",
    )
    assert (clone / "runs/launched/hf/config.json").is_file()


def test_from_clone_to_an_own_reward_in_at_most_eight_commands() -> None:
    assert len(commands(Path("examples/custom_reward/README.md"))) + 1 <= 8  # and git clone


def test_from_clone_to_a_planned_launch_of_a_7b_in_at_most_six_commands() -> None:
    found = commands(Path("README.md"))
    [plan] = [place for place, command in enumerate(found) if "dapo plan 7b.yaml" in command]
    assert found[0] == "make quickstart" and plan + 2 <= 6  # and git clone
