"""Runs a command in this process, which may be a rank of a run. What ends it becomes a line and a status."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from dapo import files
from dapo.command import launch
from dapo.command.parse import version
from dapo.command.restart import Restarts
from dapo.config import Config, ConfigError, Parallel, load
from dapo.model import hub
from dapo.plan import methods, semantics, stack
from dapo.plan.plan import describe, make_plan
from dapo.types import Interrupted, Stopped, reason
from dapo.watch import last_line
from dapo.watch.rank import guard

NONE: set[str] = set()  # of what is on the hub


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Run the command `args`, which was parsed from `argv`. Return the exit status."""
    try:
        if args.command in (
            alone := {
                "report": _report,
                "doctor": _doctor,
                "metrics": _metrics,
                "config": _options,
                "init": _init,
            }
        ):
            return alone[args.command](args)
        config = load(args.config, args.overrides)
        needs = {
            "train": hub.EVERYTHING,
            "mismatch": hub.EVERYTHING,
            "eval": {"weights", "eval"},
            "bench": NONE,
            "plan": NONE,
        }
        if local := hub.overrides(config, needs[args.command]):
            config, argv = config.changed(local), [*argv, *local]  # ranks do not ask the hub again
        if args.command == "plan":
            return _plan(config, args)
        if fault := stack.trainer_fault():
            raise ConfigError(fault)
        files.shorten_tmpdir(os.environ.get("LOCAL_RANK", "0") == "0")
        if args.command == "eval":
            models = [hub.model(path, option="--model") for path in args.model or []]
            args.model = models or [config.policy.model]
            return _run(config, args)
        restarts = getattr(args, "restarts", 0)
        num_ranks = _num_ranks(config, args.nproc, restarts)
        if "RANK" in os.environ:
            return _run(config, args)
        ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
        print(f"dapo {version()}: {args.config} → {config.run.dir}, {ranks}", flush=True)
        if num_ranks == 1 and not restarts:
            return _run(config, args)
        return launch.launch(argv, num_ranks, Restarts(config.run, restarts))
    except ConfigError as error:
        return _fail(error, last_line.is_first_here())


def _num_ranks(config: Config, asked: int | None, restarts: int = 0) -> int:
    """Return how many ranks this process is to launch; 1: it is the only one, or one of torchrun's.

    Raises:
        ConfigError: the layout does not take so many, or another launcher has started several of this.
    """
    if "RANK" in os.environ:
        of_launcher = int(os.environ.get("LOCAL_WORLD_SIZE", asked or 1))
        if asked not in (None, of_launcher):
            here = f"RANK={os.environ['RANK']} says that this is one of a launcher's {of_launcher} ranks"
            raise ConfigError(f"--nproc {asked}: {here}: leave --nproc out, or unset RANK")
        if restarts and not last_line.is_launched():
            remedy = "give torchrun --max-restarts, or unset RANK"
            raise ConfigError(f"--restarts {restarts}: this is a rank of another launcher: {remedy}")
        return 1
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if (tasks := os.environ.get(name, "1")) != "1":
            how = "start one on each machine, with torchrun"
            raise ConfigError(f"{name}={tasks}: {tasks} launchers of the same run were started: {how}")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # of a job script: they mean no rank of this run
    num_ranks = asked or config.parallel.least_world
    config.parallel.data(num_ranks)
    return num_ranks


def _report(args: argparse.Namespace) -> int:
    from dapo.report import page, serve

    if args.serve:
        serve.serve(args.runs, args.samples, args.port, lambda text: print(text, flush=True))
        return 0
    made, warnings = page.write(args.runs, args.out, args.samples)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(made)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from dapo.command import doctor

    findings = list(doctor.examine())
    print("\n".join(doctor.describe(findings)))
    return int(any(finding.state == "wrong" for finding in findings))


def _init(args: argparse.Namespace) -> int:
    from dapo.command import init

    machine = init.machine_of(args.gpu, args.gpus)
    init.check_new(args.out)  # before the work
    print("\n".join(init.write(args.out, init.look(args.model, args.data), machine)))
    return 0


def _options(args: argparse.Namespace) -> int:
    from dapo.config import reference

    if args.names and (args.markdown or args.schema):
        raise ConfigError(f"dapo config {' '.join(args.names)}: --markdown and --schema are of all options")
    if args.markdown or args.schema:
        print(reference.markdown() if args.markdown else reference.schema(), end="")
        return 0
    found = [
        each for each in reference.options() if not args.names or any(n in each.name for n in args.names)
    ]
    if not found:
        raise ConfigError(f"no option is called {', '.join(args.names)}: see dapo config")
    print(reference.text(found), end="")
    return 0


