"""Ranks find each other in the store that their launcher made.

A launcher that starts ranks again keeps the store, with all that earlier ranks have left in it: torchrun's
ranks would connect to addresses of processes that have ended. So the ranks that are there now agree on a
number, and use the store below it.
"""

from __future__ import annotations

import json
import time
import uuid
from contextlib import suppress
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistStoreError

from dapo.config import ConfigError

TIMEOUT = 600.0  # seconds for all ranks to be there
CHECK_EVERY = timedelta(seconds=0.5)  # whether a rank has been started again meanwhile
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
    _await(store, [f"name/{rank}" for rank in ranks], deadline)
    names: list[str] = []
    number = -1
    while True:
        found = [name, *(store.get(f"name/{rank}").decode() for rank in ranks)]
        if found != names:
            names, number = found, store.add("numbers", 1)
            store.set("members", json.dumps([number, names]))
        answers = [f"answer/{number}/{rank}" for rank in ranks]
        if _are_there(store, answers):
            store.set(f"go/{number}", "")
            return int(number)
        if time.monotonic() > deadline:
            _refuse([rank for rank, key in zip(ranks, answers, strict=True) if not store.check([key])])


def _follow(store: Store, rank: int, name: str, deadline: float) -> int:
    while True:
        if _are_there(store, ["members"]):
            number, names = json.loads(store.get("members"))
            if names[rank : rank + 1] == [name]:
                store.set(f"answer/{number}/{rank}", "")
                if _are_there(store, [f"go/{number}"]):
                    return int(number)
            else:  # of earlier ranks
                time.sleep(CHECK_EVERY.total_seconds())
        if time.monotonic() > deadline:
            _refuse([0])


def _await(store: Store, keys: list[str], deadline: float) -> None:
    while not _are_there(store, keys):
        if time.monotonic() > deadline:
            _refuse([rank for rank, key in enumerate(keys, start=1) if not store.check([key])])


def _are_there(store: Store, keys: list[str]) -> bool:
    """Wait CHECK_EVERY at most. Return True if all keys are there."""
    with suppress(DistStoreError):
        store.wait(keys, CHECK_EVERY)
        return True
    return False


def _refuse(ranks: list[int]) -> None:
    named = ", ".join(map(str, ranks[:MOST_NAMED])) + ", …" * (len(ranks) > MOST_NAMED)
    raise ConfigError(
        f"rank {named} did not join within {TIMEOUT:.0f} s: start every machine, with the same HEAD, and see "
        "that all of them can reach its port"
    )
