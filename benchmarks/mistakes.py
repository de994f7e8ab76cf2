"""What does a newcomer's mistake look like? `dapo train` with each of them, on one rank and on two.

python benchmarks/mistakes.py [name …]

The last line of all that is printed has to name the thing; the exit status is 2 for what the user wrote, 1
for what broke.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from record import heading, save, table

ROOT = Path(__file__).parents[1]
ARITHMETIC = ROOT / "examples/arithmetic"


@dataclass(frozen=True)
class Mistake:
    """Overrides, or what `prepare` does to the folder of a good run: model/, train.jsonl, run.yaml."""

    name: str
    words: str  # in the last line
    options: tuple[str, ...] = ()
    status: int = 2
    prepare: Callable[[Path], object] = lambda folder: None
    command: tuple[str, ...] = ()  # instead of train run.yaml


def rows(*found: dict[str, object] | str) -> Callable[[Path], object]:
    """Write the training file."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in found)
    return lambda folder: (folder / "train.jsonl").write_text(text)


def remove(pattern: str) -> Callable[[Path], object]:
    return lambda folder: [path.unlink() for path in (folder / "model").glob(pattern)]


def cut_weights(folder: Path) -> None:
    path = folder / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def change_model(**fields: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "model/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def train_first(*more: str, then: Callable[[Path], object] = lambda folder: None) -> Callable[[Path], object]:
    """Make a run of two steps, which the mistake meets."""

    def prepare(folder: Path) -> None:
        done = run(folder, 1, ["train", "run.yaml", "run.steps=2", "run.save_every=1", *more])
        assert done.returncode == 0, done.stdout[-2000:]
        then(folder)

    return prepare


def damage(folder: Path) -> None:
    for manifest in (folder / "runs/mine/checkpoints").glob("*/manifest.json"):
        manifest.write_text(manifest.read_text()[:-5])


def full_disk(folder: Path) -> None:
    (folder / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder / "small")], check=True)


