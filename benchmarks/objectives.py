"""Is every objective exact in every split, does a planted error show, and what does each cost on a CPU?

python benchmarks/objectives.py [errors|planted|cost|before=CHECKOUT …, default the first three]

errors: against float64 (kernels) and against a plain Hugging Face model in float32 (training), as the tests
measure them. planted: errors that a reader might make, each in a copy of the source, and whether the tests
notice. cost: seconds of each kind of loss, by turns. before: the default loss beside that of a checkout of an
earlier commit: seconds by turns, and the machine code of the Triton kernels.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import ROOT, heading, keep, save, table

KERNELS = "kernels/dapo_kernels"
KERNEL_TESTS = ["tests/kernels/test_reference.py", "tests/kernels/test_linear_policy_loss.py"]
LEARN = ["tests/dapo/learn/test_objective.py", "tests/dapo/learn/test_advantages.py"]
TRITON = ["tests/kernels/test_policy_loss.py::test_the_interpreted_kernels_pass_their_tests"]
SPLITS = ["tests/kernels/test_tensor_parallel.py"]
# what is wrong, the file, a line of it, what it becomes, the tests that should notice
PLANTED = [
    ("cispo: the bound of the other side", f"{KERNELS}/token_losses.py",
     "clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)",
     "clipped = ratio.clamp(1 - objective.clip_high, 1 + objective.clip_low)", KERNEL_TESTS),
    ("cispo: the ratio is not clipped", f"{KERNELS}/token_losses.py",
     "slopes = -clipped * advantages", "slopes = -ratio * advantages", KERNEL_TESTS),
    ("cispo: the ratio has a gradient too", f"{KERNELS}/reference.py",
     "losses = -clipped.detach() * advantages * logprobs", "losses = -clipped * advantages * logprobs",
     KERNEL_TESTS),
    ("cispo, Triton: the ratio is not clipped", f"{KERNELS}/logits_triton.py",
     "slope = -clipped * advantage", "slope = -ratio * advantage", TRITON),
    ("gspo: the ratio is a product, not a geometric mean", f"{KERNELS}/sequences.py",
     "total / count.clamp(min=1)", "total", KERNEL_TESTS),
    ("gspo: the mean is over masked tokens too", f"{KERNELS}/sequences.py",
     "both = torch.stack([values.where(mask, 0.0), mask]).double()",
     "both = torch.stack([values.where(mask, 0.0), torch.ones_like(mask)]).double()", KERNEL_TESTS),
    ("gspo: a token's own slope instead of its sequence's", f"{KERNELS}/token_losses.py",
     "slopes = _sequence_means(slopes, tokens)", "pass", KERNEL_TESTS),
    ("gspo: each context rank has a ratio of its own", f"{KERNELS}/sequences.py",
     "if self.cp_group is not None:", "if False:", SPLITS),
    ("gspo: the context ranks' boundaries are the whole sequence's", "dapo/policy/megatron.py",
     "Sequences(microbatch.cu_seqlens // context, group)", "Sequences(microbatch.cu_seqlens, group)",
     ["tests/distributed/test_parity.py", "-k", "gspo"]),
    ("no_std: divided by the std", "dapo/learn/advantages.py",
     "return [_float32(_centred(r)) for r in rewards]", "return [group_advantages(r) for r in rewards]",
     LEARN),
    ("batch_std: the std of each group", "dapo/learn/advantages.py",
     "return [_float32(c / (std + EPSILON)) for c in centred]",
     "return [_float32(c / (c.std(ddof=1) + EPSILON)) for c in centred]", LEARN),
    ("batch_std: the std of rewards, not of differences", "dapo/learn/advantages.py",
     "std = np.concatenate(centred).std(ddof=1)", "std = np.concatenate(rewards).std(ddof=1)", LEARN),
    ("constant: divided by the tokens there are", "dapo/learn/objective.py",
     "np.full_like(t, num_samples * longest)", "np.full_like(t, sum(x.sum() for x in tokens))", LEARN),
    ("constant: the number of groups, not of samples", "dapo/learn/objective.py",
     "np.full_like(t, num_samples * longest)", "np.full_like(t, len(tokens) * longest)", LEARN),
    ("band: outside counts the bound", "dapo/learn/objective.py",
     "gap.exp().where(_is_inside(gap, objective), 0.0)", "gap.exp().clamp(*objective.importance_band)",
     LEARN),
    ("band: the test is not in logarithms", "dapo/learn/objective.py",
     "gap.exp().where(_is_inside(gap, objective), 0.0)", "gap.exp() * _is_inside(gap, objective)", LEARN),
    ("sequence_mask: a mean over all tokens", "dapo/learn/objective.py",
     "_is_inside(means(gap, corrected), objective)", "_is_inside(means(gap, corrected | True), objective)",
     LEARN),
    ("importance_of=all corrects stale tokens only", "dapo/policy/megatron.py",
     'mask if objective.importance_of == "all" else mask & is_stale', "mask & is_stale",
     ["tests/distributed/test_parity.py", "-k", "band"]),
    ("none: measured weights are applied", "dapo/policy/megatron.py",
     "weights if is_applied else torch.ones_like(weights)", "weights",
     ["tests/distributed/test_parity.py", "-k", "gspo-sample_mean-stale or sample_mean-gspo-stale"]),
]  # fmt: skip


def errors() -> str:
    """Run the tests' measurements in all worlds; return tables of the largest errors."""
    rows: dict[tuple[str, str], dict[int, float]] = {}
    for world in (1, 2, 4):
        for result in _launch("tests.kernels.tensor_parallel", world):
            if "error" in result:
                kind, split, *rest = result["name"].split()
                split = "sequence parallel" if "sequence" in rest else split
                split = {"linear": "vocabulary", "logits": "vocabulary, on logits"}.get(split, split)
                row = rows.setdefault((kind, split), {})
                row[world] = max(row.get(world, 0.0), result["error"])
    text = """
## The fused losses against the reference in float64

Largest relative error of loss, log-probs, entropy and both gradients, in float32, of the interpreted Triton
kernels and of their twin in torch, in chunks of several sizes. context: every sequence is split over the
ranks.

"""
    header = ["kind", "split", *(f"{world} ranks" for world in (1, 2, 4))]
    lines = [[*key, *(f"{row[world]:.1e}" for world in (1, 2, 4))] for key, row in rows.items()]
    text += table(header, lines)
    text += """
## Training against a plain Hugging Face model

Three updates, float32 on both sides: relative error of the first update's gradient, of the three gradient
norms, and the largest difference of a parameter after them.

"""
    lines = []
    for world in (1, 2, 4):
        for r in _launch("tests.distributed.parity", world, "cispo|gspo|no-std|band|mask"):
            norms = max(abs(a - b) / b for a, b in r["grad_norms"])
            lines.append([r["name"], f"{r['gradients']:.1e}", f"{norms:.1e}", f"{r['params']:.1e}"])
    return text + table(["case", "gradient", "norms", "parameters"], lines)


