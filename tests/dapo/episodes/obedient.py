"""Environments and tools that do what they are asked to. Workers import this file: nothing here may import
torch.
"""

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import threading
import time

import numpy as np

from dapo.episodes import Environment, Turn
from examples.game.game import GuessNumber

SAID = {"role": "user", "content": "go on"}
MANY = 10_000_000  # characters


def act(command: str):
    """Do what a plain function may do, and return what it returns."""
    what, _, rest = command.partition(" ")
    match what:
        case "ok":
            return Turn([SAID], reward=0.25)
        case "done":
            return Turn(is_done=True, reward=1.0)
        case "wait":
            time.sleep(float(rest))
            return Turn([SAID], reward=0.25)
        case "sleep":
            time.sleep(600)
        case "loop":
            while True:
                pass
        case "deaf":  # a loop that nothing ends
            while True:
                try:
                    while True:
                        time.sleep(0.01)
                except BaseException:  # noqa: BLE001
                    pass
        case "hold":
            sum(range(10**12))
        case "pattern":
            re.match(r"(a+)+b", "a" * 60)
        case "raise":
            raise ValueError("no such\nmove")
        case "stop":
            next(iter([]))
        case "system":
            raise SystemExit(3)
        case "keyboard":
            raise KeyboardInterrupt
        case "exit":
            os._exit(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hoard":
            held = bytearray(b"x") * (1 << 30)
            time.sleep(600)
            return held
        case "fork":
            os.fork()
            return Turn([SAID], reward=0.25)
        case "print":
            print("x" * 1_000_000)
            return Turn([SAID], reward=0.25)
        case "say":
            return Turn([{"role": "user", "content": rest}])
        case "much":
            return Turn([{"role": "user", "content": "word " * (MANY // 5)}], is_done=rest == "done")
        case "numpy":
            return Turn([SAID], np.bool_(False), np.float32(0.25), np.bool_(True))
        case "message":
            return Turn([eval(rest)])
        case "turn":
            return eval(rest)
    raise AssertionError(command)


class Word(str):
    """Text of a class that only this module has."""


class Own(Turn):
    """A turn of a class that only this module has."""


class Obedient(Environment):
    """Do `row["reset"]`, and in each turn the next of `row["steps"]`; what is `once`, at a first attempt."""

    def reset(self, row, seed):
        self.row, self.number = row, 0
        match row.get("reset", "ok"):
            case "raise":
                raise ValueError("no such row")
            case "exit":
                os._exit(3)
            case "none":
                return None
            case "empty":
                return []
            case "differs":
                return [{"role": "user", "content": f"begin {time.monotonic_ns()}"}]
            case "long":
                return [{"role": "user", "content": "word " * 2000}]
            case "much":
                return [{"role": "user", "content": "word " * (MANY // 5)}]
            case "seed":
                return [{"role": "user", "content": f"begin {seed}"}]
        return [{"role": "user", "content": "begin"}]

    def step(self, reply):
        return act(self.command())

    def command(self) -> str:
        steps = self.row["steps"]
        command = steps[min(self.number, len(steps) - 1)]
        self.number += 1
        if command.startswith("once "):
            _, path, command = command.split(" ", 2)
            if os.path.exists(path):
                return "ok"
            open(path, "w").close()
        return command

    def close(self):
        if self.row.get("close") == "raise":
            raise ValueError("cannot close")
        if self.row.get("close"):
            with open(self.row["close"], "a") as file:
                file.write(f"{self.row.get('name')}\n")


class Waiting(Obedient):
    """The same, async."""

    async def step(self, reply):
        command = self.command()
        what, _, rest = command.partition(" ")
        if what == "pause":
            await asyncio.sleep(float(rest))
            return Turn([SAID], reward=0.25)
        if what == "never":
            await asyncio.sleep(600)
        if what == "unending":
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.05)
        if what == "cancelled":
            raise asyncio.CancelledError
        await asyncio.sleep(0)
        return act(command)


class Handing(Obedient):
    """A plain step that hands on what an async one returns."""

    def step(self, reply):
        return self.later()

    async def later(self):
        await asyncio.sleep(0.01)
        return act(self.command())


class Littering(Obedient):
    """Leaves a thread and a process behind, which no one asked for."""

    def step(self, reply):
        threading.Thread(target=time.sleep, args=(600,)).start()
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        with open(self.row["pids"], "a") as file:
            file.write(f"{child.pid} {os.getpid()}\n")
        return act(self.command())


class Tooled(Obedient):
    """An environment whose tools are what the row says."""

    def tools(self):
        return eval(self.row["tools"])


class Slow(GuessNumber):
    """The example's game, which takes its time."""

    def step(self, reply):
        time.sleep(random.random() / 100)
        return super().step(reply)


class NoStep(Environment):
    def reset(self, row, seed):
        return [SAID]


class NoReset(Environment):
    def step(self, reply):
        return Turn(is_done=True)


class Needy(Obedient):
    def __init__(self, name):
        self.name = name


class Stubborn(Obedient):
    def __init__(self):
        raise OSError("no display")


# --- tools ---


def do(command: str):
    """Do something.

    Args:
        command: What to do.
    """
    found = act(command)
    return "went on" if isinstance(found, Turn) else found


async def await_it(seconds: float) -> str:
    """Wait.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return f"waited {seconds}"


def named(function: str, episode: int) -> str:
    """Have arguments of all names.

    Args:
        function: A word.
        episode: A number.
    """
    return f"{function} {episode}"


def odd(kind: str):
    """Return what is no text.

    Args:
        kind: Of it.
    """
    round_about: list = []
    round_about.append(round_about)
    return {
        "number": 7, "none": None, "dict": {"a": [1, 2]}, "round": round_about, "keys": {(1, 2): 3},
        "surrogate": "half \ud83d", "large": "x" * 100_000, "object": Word("a word"), "set": {1},
    }[kind]  # fmt: skip


def untyped(x):
    """Have no types.

    Args:
        x: Something.
    """


def undocumented(x: int) -> int:
    return x


async def block(seconds: float) -> str:
    """Wait without awaiting.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return "woke up"