REWARDS = """
def raises(response, answer):
    raise KeyError("mine")
def text(response, answer):
    return "yes"
"""
MISTAKES = [
    Mistake("a command that is none", "invalid choice: 'trian'", command=("trian", "run.yaml")),
    Mistake("no config", "required: config", command=("train",)),
    Mistake("a config that is not there", "none.yaml: No such file", command=("train", "none.yaml")),
    Mistake(
        "a config that is no YAML",
        "not YAML",
        prepare=lambda f: (f / "run.yaml").write_text("run: {dir: [\n"),
    ),
    Mistake("a misspelt option", "unknown key optim.lrr: did you mean lr?", ("optim.lrr=1e-6",)),
    Mistake("a misspelt section", "unknown key optin", ("optin.lr=1e-6",)),
    Mistake("an option without a value", "expected section.key=value", ("optim.lr",)),
    Mistake("text for a number", "optim.lr='fast'", ("optim.lr=fast",)),
    Mistake("a model that is not there", "policy.model=models/none", ("policy.model=models/none",)),
    Mistake("a folder that is no model", "no config.json there", ("policy.model=.",)),
    Mistake("an architecture that is not known", "gpt_neox", prepare=change_model(model_type="gpt_neox")),
    Mistake("a model without weights", "safetensors", prepare=remove("*.safetensors")),
    Mistake("weights that are cut short", "model.safetensors", prepare=cut_weights),
    Mistake("a model without a tokenizer", "no usable tokenizer", prepare=remove("tokenizer*")),
    Mistake("data that is not there", "none.jsonl does not exist", ("data.train=none.jsonl",)),
    Mistake("data of another format", "expected .jsonl or .parquet", ("data.train=run.yaml",)),
    Mistake("a line that is no JSON", "line 1: not JSON", prepare=rows("1+1= 2")),
    Mistake(
        "another column for the prompt",
        "no column 'prompt'",
        prepare=rows({"question": "1+1=", "answer": "2"}),
    ),
    Mistake(
        "no column with the answer", "no column 'answer'", prepare=rows({"prompt": "1+1=", "solution": "2"})
    ),
    Mistake("an empty file", "no prompts in it", prepare=rows()),
    Mistake(
        "an answer that cannot be compared", "ground truth", prepare=rows({"prompt": "1+1=", "answer": " "})
    ),
    Mistake(
        "chats for a model without a template",
        "no chat template",
        prepare=rows({"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}),
    ),
    Mistake("a layout that the model cannot have", "parallel.tensor=3", ("parallel.tensor=3",)),
    Mistake("more ranks than the layout", "is not a multiple of", ("parallel.tensor=4",)),
    Mistake(
        "a step that is no multiple of its updates",
        "not a multiple of optim.prompts_per_minibatch=3",
        ("optim.prompts_per_minibatch=3",),
    ),
    Mistake(
        "longer than the model",
        "has 512 (max_position_embeddings",
        ("rollout.max_response_length=1000", "policy.tokens_per_microbatch=4096"),
    ),
    Mistake("a microbatch that is too small", "cannot hold one sample", ("policy.tokens_per_microbatch=32",)),
    Mistake(
        "a reward's module that is not there", "No module named 'mine'", ("reward.function=mine:reward",)
    ),
    Mistake(
        "a reward that is not in its module", "has no attribute 'none'", ("reward.function=rewards:none",)
    ),
    Mistake("a reward that always fails", "KeyError", ("reward.function=rewards:raises",), status=1),
    Mistake("a reward that returns text", "returned 'yes'", ("reward.function=rewards:text",), status=1),
    Mistake("no SGLang", "no sglang is installed", ("engine.kind=sglang",)),
    Mistake(
        "a dead server",
        "http://127.0.0.1:9",
        (
            "engine.kind=sglang",
            "engine.urls=['http://127.0.0.1:9']",
            "engine.weight_sync=disk",
            "engine.stall_seconds=3",
        ),
        status=2,
    ),
    Mistake("no wandb", "wandb is not installed", ("run.wandb_project=mine",)),
    Mistake("a run directory that is a file", "run.dir=run.yaml", ("run.dir=run.yaml",)),
    Mistake("a directory with a run", "run.resume=never", ("run.resume=never",), prepare=train_first()),
    Mistake(
        "other data than the checkpoint's",
        "data.train is not what the checkpoint was made with",
        ("run.steps=3",),
        prepare=train_first(then=rows({"prompt": "3+3=", "answer": "6"})),
    ),
    Mistake(
        "another model than the checkpoint's",
        "checkpoint",
        ("run.steps=3",),
        prepare=train_first(then=lambda f: shrink(f)),
    ),
    Mistake(
        "damaged checkpoints", "checkpoint", ("run.steps=3",), status=2, prepare=train_first(then=damage)
    ),
    Mistake("an option of Megatron's that is none", "policy.megatron", ("policy.megatron.adam_epss=1",)),
    Mistake("evaluation data that is not there", "held.jsonl does not exist", ("eval.data=held.jsonl",)),
    Mistake("a full disk", "cannot be written", ("run.dir=small/run",), status=1, prepare=full_disk),
]


def shrink(folder: Path) -> None:
    """Replace the model by one of another size."""
    import transformers

    config = transformers.Qwen2Config.from_pretrained(
        folder / "model", num_hidden_layers=1, layer_types=["full_attention"]
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder / "model")


@contextlib.contextmanager
def prepared(mistake: Mistake) -> Iterator[Path]:
    """Yield a folder with a good run's parts, spoilt as the mistake says."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ARITHMETIC / "base", folder / "model")
        (folder / "train.jsonl").write_text("".join(list((ARITHMETIC / "data/train.jsonl").open())[:100]))
        (folder / "rewards.py").write_text(REWARDS)
        (folder / "run.yaml").write_text(
            "run: {dir: runs/mine, steps: 2}\ndata: {train: train.jsonl, max_prompt_length: 16}\n"
            "rollout: {prompts_per_step: 4, group_size: 4, prompts_per_round: 4, max_response_length: 32}\n"
            "reward: {overlong_cache: 8}\noptim: {prompts_per_minibatch: 2, lr: 1e-4}\n"
            "parallel: {tensor: 1}\npolicy: {model: model, dtype: float32, tokens_per_microbatch: 256}\n"
        )
        try:
            mistake.prepare(folder)
            yield folder
        finally:
            if os.path.ismount(folder / "small"):
                subprocess.run(["umount", str(folder / "small")], check=True)


def run(folder: Path, ranks: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    more = ["--nproc", str(ranks)] if arguments[0] == "train" else []
    return subprocess.run(
        [sys.executable, "-m", "dapo", *arguments, *more],
        cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip


def main(names: list[str]) -> bool:
    found, is_good = [], True
    for mistake in MISTAKES:
        if names and mistake.name not in names:
            continue
        for ranks in (1, 2):
            with prepared(mistake) as folder:
                start = time.perf_counter()
                arguments = list(mistake.command) or ["train", "run.yaml", *mistake.options]
                done = run(folder, ranks, arguments)
                seconds = time.perf_counter() - start
                last = (
                    (done.stdout.splitlines() or [""])[-1].replace(str(folder), "…").replace(f"{ROOT}/", "")
                )
            errors = sum(line.startswith("error: ") for line in done.stdout.splitlines())
            good = last.startswith("error: ") and mistake.words in last
            good = (
                good and errors == 1 and done.returncode == mistake.status and "Traceback" not in done.stdout
            )
            is_good = is_good and good
            verdict = f"{'good' if good else 'BAD '} {mistake.name}, {ranks}: {done.returncode}"
            print(f"{verdict} {seconds:.1f} s {last}", flush=True)
            if not good:
                print("    | " + "\n    | ".join(done.stdout.splitlines()[-15:]), flush=True)
            found.append(
                [
                    mistake.name,
                    ranks,
                    done.returncode,
                    f"{seconds:.1f}",
                    "yes" if good else "**no**",
                    last.replace("|", "\\|"),
                ]
            )
    text = heading("Mistakes of a newcomer, and the last line that `dapo train` prints")
    text += (
        "\nGood: the last line is the only one that begins with “error: ”, it names the thing, there is no "
    )
    text += "traceback, and the exit status is 2 for what the user wrote, 1 for what broke.\n\n"
    header = ["mistake", "ranks", "status", "seconds", "good", "last line"]
    if not names:
        save("mistakes.md", text + table(header, found))
    return is_good


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
