"""Is a run that stops and goes on the run that never stopped? K + M steps against K, stop, resume, M steps;
the exit status is 1 if not.

    python tools/verify_resume.py CONFIG [section.key=value …] [--steps K M] [--nproc N] [--then
    section.key=value … [--then-nproc N]]

To the bit in the same layout, on a CPU. With --then a copy goes on in another layout: what is sampled and the
learning rate are equal, loss, parameters and moments to --tolerance. All of it happens in a temporary
directory: run.dir is not touched.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dapo import verify


def train(directory: Path, steps: int, nproc: int, options: list[str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    always = [
        f"run.dir={directory}",
        f"run.steps={steps}",
        "run.resume=auto",
        "rollout.dump_share=1.0",
        "eval.data=null",
    ]
    subprocess.run([*torchrun, "-m", "dapo", "train", *options, *always], check=True, stdout=sys.stderr)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("options", nargs="+", metavar="CONFIG [section.key=value …]")
    parser.add_argument("--steps", nargs=2, type=int, default=[2, 2], metavar=("K", "M"))
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes; default 1")
    parser.add_argument(
        "--then", nargs="+", default=[], metavar="section.key=value", help="go on in another layout as well"
    )
    parser.add_argument(
        "--then-nproc", type=int, metavar="N", help="processes of the other layout; default as many"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="of the loss, and of the norm of the rest; default 1e-4"
    )
    args = parser.parse_intermixed_args(argv)
    (k, m), is_wrong = args.steps, False
    with tempfile.TemporaryDirectory() as directory:
        whole, stopped, moved = (Path(directory) / name for name in ("whole", "stopped", "moved"))
        try:
            train(whole, k + m, args.nproc, args.options)
            train(stopped, k, args.nproc, args.options)
            shutil.copytree(stopped, moved)
            resumes = [("the same layout", stopped, args.nproc, [], 0.0)]
            if args.then:
                resumes.append(
                    (" ".join(args.then), moved, args.then_nproc or args.nproc, args.then, args.tolerance)
                )
            for layout, run, nproc, then, tolerance in resumes:
                train(run, k + m, nproc, args.options + then)
                print(
                    f"{k} steps, stopped, {m} more in {nproc} processes, {layout}; against {k + m} in one go:"
                )
                for found in verify.runs(whole, run, k, k + m):
                    is_wrong |= (wrong := not found.gap <= tolerance * found.is_rounded)
                    print(
                        f"  {found.what:45}{found.count:6}  "
                        f"{f'differ by {found.gap:.1e}' if found.gap else 'equal'}{'  WRONG' * wrong}"
                    )
        except subprocess.CalledProcessError as error:
            print(f"error: a run of it failed, as told above: {' '.join(error.cmd[7:])}", file=sys.stderr)
            return 1
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
