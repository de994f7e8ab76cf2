"""The command line: python -m dapo train|eval|plan CONFIG.yaml [section.key=value …]; train under torchrun
for several ranks.

python -m dapo report RUN [RUN …] shows what runs left in their directories.

Exit status: 0 done · 1 something broke · 2 the command, the config or the data are refused · 128 + N stopped
by signal N.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import signal
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from dapo import files
from dapo.config import Config, ConfigError, Parallel, load
from dapo.plan import semantics, stack
from dapo.plan.plan import describe, make_plan
from dapo.plan.time import HARDWARE
from dapo.types import Interrupted, Stopped, reason
from dapo.watch import streams
from dapo.watch.rank import guard

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's, of each rank
LOST = (
    "another rank's process has ended, or cannot be reached: the launcher says which; the steps since the "
    "last checkpoint are lost: the same command goes on from it"
)


def main(argv: list[str]) -> int:
    """Run the command. Return the exit status."""
    try:
        args = _parse(argv)
        if args.command == "report":
            return _report(args)
        config = load(args.config, args.overrides)
        if args.command == "plan":
            return _plan(config, args)
        files.shorten_tmpdir(os.environ.get("LOCAL_RANK", "0") == "0")
        return _run(config, None if args.command == "train" else args.model or [config.policy.model])
    except ConfigError as error:
        return _fail(error, _is_first_here())
    except KeyboardInterrupt:  # before a step could notice it, or the second one
        if os.environ.get("RANK", "0") == "0":
            print("interrupted; not saved", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see {self.prog} --help")


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. Overrides may stand anywhere after the command."""
    parser = _Parser(prog="dapo", description="DAPO (arXiv:2503.14476) on Megatron-core")
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
    if not argv or argv[0] not in commands.choices:
        return parser.parse_args(argv)
    # a subparser of argparse takes no positional argument behind an option
    return commands.choices[argv[0]].parse_intermixed_args(argv[1:], argparse.Namespace(command=argv[0]))


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
    if fault := stack.trainer_fault():
        raise ConfigError(fault)
    # torch and Megatron take seconds to import: not before the config is known to be good
    from dapo.mesh import FailedElsewhere, Mesh, is_lost, set_gpu_environment

    set_gpu_environment()  # importing the policy asks for devices
    from dapo.assemble import evaluate_models
    from dapo.checkpoint import CheckpointError
    from dapo.policy.megatron import PolicyError
    from dapo.rollout.pending import RolloutError
    from dapo.train import train

    guard(config.engine.limits.exit)
    mesh = None
    try:
        if models is None:
            mesh = Mesh(config.parallel)
            train(config, mesh)
        else:
            mesh = Mesh(Parallel(tensor=1))
            with files.run_directory(config.run.dir) if mesh.is_main else nullcontext():
                evaluate_models(config, mesh, models)
            if mesh.is_main:
                print(f"scores: {config.run.dir / 'eval.json'}")
        return 0
    except FailedElsewhere as error:
        return _fail(error, is_printing=False, is_users=error.is_users)
    except Stopped as stop:
        return _stop(stop, config, is_printing=mesh is None or mesh.is_main)
    except (ConfigError, CheckpointError, PolicyError, RolloutError) as error:
        is_first = mesh.is_first_to_fail() if mesh else _is_first_here()
        return _fail(error, is_first, is_users=isinstance(error, ConfigError))
    except Exception as error:  # noqa: BLE001  # a bug: print its traceback once, not once a rank
        if mesh and is_lost(error):
            return _fail(RuntimeError(LOST), mesh.is_first_to_fail(), is_users=False)
        if mesh is None or mesh.is_first_to_fail():
            traceback.print_exc()
        return 1


def _stop(stop: Stopped, config: Config, is_printing: bool) -> int:
    """Print why the run stopped, and whether it can go on. Return the exit status."""
    again = "run.resume=auto goes" if isinstance(config.run.resume, int) else "the same command goes"
    saved = f"; saved in {config.run.dir}, {again} on from there" if stop.is_saved else ""
    line = ("interrupted" if isinstance(stop, Interrupted) else f"error: {stop}") + saved
    if is_printing:
        print(line, file=sys.stderr, flush=True)
    return 128 + stop.signal if isinstance(stop, Interrupted) else 1


def _fail(error: Exception, is_printing: bool, is_users: bool = True) -> int:
    """Print the error in one line, if this rank is to. Return the exit status."""
    if is_printing:
        print(f"error: {reason(error)}", file=sys.stderr, flush=True)
    return 2 if is_users else 1


def _is_first_here() -> bool:
    """True on one rank of a machine that fails before the ranks know each other, so that it prints why.

    Not always rank 0: torchrun ends it as soon as another rank has failed, and it may not fail at all.
    """
    if ERROR_FILE not in os.environ:
        return os.environ.get("RANK", "0") == "0"
    # torchrun's directory of this launch holds one for each of its ranks
    try:
        (Path(os.environ[ERROR_FILE]).parent.parent / "dapo-failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def end(status: int) -> NoReturn:
    """Exit at once, although other ranks may be waiting in a collective; end child processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(status)


if __name__ == "__main__":
    streams.keep_open()
    faulthandler.enable()  # a process that ends in native code says where each thread was
    end(main(sys.argv[1:]))
