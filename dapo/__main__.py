"""The command line: python -m dapo train|eval|plan CONFIG.yaml [section.key=value …]; train under torchrun
for more than one process.

python -m dapo report RUN [RUN …] shows what runs have left in their directories.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from dapo import config
from dapo.plan import semantics
from dapo.plan.plan import HARDWARE, describe, make_plan


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dapo", description="DAPO (arXiv:2503.14476) on Megatron-core")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="run Algorithm 1, going on from the run's newest checkpoint")
    evaluate = commands.add_parser(
        "eval",
        help="evaluate models on the config's eval.data, the later ones against the first; one process",
    )
    evaluate.add_argument(
        "--model",
        action="append",
        type=Path,
        help="Hugging Face directory, may be repeated; default policy.model",
    )
    plan = commands.add_parser(
        "plan",
        help="memory, time and layout, and what the run's numbers will mean, before anything is launched",
    )
    plan.add_argument(
        "--gpu", choices=list(HARDWARE), default="h100", help="the device to plan for; default h100"
    )
    plan.add_argument(
        "--world-size", type=int, metavar="N", help="processes, one a device; default tensor × pipeline"
    )
    plan.add_argument(
        "--mean-length",
        type=int,
        metavar="N",
        help="tokens of a sample, for the times; default half of the longest",
    )
    plan.add_argument(
        "--transformer-engine", action="store_true", help="with its layers instead of the plain ones"
    )
    plan.add_argument(
        "--choices", action="store_true", help="instead, every choice that a reader of the curves has to know"
    )
    plan.add_argument(
        "--diff",
        choices=["paper", "verl"],
        help="instead, where the config departs from it, with the reason one would",
    )
    for command in (train, evaluate, plan):
        command.add_argument("config", help="YAML file; every option is in dapo/config.py")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="later wins")
    page = commands.add_parser(
        "report", help="one HTML page of one run or several: curves, and a browser of dumped samples"
    )
    page.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory (run.dir)")
    page.add_argument(
        "--out",
        type=Path,
        help="the page; default report.html in the first run's directory. A PNG of the curves goes beside it",
    )
    page.add_argument(
        "--samples",
        type=float,
        default=16,
        metavar="MIB",
        help="how much of the page dumped samples may take; default 16",
    )
    args = parser.parse_args(argv)
    if args.command == "report":
        return _report(args)
    try:
        options = config.load(args.config, args.overrides)
    except config.ConfigError as error:
        return _fail(error, is_told=os.environ.get("RANK", "0") == "0")
    if args.command == "plan":
        return _plan(options, args)
    return _run(options) if args.command == "train" else _run(options, args.model or [options.policy.model])


def _report(args: argparse.Namespace) -> int:
    from dapo.report import page

    try:
        made, warnings = page.write(args.runs, args.out, args.samples)
    except config.ConfigError as error:
        return _fail(error, is_told=True)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(made)
    return 0


def _plan(options: config.Config, args: argparse.Namespace) -> int:
    """0: it fits, or only the choices were asked for."""
    fits = True
    if args.diff:
        lines = semantics.diff(options, args.diff) or [f"nothing departs from {args.diff}"]
    elif args.choices:
        lines = [f"{choice.name}: {choice.value}" for choice in semantics.choices(options)]
    else:
        try:
            made = make_plan(options, args.gpu, args.world_size, args.mean_length, args.transformer_engine)
        except config.ConfigError as error:
            return _fail(error, is_told=True)
        fits, lines = made.fits, describe(made)
    print("\n".join(lines))
    return 0 if fits else 1


def _run(options: config.Config, models: list[Path] | None = None) -> int:
    """Train, or evaluate `models`."""
    from dapo.assemble import evaluate_models

    # torch and Megatron take seconds: not before the config is known to be good
    from dapo.checkpoint import CheckpointError
    from dapo.mesh import FailedElsewhere, Mesh
    from dapo.policy.megatron import PolicyError
    from dapo.rollout.rollouts import RolloutError
    from dapo.train import train
    from dapo.types import EngineError, Interrupted

    mesh = None
    try:
        mesh = Mesh(options.parallel if models is None else config.Parallel(tensor=1))
        train(options, mesh) if models is None else evaluate_models(options, mesh, models)
        return 0
    except FailedElsewhere:
        return 1
    except Interrupted as stop:
        is_error = isinstance(stop, EngineError)
        if mesh is None or mesh.is_main:
            saved = (
                f"; saved in {options.run.dir}, the same command goes on from there" if stop.is_saved else ""
            )
            print(f"{f'error: {stop}' if is_error else 'interrupted'}{saved}", file=sys.stderr)
        return 1 if is_error else 130
    except (config.ConfigError, CheckpointError, PolicyError, RolloutError) as error:
        return _fail(error, is_told=mesh.is_first_to_fail() if mesh else os.environ.get("RANK", "0") == "0")
    except Exception:  # noqa: BLE001  # a bug: its traceback, once, not once per rank that it takes along
        if mesh is None or mesh.is_first_to_fail():
            traceback.print_exc()
        return 1


def _fail(error: Exception, is_told: bool) -> int:
    if is_told:
        print(f"error: {error}", file=sys.stderr)
    return 1


def end(status: int) -> NoReturn:
    """Leave at once, past the collectives that other ranks may be waiting in, and take child processes
    along.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(status)


if __name__ == "__main__":
    end(main(sys.argv[1:]))
