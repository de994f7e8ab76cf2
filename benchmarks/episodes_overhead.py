"""What do turns cost beside generating them? 1,000 episodes at once, 20 turns each, with a scripted engine.

python benchmarks/episodes_overhead.py [episodes] [turns]

The policy's turns are there at once, and the environment answers at once, so all that is left is the work
around them: workers decode the turn, call the environment, render and encode its answer; the main process
keeps the books.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from record import ROOT, heading, save, table

from dapo import config
from dapo.episodes import Environment, Message, Reply, Turn
from dapo.episodes.assemble import make_setup
from dapo.episodes.stream import EpisodeEngine
from dapo.episodes.workers import Workers, preload
from dapo.model.tokenizer import load_tokenizer
from dapo.rollout.render import Turns
from dapo.types import Prompt, Request, Sample, Sampling

SAID = "1+2=3, 4+5=9, and 6+7=13; what is 8+9?"  # by the environment, each turn
OWN = 40  # tokens of the policy's turn


class Echo(Environment):
    """Says the same each turn, until it has answered often enough."""

    def reset(self, row: dict[str, Any], seed: int) -> list[Message]:
        self.left = row["turns"]
        return [{"role": "user", "content": SAID}]

    def step(self, reply: Reply) -> Turn:
        self.left -= 1
        return Turn([{"role": "user", "content": SAID}], is_done=not self.left, reward=1.0)


class Scripted:
    """Answers at once, the same tokens each time. It notes the CPU time of each turn."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens
        self.queue: deque[Request] = deque()
        self.by_turn: dict[int, list[int]] = {}  # turn → tokens that it was asked for with
        self.turns: dict[str, int] = {}
        self.at: dict[int, float] = {}  # turn → CPU seconds of all processes when its last one was asked for
        self.cpu: Any = lambda: 0.0

    def submit(self, requests: Iterable[Request]) -> None:
        for request in requests:
            turn = self.turns[request.id] = self.turns.get(request.id, 0) + 1
            self.by_turn.setdefault(turn, []).append(len(request.prompt.tokens))
            self.queue.append(request)
            if len(self.by_turn[turn]) == NUM_EPISODES:
                self.at[turn] = self.cpu()

    def abort(self, ids: Iterable[str] | None = None) -> None: ...

    def completed(self) -> Iterator[Sample]:
        n = len(self.tokens)
        while self.queue:
            request = self.queue.popleft()
            logprobs, mask = np.full(n, -1.0, np.float32), np.ones(n, bool)
            yield Sample(request.group, request.index, self.tokens, logprobs, mask, ((0, 0, n),), "stop")


class Row:
    """The origin of every prompt."""

    def read(self, prompt: Prompt, names: Any) -> dict[str, Any]:
        return {"task": {"turns": NUM_TURNS}}


def cpu_of(pids: Iterable[int]) -> float:
    """Return the CPU seconds of processes, their threads included."""
    ticks = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def workers_of(workers: Workers) -> list[int]:
    """Return the ids of the worker processes, the children of their guardians."""
    found = []
    for worker in workers.workers:
        guardian = worker.process.guardian.pid
        with open(f"/proc/{guardian}/task/{guardian}/children") as file:
            found += [int(pid) for pid in file.read().split()]
    return found


def measure(num_workers: int, in_rounds: bool) -> list[object]:
    path = ROOT / "examples/game/config.yaml"
    made = config.load(path, [f"reward.workers={num_workers}", f"rollout.max_turns={NUM_TURNS}"])
    tokenizer = load_tokenizer(made.policy.model)
    setup = make_setup(made, tokenizer, Turns(environment="episodes_overhead:Echo"))
    setup = setup._replace(environment="episodes_overhead:Echo", max_prompt_length=10_000)
    words = setup.chat._own.encode("123" * OWN, add_special_tokens=False).ids[: OWN - 1]
    inner = Scripted(np.array([*words, setup.chat.stop_ids[0]], np.int32))
    workers = Workers(setup, num_workers, 4.0)
    engine: Any = type("Engine", (), {"stream": lambda self: inner, "close": lambda self: None})()
    episodes = EpisodeEngine(
        engine,
        workers,
        NUM_TURNS,
        0,
        in_rounds,
        0.0,
        lambda p: p.origin.read(p, ())["task"],
        lambda p: [],
    )
    stream = episodes.stream()
    prompt = Prompt(0, np.zeros(0, np.int32), "", Row())
    sampling = Sampling(1.0, 10**6, setup.chat.stop_ids)

    def play(first: int, count: int) -> list[Sample]:
        stream.submit(Request(first + i, 0, prompt, i, sampling) for i in range(count))
        return list(stream.completed())

    play(10**6, num_workers * 4)  # processes start
    inner.by_turn.clear(), inner.turns.clear()
    pids = workers_of(workers)
    before = cpu_of([os.getpid()]), cpu_of(pids)
    inner.cpu = lambda: cpu_of([os.getpid(), *pids])
    start = time.perf_counter()
    samples = play(0, NUM_EPISODES)
    seconds = time.perf_counter() - start
    main, others = cpu_of([os.getpid()]) - before[0], cpu_of(pids) - before[1]
    turns = NUM_EPISODES * NUM_TURNS
    assert len(samples) == NUM_EPISODES and all(s.episode.num_turns == NUM_TURNS for s in samples)
    quarter = NUM_TURNS // 4
    ends = inner.at
    early = (ends[1 + quarter] - ends[1]) / quarter
    late = (ends[NUM_TURNS] - ends[NUM_TURNS - quarter]) / quarter
    episodes.close()
    mode = "in rounds" if in_rounds else "as they come"
    each = 1e3 * (main + others) / turns
    share = main / (main + others)
    return [
        num_workers, mode, f"{each:.3f}", f"{share:.0%}", f"{turns / seconds:,.0f}",
        f"{1e3 * early / NUM_EPISODES:.3f}", f"{1e3 * late / NUM_EPISODES:.3f}", len(samples[0].tokens),
    ]  # fmt: skip


NUM_EPISODES = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
NUM_TURNS = int(sys.argv[2]) if len(sys.argv) > 2 else 20

HEAD = (
    "workers", "turns are asked for", "CPU ms a turn", "main process", "turns/s",
    "CPU ms a turn, first quarter", "last quarter", "tokens of an episode",
)  # fmt: skip


def main() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    preload()
    rows = [measure(count, in_rounds) for count in (1, 4) for in_rounds in (False, True)]
    text = f"""{heading("The cost of turns")}
{NUM_EPISODES:,} episodes at once, {NUM_TURNS} turns each, of {OWN} tokens of the policy and the environment's
answer; the engine answers at once. CPU milliseconds are of all processes; "main process" is the main rank's
share of them. The quarters are of an episode's turns: does a turn cost more the longer the conversation is?
Other work ran on the machine meanwhile.

{table(HEAD, rows)}"""
    save("episodes_overhead.md", text)


if __name__ == "__main__":
    main()