def _launch(module: str, world: int, *arguments: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(world),
            "-m",
            module,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, str(out), *arguments], check=True, cwd=ROOT, env=environment)
        return json.loads(out.read_text())


def planted() -> str:
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignored)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{copy}:{copy}/kernels"}
        for name, file, line, becomes, tests in PLANTED:
            path = copy / file
            source = path.read_text()
            assert source.count(line) == 1, f"{name}: {file} has {source.count(line)} × {line}"
            path.write_text(source.replace(line, becomes))
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
            done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
            path.write_text(source)
            failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
            assert done.returncode == 0 or failed, done.stdout[-2000:] + done.stderr[-2000:]
            first = failed.group(1).rpartition("::")[2] if failed else ""
            rows.append([name, "yes" if failed else "**no**", f"`{first}`" if first else ""])
            print(rows[-1], flush=True)
    found = sum(row[1] == "yes" for row in rows)
    text = f"\n## Planted errors\n\n{found} of {len(rows)} are noticed.\n\n"
    return text + table(["error", "noticed", "by, first"], rows)


def cost(rounds: int = 9) -> str:
    """Time each kind of loss, forward and backward, by turns."""
    import torch
    from dapo_kernels import linear_logprobs, linear_policy_loss

    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    num_tokens, hidden_size, vocab = 1024, 256, 32_000
    hidden = torch.randn(num_tokens, hidden_size, generator=g)
    weight = torch.randn(vocab, hidden_size, generator=g) / 8
    targets, mask = torch.randint(vocab, (num_tokens,), generator=g), torch.ones(num_tokens, dtype=torch.bool)
    old = linear_logprobs(hidden, weight, targets, mask) + 0.1 * torch.randn(num_tokens, generator=g)
    advantages = torch.randn(num_tokens, generator=g)
    kinds = {"dapo": {}, "cispo": {"kind": "cispo"},
             "gspo": {"kind": "gspo", "cu_seqlens": torch.arange(0, num_tokens + 1, 128)}}  # fmt: skip
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, options in kinds.items():
            leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            start = time.perf_counter()
            arguments = (targets, old, advantages, mask)
            linear_policy_loss(*leaves, *arguments, clip_low=0.2, clip_high=0.28, **options).loss.backward()
            seconds[kind].append(time.perf_counter() - start)
    rows = []
    for kind, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["dapo"], strict=True)]
        rows.append([kind, f"{statistics.median(taken):.3f}", f"{statistics.median(ratios):.2f}"])
    text = f"""
## Cost

`linear_policy_loss` and its backward pass in plain torch on one core, {num_tokens} tokens, hidden size
{hidden_size}, {vocab} ids, float32; {rounds} rounds by turns, medians. gspo takes all log-probs first: one
matrix product more.

"""
    return text + table(["kind", "seconds", "of dapo's"], rows)


