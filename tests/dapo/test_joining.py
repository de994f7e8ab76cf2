"""Ranks that are started again over the store of earlier ones find each other, and nothing of those."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._C._distributed_c10d import HashStore, Store

from dapo import joining
from dapo.config import ConfigError


def joined(store: Store, world: int, *ranks: int) -> list[Store]:
    """Join as these ranks, side by side."""
    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(lambda rank: joining.join(store, rank, world), ranks))


def test_ranks_share_what_earlier_ranks_of_the_store_do_not_see() -> None:
    store = HashStore()
    before = joined(store, 3, 0, 1, 2)
    before[0].set("address", "of a process that has ended")
    assert all(each.get("address") == b"of a process that has ended" for each in before)
    now = joined(store, 3, 2, 1, 0)
    assert not any(each.check(["address"]) for each in now)
    now[1].set("address", "here")
    assert all(each.get("address") == b"here" for each in now)


def test_a_rank_that_is_started_again_meanwhile_joins_in_place_of_the_one_before() -> None:
    """Its first process has written its name, and ended."""
    store = HashStore()
    started = threading.Thread(target=joining.join, args=(store, 1, 3), daemon=True)
    started.start()
    while not store.check(["dapo/joining/name/1"]):
        time.sleep(0.01)
    now = joined(store, 3, 0, 1, 2)
    now[0].set("here", "")
    assert all(each.check(["here"]) for each in now)


def test_a_rank_that_is_started_again_after_it_was_seen_is_seen_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its first process had written its name and not yet answered, when the main rank read it."""
    monkeypatch.setattr(joining, "TIMEOUT", 20.0)
    store = HashStore()
    store.set("dapo/joining/name/1", "of a process that has ended")
    with ThreadPoolExecutor(1) as threads:
        main = threads.submit(joining.join, store, 0, 2)
        while not store.check(["dapo/joining/numbers"]):
            time.sleep(0.01)
        other = joining.join(store, 1, 2)
    main.result().set("here", "")
    assert other.check(["here"])


@pytest.mark.parametrize(
    ("ranks", "missing"),
    [([0, 2], "(rank 1, 3 did not join|not all ranks joined)"), ([1, 2, 3], "rank 0 did not join")],
)
def test_ranks_that_do_not_come_are_named(
    ranks: list[int], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "TIMEOUT", 1.0)
    with pytest.raises(ConfigError, match=rf"^{missing} within 1 s: start every machine"):
        joined(HashStore(), 4, *ranks)
