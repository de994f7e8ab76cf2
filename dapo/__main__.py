"""The command line: python -m dapo train|eval|plan CONFIG.yaml [section.key=value …]; train under torchrun
for several ranks.

python -m dapo report RUN [RUN …] shows what runs left in their directories.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from dapo.config import Config, ConfigError, Parallel, load
from dapo.plan import semantics
from dapo.plan.plan import describe, make_plan
from dapo.plan.time import HARDWARE
from dapo.watch.rank import guard


def main(argv: list[str]) -> int:
    """Run the command. Return the exit status."""
    args = _parse(argv)
    is_printing = os.environ.get("RANK", "0") == "0"
    try:
        if args.command == "report":
            return _report(args)
        config = load(args.config, args.overrides)
        if args.command == "plan":
            return _plan(config, args)
    except ConfigError as error:
        return _fail(error, is_printing)
    return _run(config, None if args.command == "train" else args.model or [config.policy.model])


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dapo", description="DAPO (arXiv:2503.14476) on Megatron-core")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train", help="run Algorithm 1, from the run's newest checkpoint if there is one"
    )
    evaluate = commands.add_parser(
        "eval", help="evaluate models on the config's eval.data; compare with the first"
    )
    add = evaluate.add_argument
    add(
        "--model",
        action="append",
        type=Path,
        help="Hugging Face directory, may be repeated; default policy.model",
    )
    plan = commands.add_parser(
        "plan", help="memory, time, layout and the meaning of the numbers, before a launch"
    )
    add = plan.add_argument
    add("--gpu", choices=list(HARDWARE), default="h100", help="the device to plan for; default h100")
    add(
        "--world-size",
        type=int,
        metavar="N",
        help="processes, one a device; default tensor × pipeline × context",
    )
    add(
        "--mean-length",
        type=int,
        metavar="N",
        help="tokens of a sample, for the times; default half of the longest",
    )
    add("--transformer-engine", action="store_true", help="with its layers instead of the plain ones")
    add(
        "--choices",
        action="store_true",
        help="print every choice that a reader of the curves has to know, instead",
    )
    add(
        "--diff",
        choices=["paper", "verl"],
        help="print where the config departs from it, and why one would, instead",
    )
    for command in (train, evaluate, plan):
        command.add_argument("config", help="YAML file; every option is in dapo/config.py")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="later wins")
    report = commands.add_parser(
        "report", help="one HTML page of runs: curves, and a browser of dumped samples"
    )
    add = report.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory (run.dir)")
    add(
        "--out",
        type=Path,
        help="the page; default report.html in the first run's directory. A PNG goes beside it",
    )
    add(
        "--samples",
        type=float,
        default=16,
        metavar="MIB",
        help="size of dumped samples in the page; default 16",
    )
    return parser.parse_args(argv)


def _report(args: argparse.Namespace) -> int:
    from dapo.report import page

    made, warnings = page.write(args.runs, args.out, args.samples)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(made)
    return 0


def _plan(config: Config, args: argparse.Namespace) -> int:
    """Return 0 if it fits, or if only choices were asked for."""
    if args.diff:
        print("\n".join(semantics.diff(config, args.diff) or [f"nothing departs from {args.diff}"]))
        return 0
    if args.choices:
        print("\n".join(f"{choice.name}: {choice.value}" for choice in semantics.choices(config)))
        return 0
    plan = make_plan(config, args.gpu, args.world_size, args.mean_length, args.transformer_engine)
    print("\n".join(describe(plan)))
    return 0 if plan.fits else 1


def _run(config: Config, models: list[Path] | None) -> int:
    """Train; or evaluate `models`, if there are any."""
    # torch and Megatron take seconds to import: not before the config is known to be good
    from dapo.assemble import evaluate_models
    from dapo.checkpoint import CheckpointError
    from dapo.mesh import FailedElsewhere, Mesh
    from dapo.policy.megatron import PolicyError
    from dapo.rollout.pending import RolloutError
    from dapo.train import train
    from dapo.types import Interrupted, Stopped

    guard(config.engine.limits.exit)
    mesh = None
    try:
        if models is None:
            mesh = Mesh(config.parallel)
            train(config, mesh)
        else:
            mesh = Mesh(Parallel(tensor=1))
            evaluate_models(config, mesh, models)
        return 0
    except FailedElsewhere:
        return 1
    except Stopped as stop:
        is_interrupted = isinstance(stop, Interrupted)
        if mesh is None or mesh.is_main:
            saved = (
                f"; saved in {config.run.dir}, the same command goes on from there" if stop.is_saved else ""
            )
            print(("interrupted" if is_interrupted else f"error: {stop}") + saved, file=sys.stderr)
        return 130 if is_interrupted else 1
    except (ConfigError, CheckpointError, PolicyError, RolloutError) as error:
        return _fail(error, mesh.is_first_to_fail() if mesh else os.environ.get("RANK", "0") == "0")
    except Exception:  # noqa: BLE001  # a bug: print its traceback once, not once a rank
        if mesh is None or mesh.is_first_to_fail():
            traceback.print_exc()
        return 1


def _fail(error: Exception, is_printing: bool) -> int:
    if is_printing:
        print(f"error: {error}", file=sys.stderr)
    return 1


def end(status: int) -> NoReturn:
    """Exit at once, although other ranks may be waiting in a collective; end child processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(status)


if __name__ == "__main__":
    end(main(sys.argv[1:]))
