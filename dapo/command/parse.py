"""Parses the command line. Nothing heavy is imported: `dapo --help` answers at once."""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path
from typing import NoReturn

GPUS = ("a100", "h100", "h800", "h20", "h200", "b200", "cpu")  # as dapo/plan/time.py knows them


class UsageError(ValueError):
    """The command line cannot be understood. The message is one line."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}: see {self.prog} --help")


def version() -> str:
    """Return the version of dapo that is installed."""
    try:
        return metadata.version("dapo-rl")
    except metadata.PackageNotFoundError:  # its folder is on the path, no more
        return "(not installed)"


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. Overrides may stand anywhere after the command.

    Raises:
        UsageError: it cannot be understood.
    """
    parser = _Parser(prog="dapo", description="DAPO (arXiv:2503.14476) on Megatron-core")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    train = commands.add_parser(
        "train", help="run Algorithm 1, from the run's newest checkpoint if there is one"
    )
    train.add_argument(
        "--restarts",
        type=_not_negative,
        default=0,
        metavar="N",
        help="times that a run that has failed starts again from its newest checkpoint; default 0",
    )
    evaluate = commands.add_parser(
        "eval", help="evaluate models on the config's eval.data; compare with the first"
    )
    evaluate.add_argument(
        "--model",
        action="append",
        type=Path,
        help="Hugging Face directory or name on the hub, may be repeated; default policy.model",
    )
    bench = commands.add_parser(
        "bench", help="measure the layout, without weights, data and engine, beside what plan says"
    )
    bench.add_argument("--steps", type=_positive, default=3, metavar="N", help="default 3")
    mismatch = commands.add_parser(
        "mismatch", help="why do engine and policy disagree: stale weights, routing, numbers' types, sampling"
    )
    mismatch.add_argument(
        "--responses", type=_positive, default=64, metavar="N", help="to compare; default 64"
    )
    mismatch.add_argument(
        "--sampled-by",
        type=_not_negative,
        metavar="STEP",
        help="sample by the weights of this checkpoint of the run; default: those of the policy",
    )
    for command in (train, bench, mismatch):
        command.add_argument(
            "--nproc",
            type=_positive,
            metavar="N",
            help="ranks on this machine; default: as few as the layout takes",
        )
    plan = commands.add_parser(
        "plan", help="memory, time, layout and the meaning of the numbers, before a launch"
    )
    _add_plan(plan)
    for command in (plan, bench):
        command.add_argument(
            "--mean-length",
            type=int,
            metavar="N",
            help="tokens of a sample, for the times; default half of the longest",
        )
    for command in (train, evaluate, bench, mismatch, plan):
        command.add_argument("config", help="YAML file; every option: dapo config")
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="section.key=value",
            help="or a YAML file of options, such as a recipe; later wins",
        )
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
    add("--serve", action="store_true", help="serve the page to this machine's browsers; it follows the runs")
    add("--port", type=_port, default=8000, help="of --serve, 0 for a free one; default 8000")
    commands.add_parser("doctor", help="look at this machine: what is there, what is wrong, the remedy")
    metrics = commands.add_parser("metrics", help="what every metric means, and when it is healthy or sick")
    metrics.add_argument(
        "names", nargs="*", metavar="NAME", help="only those whose name contains one of these"
    )
    metrics.add_argument("--markdown", action="store_true", help="the page of the documentation, instead")
    init = commands.add_parser("init", help="write a commented config for a model and a data file")
    add = init.add_argument
    add("model", type=Path, help="Hugging Face directory, or a name on the hub")
    add("data", type=Path, help=".jsonl of {prompt, answer}, or .parquet, or a name on the hub")
    add("--out", type=Path, default=Path("run.yaml"), help="the config; default run.yaml")
    add("--gpu", choices=GPUS, help="the device to plan for; default: this machine's")
    add("--gpus", type=_positive, metavar="N", help="how many; default: this machine's, or 8")
    options = commands.add_parser("config", help="every option of a config: its values, default and meaning")
    options.add_argument(
        "names", nargs="*", metavar="NAME", help="only those whose name contains one of these"
    )
    form = options.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="the page of the documentation, instead")
    form.add_argument("--schema", action="store_true", help="the JSON schema for editors, instead")
    if argv and argv[0] in commands.choices:
        # a subparser of argparse takes no positional argument behind an option
        namespace = argparse.Namespace(command=argv[0], version=False)
        return commands.choices[argv[0]].parse_intermixed_args(argv[1:], namespace)
    args = parser.parse_args(argv)
    if not args.command and not args.version:
        parser.error(f"no command: one of {', '.join(commands.choices)}")
    return args


def _add_plan(plan: argparse.ArgumentParser) -> None:
    add = plan.add_argument
    add("--gpu", choices=GPUS, default="h100", help="the device to plan for; default h100")
    add(
        "--world-size",
        type=int,
        metavar="N",
        help="processes, one a device; default tensor × pipeline × context",
    )
    add("--transformer-engine", action="store_true", help="with its layers instead of the plain ones")
    add(
        "--record",
        type=Path,
        metavar="FILE",
        help="a run's prompts.parquet, to estimate sampling by; default run.dir's, if it is there",
    )
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


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to 65535")
    return int(text)


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)
