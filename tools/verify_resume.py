"""Check that a run which stops and resumes equals the run that never stopped.

    python tools/verify_resume.py CONFIG [section.key=value …] [--steps K M] [--nproc N] [--then
    section.key=value … [--then-nproc N]]

It compares K + M steps with K steps, a stop, and M more. In the same layout, on a CPU, they are equal to the
bit. With --then a copy resumes in another layout: samples and learning rate are equal; loss, parameters and
moments up to --tolerance. The exit status is 1 if not. All runs are temporary: run.dir is not touched.

With rollout.max_staleness above 0 batches depend on timing, so no two runs sample the same. Then the run that
stops learns from the rollouts that the other one dumped (rollout.replay): what is compared is the training
alone, not the sampling.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dapo import config, verify


def train(directory: Path, steps: int, nproc: int, options: list[str]) -> None:
    """Train up to `steps` steps in `directory`, from the checkpoint that is there."""
    always = [f"run.dir={directory}", f"run.steps={steps}", "run.resume=auto"]
    always += ["rollout.dump_share=1.0", "eval.data=null"]
    dapo = [sys.executable, "-m", "dapo", "train", "--nproc", str(nproc)]
    subprocess.run([*dapo, *options, *always], check=True, stdout=sys.stderr)


def describe(found: verify.Finding, tolerance: float) -> tuple[str, bool]:
    """Return one line on a finding, and whether its gap is accepted."""
    is_right = found.gap <= (tolerance if found.is_rounded else 0)
    gap = f"differ by {found.gap:.1e}" if found.gap else "equal"
    return f"  {found.what:45}{found.count:6}  {gap}{'' if is_right else '  WRONG'}", is_right


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("options", nargs="+", metavar="CONFIG [section.key=value …]")
    add("--steps", nargs=2, type=int, default=[2, 2], metavar=("K", "M"))
    add("--nproc", type=int, default=1, metavar="N", help="processes; default 1")
    add("--then", nargs="+", default=[], metavar="section.key=value", help="resume in another layout as well")
    add("--then-nproc", type=int, metavar="N", help="processes of the other layout; default as many")
    add(
        "--tolerance", type=float, default=1e-4, help="of the loss, and of the norm of the rest; default 1e-4"
    )
    args = parser.parse_intermixed_args(argv)
    k, m = args.steps
    try:
        is_replay = config.load(args.options[0], args.options[1:]).rollout.max_staleness > 0
    except config.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    are_right = []
    with tempfile.TemporaryDirectory() as directory:
        whole, stopped, moved = (Path(directory) / name for name in ("whole", "stopped", "moved"))
        replay = [f"rollout.replay={whole / 'rollouts'}"] if is_replay else []
        what = ", replaying what it samples" if is_replay else ""
        try:
            train(whole, k + m, args.nproc, args.options)
            train(stopped, k, args.nproc, args.options + replay)
            shutil.copytree(stopped, moved)
            resumes = [("the same layout", stopped, args.nproc, [], 0.0)]
            if args.then:
                nproc = args.then_nproc or args.nproc
                resumes.append((" ".join(args.then), moved, nproc, args.then, args.tolerance))
            for layout, run, nproc, then, tolerance in resumes:
                train(run, k + m, nproc, args.options + replay + then)
                print(f"{k} steps, stopped, {m} more in {nproc} processes, {layout}; ", end="")
                print(f"against {k + m} in one go{what}:")
                for found in verify.runs(whole, run, k, k + m, is_replay):
                    line, is_right = describe(found, tolerance)
                    are_right.append(is_right)
                    print(line)
        except subprocess.CalledProcessError as error:
            print(f"error: one of its runs failed, see above: {' '.join(error.cmd[7:])}", file=sys.stderr)
            return 1
    return 0 if all(are_right) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