TIMED = """
import sys, time, torch
from dapo_kernels import linear_logprobs, linear_policy_loss
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
hidden, weight = torch.randn(1024, 256, generator=g), torch.randn(32000, 256, generator=g) / 8
targets, mask = torch.randint(32000, (1024,), generator=g), torch.ones(1024, dtype=torch.bool)
old = linear_logprobs(hidden, weight, targets, mask) + 0.1 * torch.randn(1024, generator=g)
advantages = torch.randn(1024, generator=g)
for _ in sys.stdin:
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    start = time.perf_counter()
    linear_policy_loss(*leaves, targets, old, advantages, mask, clip_low=0.2, clip_high=0.28).loss.backward()
    print(time.perf_counter() - start, flush=True)
"""
MACHINE_CODE = """
import hashlib, subprocess, tempfile
import kernel_report
made, compile = [], kernel_report.triton.compile
kernel_report.triton.compile = lambda *a, **k: made.append(compile(*a, **k)) or made[-1]
for arch in kernel_report.ARCHITECTURES:
    for variant in kernel_report.variants():
        column = 1 + (variant.kernel != "row_statistics_kernel")
        for launch in {row[column] for row in kernel_report.TABLE[arch]}:
            kernel_report.compile_one(arch, variant, launch)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(made[-1].asm["cubin"])
                file.flush()
                command = [str(kernel_report.TOOLS / "nvdisasm"), "-c", file.name]
                code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            lines = [line for line in code.splitlines() if not line.lstrip().startswith(("//", "."))]
            digest = hashlib.blake2b("".join(lines).encode(), digest_size=8).hexdigest()
            print(arch, variant.kernel, variant.name, *launch, digest, sep="|")
"""


def before(checkout: str, rounds: int = 30) -> str:
    trees = {"before": Path(checkout).resolve(), "now": ROOT}
    environments = {
        name: os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tree}:{tree}/kernels:{tree}/benchmarks"}
        for name, tree in trees.items()
    }
    pipes: dict = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": "/"}
    processes = {
        name: subprocess.Popen([sys.executable, "-c", TIMED], env=environment, **pipes)
        for name, environment in environments.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    for turn in range(rounds + 2):
        for name in list(trees)[:: 1 if turn % 2 else -1]:
            process = processes[name]
            print(file=process.stdin, flush=True)
            taken = float(process.stdout.readline())
            seconds[name] += [taken] if turn >= 2 else []
    for process in processes.values():
        process.communicate()
    ratios = sorted(now / then for now, then in zip(seconds["now"], seconds["before"], strict=True))
    codes = {}
    for name, environment in environments.items():
        command = [sys.executable, "-c", MACHINE_CODE]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd="/")
        codes[name] = set(done.stdout.splitlines())
    same, known = len(codes["before"] & codes["now"]), len(codes["before"])
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout.strip()
    quarter = len(ratios) // 4
    return f"""
## The default's cost, beside commit {commit}

`linear_policy_loss` and its backward pass as above, a process of each commit, {rounds} rounds by turns:
seconds of this commit / of that one, median {statistics.median(ratios):.3f}
(middle half {ratios[quarter]:.3f}–{ratios[-1 - quarter]:.3f}).

The Triton kernels, compiled for sm_80, sm_90 and sm_100 in every variant that commit knows: {same} of {known}
have the same machine code, instruction by instruction.
"""


def main(*parts: str) -> None:
    text = heading("Objectives: errors, planted errors, cost")
    for part in parts or ("errors", "planted", "cost"):
        name, _, argument = part.partition("=")
        made = {"errors": errors, "planted": planted, "cost": cost, "before": before}[name]
        text += made(argument) if argument else made()
        keep("objectives.md", text)
    save("objectives.md", text)


if __name__ == "__main__":
    main(*sys.argv[1:])
