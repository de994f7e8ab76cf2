"""Ranks find each other in the store that their launcher made.

A launcher that starts ranks again keeps the store, with all that earlier ranks have left in it: torchrun's
ranks would connect to addresses of processes that have ended. So the ranks that are there now agree on a
number, and use the store below it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

from torch._C._distributed_c10d import PrefixStore, Store

from dapo.config import ConfigError

TIMEOUT = 600.0  # seconds for all ranks to be there
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.2  # seconds between two looks at the store, doubled each time
MOST_NAMED = 8  # ranks


def join(store: Store, rank: int, world: int) -> Store:
    """Return the part of the store that only these ranks use. All of them call this, each at its start.

    Each rank writes a name of its own. The main rank reads them, publishes a new number under each, and
    begins anew if one changes before every rank has answered to that number.

    Raises:
        ConfigError: ranks are not there in TIMEOUT seconds.
    """
    store = PrefixStore("dapo/joining", store)
    name = uuid.uuid4().hex
    store.set(f"name/{rank}", name)
    deadline = time.monotonic() + TIMEOUT
    number = _gather(store, world, deadline) if rank == 0 else _follow(store, rank, name, deadline)
    return PrefixStore(f"dapo/{number}", store)


def _gather(store: Store, world: int, deadline: float) -> int:
    # keys are asked for together: at a thousand ranks one after the other would take a second
    ranks, names, number = range(1, world), list[bytes](), -1
    keys = missing = [f"name/{rank}" for rank in ranks]
    for _ in _looks(deadline):
        if not store.check(keys):
            continue
        found = store.multi_get(keys)
        if found != names:  # or a rank has been started again
            names, number = found, int(store.add("numbers", 1))
            published = [f"number/{name.decode()}" for name in names]
            store.multi_set(published, [str(number)] * len(names))  # type: ignore[attr-defined]
            missing = [f"answer/{number}/{rank}" for rank in ranks]
        elif store.check(missing):
            store.set(f"go/{number}", "")
            return number
    absent = [rank for rank, key in zip(ranks, missing, strict=True) if not store.check([key])]
    raise _absent(f"rank {_first_few(absent)} did")


def _follow(store: Store, rank: int, name: str, deadline: float) -> int:
    answered = -1
    for _ in _looks(deadline):
        if not store.check([f"number/{name}"]):
            continue
        number = int(store.get(f"number/{name}"))
        if number != answered:
            store.set(f"answer/{number}/{rank}", "")
            answered = number
        if store.check([f"go/{number}"]):
            return number
    raise _absent("not all ranks" if store.check(["name/0"]) else "rank 0 did")


def _looks(deadline: float) -> Iterator[None]:
    """Yield at once, then after pauses, until the deadline."""
    pause = FIRST_PAUSE
    while time.monotonic() < deadline:
        yield
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _first_few(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:MOST_NAMED])) + ", …" * (len(ranks) > MOST_NAMED)


def _absent(who: str) -> ConfigError:
    remedy = "start every machine, with the same HEAD, and see that all of them can reach its port"
    did = f"{who} joined" if who.startswith("not") else f"{who} not join"
    return ConfigError(f"{did} within {TIMEOUT:.0f} s: {remedy}")
