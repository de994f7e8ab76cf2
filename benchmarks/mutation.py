"""How many small faults in the core are noticed by the tests.

Faults (see mutants.py) are drawn evenly over the lines of the core. Each stands in a copy of the working
tree, where the tests of its file must fail; a process that has imported the heavy packages forks for each.
Results are appended to a file, so that a run can be continued.

python benchmarks/mutation.py --count 300 --seed 1
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import record
from mutants import Mutant, draw

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[threads] = "1"  # before torch: the processes that fork have no threads

ROOT = Path(__file__).parents[1]
EQUIVALENT = Path(__file__).parent / "mutation_equivalent.json"
ROOMS = {
    "rollout": ["dapo/rollout/*.py"],
    "learn": ["dapo/learn/*.py"],
    "reward": ["dapo/reward/*.py"],
    "engine": [
        f"dapo/engine/{name}.py"
        for name in ("generate", "endpoint", "client", "buckets", "checksums", "decoding")
    ],
    "run": [f"dapo/{name}.py" for name in ("checkpoint", "files", "mesh", "sampler", "config/__init__")],
    "plan": ["dapo/plan/semantics.py"],
    "policy": ["dapo/policy/metrics.py", "dapo/policy/schedule.py"],
    "kernels": ["kernels/dapo_kernels/reference.py", "kernels/dapo_kernels/logits_torch.py"],
}
D = "tests/dapo"
ROLLOUT = [f"{D}/rollout/test_{name}.py" for name in ("rollouts", "step", "pending")]
PROMPTS = [f"{D}/rollout/test_{name}.py" for name in ("prompts", "data_files")]
REWARD = [f"{D}/reward/test_{name}.py" for name in ("reward", "worker", "pool")]
CLIENT = [f"tests/sglang/test_{name}.py" for name in ("generate", "client_faults", "client")]
WEIGHTS = "tests/sglang/test_weight_faults.py::test_{}"
BUCKETS = (
    "buckets_hold_every_byte_in_order_within_their_size",
    "buckets_are_as_full_as_they_can_be_but_for_a_small_first_one",
    "a_bucket_is_left_alone_while_the_next_is_filled",
)
CHECKSUMS = (
    "checksums_are_of_the_parameters_as_a_server_shards_them",
    "checksums_of_experts_are_of_all_of_a_layer_together",
    "the_digest_for_gpus_is_what_sglangs_kernel_computes",
)
# Tests of a file, the fastest first; those that start servers or torchrun only where nothing else covers it
TESTS: dict[str, list[str]] = {
    "dapo/rollout/buffer.py": ROLLOUT,
    "dapo/rollout/data_files.py": [*PROMPTS[::-1], f"{D}/rollout/test_evaluate.py"],
    "dapo/rollout/dump.py": [
        f"{D}/rollout/test_dump.py",
        f"{D}/test_token_fields.py",
        *ROLLOUT,
        f"{D}/report/test_samples.py",
    ],
    "dapo/rollout/evaluate.py": [f"{D}/rollout/test_evaluate.py", f"{D}/rollout/test_step.py"],
    "dapo/rollout/ground_truth.py": [*PROMPTS[::-1], f"{D}/rollout/test_evaluate.py"],
    "dapo/rollout/parquet.py": [*PROMPTS, f"{D}/rollout/test_step.py"],
    "dapo/rollout/pending.py": ROLLOUT[::-1],
    "dapo/rollout/prompts.py": [*PROMPTS, f"{D}/rollout/test_render.py", *ROLLOUT],
    "dapo/rollout/render.py": [f"{D}/rollout/test_render.py", *PROMPTS],
    "dapo/rollout/rollouts.py": [*ROLLOUT, f"{D}/rollout/test_evaluate.py"],
    "dapo/rollout/rows.py": [*PROMPTS, f"{D}/rollout/test_evaluate.py"],
    "dapo/learn/advantages.py": [f"{D}/learn/test_advantages.py", f"{D}/learn/test_batch.py"],
    "dapo/learn/batch.py": [f"{D}/learn/test_batch.py", f"{D}/test_token_fields.py"],
    "dapo/learn/objective.py": [f"{D}/learn/test_objective.py", f"{D}/learn/test_batch.py"],
    "dapo/learn/packing.py": [f"{D}/learn/test_packing.py", f"{D}/learn/test_batch.py"],
    "dapo/learn/traces.py": [f"{D}/test_token_fields.py", f"{D}/learn/test_batch.py"],
    "dapo/watch/worker.py": [f"{D}/reward/test_guardian.py", *REWARD],
    "dapo/reward/answer.py": [f"{D}/reward/test_answer.py", f"{D}/reward/test_reward.py"],
    "dapo/reward/overlong.py": REWARD,
    "dapo/reward/pool.py": REWARD,
    "dapo/reward/remote.py": [f"{D}/reward/test_remote.py", *REWARD],
    "dapo/reward/worker.py": REWARD,
    "dapo/reward/workers.py": [*REWARD, f"{D}/reward/test_guardian.py"],
    "dapo/engine/buckets.py": [WEIGHTS.format(name) for name in BUCKETS],
    "dapo/engine/checksums.py": [WEIGHTS.format(name) for name in CHECKSUMS],
    "dapo/engine/client.py": CLIENT,
    "dapo/engine/decoding.py": [f"{D}/engine/test_embedded.py"],
    "dapo/engine/endpoint.py": [*CLIENT, "tests/sglang/test_listener.py"],
    "dapo/engine/generate.py": CLIENT,
    "dapo/checkpoint.py": [f"{D}/test_checkpoint.py"],
    "dapo/config/__init__.py": [
        f"{D}/{name}.py"
        for name in ("config/test_config", "plan/test_semantics", "model/test_layout", "test_main")
    ],
    "dapo/files.py": [f"{D}/test_files.py", f"{D}/test_checkpoint.py", f"{D}/test_verify.py"],
    "dapo/mesh.py": ["tests/distributed/test_mesh.py"],
    "dapo/sampler.py": [f"{D}/test_sampler.py"],
    "dapo/plan/semantics.py": [f"{D}/plan/test_semantics.py"],
    "dapo/policy/metrics.py": [f"{D}/policy/test_metrics.py"],
    "dapo/policy/schedule.py": [f"{D}/policy/test_schedule.py", f"{D}/policy/test_megatron.py"],
    "kernels/dapo_kernels/reference.py": ["tests/kernels/test_reference.py"],
    "kernels/dapo_kernels/logits_torch.py": ["tests/kernels/test_policy_loss.py"],
}
OTHERS = {
    "dapo/reward/": [f"{D}/reward/test_{name}.py" for name in ("answer", "expressions")],
    "dapo/rollout/": PROMPTS + ROLLOUT,
}
# imported before the forks; Megatron is not, for dapo/policy/cpu.py rewrites it on its way in
HEAVY = (
    "torch", "torch.distributed.rendezvous", "numpy", "pydantic", "yaml", "pyarrow.parquet",
    "safetensors.torch", "hypothesis", "matplotlib.pyplot", "mpmath",
    "transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
# tests that wait for processes; what only one of them finds must fail it twice
TIMED = ("tests/sglang/", "tests/distributed/", f"{D}/reward/test_pool", f"{D}/reward/test_remote")
MARK = "DAPO_MUTANT"  # in the environment of every process that a mutant's tests start
SECONDS = itertools.count(1_000_000_000)  # times of writing, each once
TIMES, GRACE = 3, 20  # a mutant's tests may take so many times the seconds of the clean run, and so many more


def core() -> dict[str, str]:
    """Return the room of each file of the core."""
    found = {}
    for room, patterns in ROOMS.items():
        for pattern in patterns:
            for path in sorted(ROOT.glob(pattern)):
                if path.name != "__init__.py":
                    found[str(path.relative_to(ROOT))] = room
    return found


def equivalents() -> set[tuple[str, ...]]:
    """Return the mutants that change nothing, each kept with its reason."""
    known = json.loads(EQUIVALENT.read_text())
    return {(each["path"], each["code"], each["before"], each["after"]) for each in known}


def tests_of(path: str) -> list[str]:
    others = [tests for prefix, tests in OTHERS.items() if path.startswith(prefix)]
    return list(dict.fromkeys(TESTS.get(path) or others[0]))


K = TypeVar("K")
Work = tuple[str, str, float, list[str]]  # file, its source, seconds at most, tests


class Job:
    """The tests of one mutant, or of the file as it is, in a process of their own."""

    def __init__(self, folder: Path, path: str, source: str, limit: float, tests: list[str]):
        self.work = (path, source, limit, tests)
        self.folder, self.log, self.start, self.limit = folder, folder / "log.txt", time.monotonic(), limit
        self.mark = f"{folder.name}-{time.monotonic_ns()}"
        self.file, self.original = folder / "tree" / path, (folder / "tree" / path).read_text()
        self._write(source)
        self.pid = os.fork()
        if self.pid == 0:
            self._run(tests)

    def _write(self, source: str) -> None:
        self.file.write_text(source)
        second = next(SECONDS)  # compiled files are known by size and second
        os.utime(self.file, (second, second))

    def _run(self, tests: list[str]) -> None:
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if this runs in the background
            sys.modules["__main__"] = types.ModuleType("__main__")  # none that spawned processes would import
            tree = self.folder / "tree"
            os.chdir(tree)
            for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
                target = self.log if number else os.devnull
                os.dup2(os.open(target, mode | (os.O_CREAT | os.O_APPEND if number else 0)), number)
            sys.path[:] = [str(tree), str(tree / "kernels"), *sys.path[1:]]
            os.environ |= {"PYTHONPATH": f"{tree}:{tree}/kernels", MARK: self.mark}
            options = ["-x", "-q", "--tb=line", "-rfE", "-p", "no:cacheprovider"]
            code = int(pytest.main([*options, f"--basetemp={self.folder}/tmp", *tests]))
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self) -> str | None:
        """Return the verdict if there is one: "survived", "timeout", or the test that failed."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            if time.monotonic() - self.start < self.limit:
                return None
            self._end()
            os.waitpid(self.pid, 0)
            return "timeout"
        self._end()
        if os.waitstatus_to_exitcode(status) == 0:
            return "survived"
        failed = re.findall(
            r"^(?:FAILED|ERROR) ([^\s[]+)", self.log.read_text(errors="replace"), re.MULTILINE
        )
        return failed[0] if failed else f"exit code {os.waitstatus_to_exitcode(status)}"

    def _end(self) -> None:
        """Restore the file. End the tests' processes: their group, and those in sessions of their own."""
        self._write(self.original)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    process.kill()


