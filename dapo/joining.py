"""Ranks find each other in the store that their launcher made.

A launcher that starts ranks again keeps the store, with all that earlier ranks have left in it: torchrun's
ranks would connect to addresses of processes that have ended. So the ranks that are there now agree on a
number, and use the store below it.
"""

from __future__ import annotations

import json
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

    Each rank writes a name of its own. The main rank reads them, publishes them under a new number, and
    begins anew if one changes before every rank has answered to that number.

    Raises:
        ConfigError: ranks are not there in TIMEOUT seconds.
    """
    store = PrefixStore("dapo/joining", store)
    name = uuid.uuid4().hex
    store.set(f"name/{rank}", name)
    deadline = time.monotonic() + TIMEOUT
    number = _gather(store, name, world, deadline) if rank == 0 else _follow(store, rank, name, deadline)
    return PrefixStore(f"dapo/{number}", store)


def _gather(store: Store, name: str, world: int, deadline: float) -> int:
    ranks = range(1, world)
    names, number = list[str](), -1
    for _ in _looks(deadline):
        missing = [rank for rank in ranks if not store.check([f"name/{rank}"])] if number < 0 else []
        if not missing:
            found = [name, *(store.get(f"name/{rank}").decode() for rank in ranks)]
            if found != names:
                names, number = found, int(store.add("numbers", 1))
                store.set("members", json.dumps([number, names]))
            missing = [rank for rank in ranks if not store.check([f"answer/{number}/{rank}"])]
            if not missing and names[1:] == [store.get(f"name/{rank}").decode() for rank in ranks]:
                store.set(f"go/{number}", "")
                return number
    raise _absent(f"rank {_first_few(missing)} did")


def _follow(store: Store, rank: int, name: str, deadline: float) -> int:
    answered = -1
    for _ in _looks(deadline):
        if not store.check(["members"]):
            continue
        number, names = json.loads(store.get("members"))
        if names[rank : rank + 1] == [name]:  # else they are of earlier ranks
            if number != answered:
                store.set(f"answer/{number}/{rank}", "")
                answered = number
            if store.check([f"go/{number}"]):
                return int(number)
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
