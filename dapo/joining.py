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
    ranks = range(1, world)
    names, number, wanted = list[bytes](), -1, [f"name/{rank}" for rank in ranks]
    for _ in _looks(deadline):
        # keys are asked for together: at a thousand ranks one after the other would take a second
        if store.check(wanted):
            found = store.multi_get([f"name/{rank}" for rank in ranks])
            if found != names:
                names, number = found, int(store.add("numbers", 1))
                store.multi_set([f"number/{each.decode()}" for each in names], [str(number)] * len(names))
                wanted = [f"answer/{number}/{rank}" for rank in ranks]
            if store.check(wanted):
                store.set(f"go/{number}", "")
                return number
    raise _absent([rank for rank, key in zip(ranks, wanted, strict=True) if not store.check([key])])


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
    raise _absent([0])


def _looks(deadline: float) -> Iterator[None]:
    """Yield at once, then after pauses, until the deadline."""
    pause = FIRST_PAUSE
    while time.monotonic() < deadline:
        yield
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _absent(ranks: list[int]) -> ConfigError:
    named = ", ".join(map(str, ranks[:MOST_NAMED])) + ", …" * (len(ranks) > MOST_NAMED)
    remedy = "start every machine, with the same HEAD, and see that all of them can reach its port"
    return ConfigError(f"rank {named} did not join within {TIMEOUT:.0f} s: {remedy}")