def copied(folder: Path) -> Path:
    """Copy the working tree, without what git ignores, into folder/tree."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, check=True, cwd=ROOT, text=True).stdout
    for name in names.split("\0"):
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "tree" / name)
    return folder


def run_all(work: deque[tuple[K, Work]], folders: list[Path]) -> Iterator[tuple[K, str, Job]]:
    """Run the work, one in every folder at a time; yield key and verdict. More may be added meanwhile."""
    running = dict[Path, tuple[K, Job]]()
    try:
        while work or running:
            for folder in folders:
                if folder not in running and work:
                    key, one = work.popleft()
                    running[folder] = (key, Job(folder, *one))
            time.sleep(0.05)
            for folder, (key, job) in list(running.items()):
                if verdict := job.poll():
                    del running[folder]
                    yield key, verdict, job
                    job.log.unlink(missing_ok=True)
    finally:  # the benchmark is ended: a mutant may loop for ever
        for _, job in running.values():
            job._end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="only files whose path begins so")
    parser.add_argument("--keep", type=Path, help="file of results; a run continues what is there")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    keep = args.keep or ROOT / f"runs/mutation-{args.seed}.jsonl"
    keep.parent.mkdir(parents=True, exist_ok=True)

    rooms = {path: room for path, room in core().items() if path.startswith(args.only)}
    sources = {path: (ROOT / path).read_text() for path in rooms}
    mutants = draw(sources, args.count, args.seed, equivalents())
    done = [json.loads(line) for line in keep.read_text().splitlines()] if keep.exists() else []
    for name in HEAVY:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch, keep.open("a") as results:
        folders = [copied(Path(scratch) / str(number)) for number in range(args.jobs)]

        def add(row: dict[str, Any], job: Job) -> None:
            row["seconds"] = round(time.monotonic() - job.start, 1)
            done.append(row)
            print(json.dumps(row, ensure_ascii=False), file=results, flush=True)
            print(*row.values(), flush=True)

        limits = {row["clean"]: row["seconds"] for row in done if "clean" in row}
        paths = sorted({mutant.path for mutant in mutants} - set(limits))
        clean = deque((path, (path, sources[path], 3600.0, tests_of(path))) for path in paths)
        for path, verdict, job in run_all(clean, folders):
            if verdict != "survived":
                print(job.log.read_text())
                sys.exit(f"the tests of {path} fail without a mutant; the same command continues")
            add({"clean": path}, job)
            limits[path] = done[-1]["seconds"]
        known, failed = {_name(row) for row in done}, dict[Mutant, str]()
        work = deque[tuple[Mutant, Work]]()
        for m in mutants:
            limit = TIMES * limits[m.path] + GRACE
            if _name(vars(m)) not in known:
                work.append((m, (m.path, m.change.apply(sources[m.path]), limit, tests_of(m.path))))
        for mutant, verdict, job in run_all(work, folders):
            if verdict.startswith(TIMED) and failed.get(mutant) != verdict:
                # on a busy machine it may fail by itself: once more, it first
                failed[mutant] = verdict
                work.append((mutant, (*job.work[:3], [verdict, *tests_of(mutant.path)])))
                continue
            row = {name: value for name, value in vars(mutant).items() if name != "change"}
            add(row | {"verdict": verdict}, job)
    names = {_name(vars(mutant)) for mutant in mutants}
    report([row for row in done if _name(row) in names], rooms)


def _name(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("path", "line", "before", "after"))


def report(rows: list[dict[str, Any]], rooms: dict[str, str]) -> None:
    """Write the result page: a table by room, and the survivors."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for room in (rooms[row["path"]], "all"):
            verdict = row["verdict"] if row["verdict"] in ("survived", "timeout") else "found"
            counts[room].update({"drawn": 1, verdict: 1, "seconds": row["seconds"]})
    table = record.table(
        ["room", "mutants", "found", "by time limit", "survivors", "% found", "minutes of a job"],
        [
            (room, n["drawn"], n["drawn"] - n["survived"], n["timeout"], n["survived"],
             f"{100 - 100 * n['survived'] / n['drawn']:.0f}", f"{n['seconds'] / 60:.0f}")
            for room, n in sorted(counts.items(), key=lambda item: item[0] == "all")
        ],
    )  # fmt: skip
    survivors = [
        f"- `{row['path']}:{row['line']}` {row['kind']}: `{row['before']}` → `{row['after']}`"
        for row in sorted(rows, key=lambda row: (row["path"], row["line"]))
        if row["verdict"] == "survived"
    ]
    record.save("mutation.md", "\n".join([record.heading("Mutants of the core"), table, *survivors, ""]))


if __name__ == "__main__":
    main()
