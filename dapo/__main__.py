"""The command line: dapo train, eval, bench, plan, report, init, config, metrics, doctor.

Exit status: 0 done · 1 something broke · 2 the command, the config or the data are refused · 128 + N stopped
by signal N.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import traceback
from typing import NoReturn

from dapo.command.parse import UsageError, parse, version
from dapo.watch import last_line, streams


def main(argv: list[str]) -> int:
    """Run the command. Return the exit status."""
    try:
        args = parse(argv)
    except UsageError as error:
        return last_line.say(f"error: {error}", 2) if last_line.is_first_here() else 2
    except SystemExit:  # --help has been printed
        return 0
    if args.version:
        print(version())
        return 0
    try:
        from dapo.command.run import run  # reads YAML, checks options: --help does not wait for it

        return run(args, argv)
    except KeyboardInterrupt:  # before a step could notice it, or the second one
        status = 128 + signal.SIGINT
        is_main = os.environ.get("RANK", "0") == "0"
        return last_line.say("interrupted; not saved", status) if is_main else status


def end(status: int) -> NoReturn:
    """Exit at once, although other ranks may be waiting in a collective; end child processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(status)


def script() -> NoReturn:
    """Run as the console script `dapo`: modules are found in the current folder too, as with `python -m`."""
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    _run()


def _run() -> NoReturn:
    streams.keep_open()
    faulthandler.enable()  # a process that ends in native code says where each thread was
    try:
        status = main(sys.argv[1:])
    except BaseException:  # noqa: BLE001  # whatever it is, this process has to end, with all that it started
        traceback.print_exc()
        status = 1
    end(status)


if __name__ == "__main__":
    _run()