def _metrics(args: argparse.Namespace) -> int:
    from dapo.report import glossary

    if args.names and args.markdown:
        raise ConfigError(f"dapo metrics {' '.join(args.names)}: --markdown is of all metrics")
    if args.markdown:
        print(glossary.markdown(), end="")
        return 0
    found = [each for each in glossary.METRICS if not args.names or any(n in each.name for n in args.names)]
    if not found:
        raise ConfigError(f"no metric is called {', '.join(args.names)}: see dapo metrics")
    print("\n\n".join(metric.describe() for metric in found))
    return 0


def _plan(config: Config, args: argparse.Namespace) -> int:
    """Return 0 if it fits, or if only choices were asked for."""
    if args.diff:
        print(f"method: {methods.name(config)}")
        print("\n".join(semantics.diff(config, args.diff) or [f"nothing departs from {args.diff}"]))
        return 0
    if args.choices:
        print("\n".join(f"{choice.name}: {choice.value}" for choice in semantics.choices(config)))
        return 0
    plan = make_plan(config, args.gpu, args.world_size, args.mean_length, args.transformer_engine)
    print("\n".join(describe(plan, _sampling(config, args.record))))
    return 0 if plan.fits else 1


def _sampling(config: Config, path: Path | None) -> list[str]:
    """Return the plan's lines about sampling, by the record at `path`; by default the run's own, if any."""
    found = config.run.dir / "prompts.parquet"  # record.NAME
    if path is None and not found.is_file():
        return []
    from dapo.rollout import estimate  # needs numpy

    return estimate.describe(path or found, config.rollout)


def _run(config: Config, args: argparse.Namespace) -> int:
    """Train, evaluate or measure."""
    guard(config.engine.limits.exit)
    if last_line.is_orphan():
        return 1  # nobody waits for it any more
    # torch and Megatron take seconds to import: not before the config is known to be good
    from dapo.mesh import FailedElsewhere, Mesh, is_lost, set_gpu_environment

    set_gpu_environment(config)  # importing the policy asks for devices
    from dapo.assemble import evaluate_models
    from dapo.checkpoint import CheckpointError
    from dapo.command.bench import bench
    from dapo.command.mismatch import mismatch
    from dapo.policy.megatron import PolicyError
    from dapo.rollout.pending import RolloutError
    from dapo.train import train

    mesh = None
    try:
        if args.command == "train":
            mesh = Mesh(config.parallel)
            train(config, mesh)
        elif args.command == "bench":
            mesh = Mesh(config.parallel)
            bench(config, mesh, args.steps, args.mean_length)
        elif args.command == "mismatch":
            mesh = Mesh(config.parallel)
            mismatch(config, mesh, args.responses, args.sampled_by)
        else:
            mesh = Mesh(Parallel(tensor=1))
            with files.run_directory(config.run.dir) if mesh.is_main else nullcontext():
                evaluate_models(config, mesh, args.model)
            if mesh.is_main:
                print(f"scores: {config.run.dir / 'eval.json'}")
        return 0
    except FailedElsewhere as error:
        return _fail(error, is_saying=False, is_users=error.is_users)
    except Stopped as stop:
        status = _stop(stop, config, is_saying=mesh is None or mesh.is_main)
        if mesh and stop.is_saved:
            mesh.wait_for_main()
        return status
    except (ConfigError, CheckpointError, PolicyError, RolloutError) as error:
        is_first = mesh.is_first_to_fail() if mesh else last_line.is_first_here()
        return _fail(error, is_first, isinstance(error, ConfigError), isinstance(error, RolloutError))
    except Exception as error:  # noqa: BLE001  # a bug: its traceback is kept once, not once a rank
        if mesh and is_lost(error):
            return _lost() if mesh.is_first_to_fail() else 1
        if mesh is None or mesh.is_first_to_fail():
            last_line.say(last_line.of_bug(error, config.run.dir), 1)
        return 1


def _lost() -> int:
    line = f"error: another rank's process has ended, or cannot be reached; {last_line.LOST}"
    return last_line.say(line, 1, is_echo=True)


def _stop(stop: Stopped, config: Config, is_saying: bool) -> int:
    """Say why the run stopped, and whether it can go on. Return the exit status."""
    again = "run.resume=auto goes" if isinstance(config.run.resume, int) else "the same command goes"
    saved = f"; saved in {config.run.dir}, {again} on from there" if stop.is_saved else ""
    line = ("interrupted" if isinstance(stop, Interrupted) else f"error: {stop}") + saved
    status = 128 + stop.signal if isinstance(stop, Interrupted) else 1
    return last_line.say(line, status) if is_saying else status


def _fail(error: Exception, is_saying: bool, is_users: bool = True, is_final: bool = False) -> int:
    """Say the error in one line, if this rank is to. Return the exit status."""
    status = 2 if is_users else 1
    return last_line.say(f"error: {reason(error)}", status, is_final=is_final) if is_saying else status
