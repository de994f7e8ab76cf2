"""An engine whose streams answer a request by an episode: the policy's turn, its environment's answer, ….

A sample's tokens are (the policy's raw turn + what the chat template puts after it)* + its last raw turn.
What the policy wrote is never decoded and encoded again: each turn is asked for with exactly these tokens.
"""

from __future__ import annotations

import hashlib
import queue
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dapo.clock import waiting
from dapo.episodes.environment import Message
from dapo.episodes.episode import Playing
from dapo.episodes.player import Answer, Began, Begin, Fault, Step
from dapo.episodes.workers import Call, Workers
from dapo.types import (
    Engine,
    EpisodeError,
    FinishReason,
    Group,
    Interrupted,
    Prompt,
    Request,
    Sample,
    Stream,
)

ATTEMPTS = 3  # at an episode whose environment fails; then its group is lost
CHECK_EVERY = 0.5  # seconds of waiting between two checks for an interruption
Reading = Callable[[Prompt], dict[str, object]]


@dataclass(frozen=True)
class Limits:
    """Says how long an episode may be, beside the tokens of its request (Sampling.max_tokens)."""

    max_turns: int  # of the policy
    max_prompt_length: int  # tokens of an environment's first messages


class EpisodeEngine:
    """The Engine protocol over another engine, whose turns it makes episodes of.

    Args:
        in_rounds: ask for turns when all environments have answered, in the order of the requests: then what
            is generated together depends on no timing.
        row_of: reads a prompt's row for its environment; None: `rollout.tools`, whose conversations begin
            with the prompt. messages_of reads these.
    """

    def __init__(
        self,
        engine: Engine,
        workers: Workers,
        limits: Limits,
        run_seed: int,
        in_rounds: bool,
        correct_above: float,
        row_of: Reading | None,
        messages_of: Callable[[Prompt], list[Message]],
        is_interrupted: Callable[[], bool] = lambda: False,
    ):
        self.engine = engine
        self.limits, self.run_seed, self.in_rounds, self.correct_above = (
            limits,
            run_seed,
            in_rounds,
            correct_above,
        )
        self.row_of, self.messages_of, self.is_interrupted = row_of, messages_of, is_interrupted
        self.players: dict[int, tuple[EpisodeStream, Playing]] = {}  # by number of the attempt
        self.workers = workers
        workers.listen(self._lost)

    @property
    def is_colocated(self) -> bool:
        return self.engine.is_colocated

    def stream(self) -> EpisodeStream:
        return EpisodeStream(self, self.engine.stream())

    def prepare_weights(self, version: int) -> None:
        self.engine.prepare_weights(version)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.engine.load_weights(weights, version)

    def waiting(self) -> str:
        count = sum(bool(episode.turns) for _, episode in list(self.players.values()))
        playing = f"{len(self.players)} episodes are played, {count} beyond their first turn"
        return f"{self.engine.waiting()}; {playing}"

    def score(self, groups: Sequence[Group]) -> list[np.ndarray]:
        return self.engine.score(groups)

    def take_idle(self) -> list[float]:
        return self.engine.take_idle()

    def release_memory(self) -> None:
        self.engine.release_memory()

    def close(self) -> None:
        """Close environments and engine."""
        try:
            self.workers.close()
        finally:
            self.engine.close()

    def _lost(self, number: int, how: str, is_at_fault: bool) -> None:
        """Note that an environment is gone with its process."""
        if found := self.players.get(number):
            stream, episode = found
            stream.begin_again(episode, how, is_at_fault)


class EpisodeStream:
    """The Stream protocol: a request is answered by an episode.

    Turns are read from the engine's stream by a thread of its own, which lives while episodes are played: an
    environment's answer must not wait until somebody reads `completed`.

    Raises, from `completed`, what the engine's stream raises, and
        EpisodeError, ConfigError: environments cannot go on.
        Interrupted: the engine's `is_interrupted()` is true; the stream's requests are aborted.
    """

    def __init__(self, engine: EpisodeEngine, inner: Stream):
        self.engine, self.inner = engine, inner
        self.changed = threading.Condition(threading.RLock())
        self.episodes: dict[str, Playing] = {}  # not read yet, by request id
        self.starts: dict[int, np.ndarray] = {}  # group → tokens of its first messages
        self.generating: dict[str, Playing] = {}
        self.answering: dict[int, Playing] = {}  # by number of the attempt
        self.ready: dict[str, Playing] = {}  # whose next turn is to be asked for
        self.num_open: Counter[int] = Counter()  # episodes that are not read yet, by group
        self.finished: queue.SimpleQueue[tuple[Playing, Sample] | None] = queue.SimpleQueue()
        self.num_playing = 0
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None

    def submit(self, requests: Iterable[Request]) -> None:
        with self.changed:
            for request in requests:
                assert request.id not in self.episodes, f"request {request.id} is outstanding already"
                episode = self.episodes[request.id] = Playing(request)
                self.num_playing += 1
                self.num_open[request.group] += 1
                self._begin(episode)
            self._ask_ready()
            if self.num_playing and not self.thread and not self.failure:
                self.thread = threading.Thread(target=self._play, name="episodes", daemon=True)
                self.thread.start()
            self.changed.notify_all()

    def completed(self) -> Iterator[Sample]:
        while self.episodes:
            if failure := self.failure or self.engine.workers.failure:
                raise failure
            waiting()  # calls of environments have a time limit, and so has the engine
            if self.engine.is_interrupted():
                self.abort()
                raise Interrupted
            try:
                found = self.finished.get(timeout=CHECK_EVERY)
            except queue.Empty:
                continue
            if found is None or not found[0].is_wanted:
                continue
            episode, sample = found
            with self.changed:
                episode.is_wanted = False
                if self.episodes.pop(episode.request.id, None):
                    self._forget(episode.request.group)
            yield sample

    def abort(self, ids: Iterable[str] | None = None) -> None:
        with self.changed:
            dropped = list(self.episodes) if ids is None else [id for id in ids if id in self.episodes]
            for id in dropped:
                self._end(episode := self.episodes.pop(id))
                self._forget(episode.request.group)
            self.inner.abort(None if ids is None else dropped)
            if ids is None:
                self.failure = None
            self.finished.put(None)
            self.changed.notify_all()

    # --- one episode; the caller has the lock ---

    def _forget(self, group: int) -> None:
        """Note that an episode of a group is read, or aborted."""
        self.num_open[group] -= 1
        if not self.num_open[group]:
            del self.num_open[group]
            self.starts.pop(group, None)

    def _begin(self, episode: Playing) -> None:
        """Begin, or begin again, under the same names and seeds."""
        engine, request = self.engine, episode.request
        engine.players.pop(episode.number, None)
        episode.begin(next(engine.workers.numbers))
        engine.players[episode.number] = self, episode
        if engine.row_of is None:
            episode.prompt, episode.messages = request.prompt.tokens, list(engine.messages_of(request.prompt))
            self.ready[request.id] = episode
        else:
            row, seed = engine.row_of(request.prompt), group_seed(engine.run_seed, request.group)
            self._call(episode, Begin(episode.number, row, seed), self._begun)

    def _call(self, episode: Playing, message: Begin | Step, done: Callable[..., None]) -> None:
        self.answering[episode.number] = episode
        number = episode.number

        def answered(answer: Began | Answer | Fault) -> None:
            with self.changed:
                is_current = self.answering.pop(number, None) is episode and episode.number == number
                if is_current and episode.is_wanted:
                    if isinstance(answer, Fault):
                        self.begin_again(episode, answer.what, is_at_fault=True)
                    else:
                        done(episode, answer)
                    self._ask_ready()
                self.changed.notify_all()

        self.engine.workers.ask(Call(message, answered))

    def _begun(self, episode: Playing, answer: Began) -> None:
        request, limits = episode.request, self.engine.limits
        episode.prompt = np.frombuffer(answer.tokens, np.int32)
        episode.messages = list(answer.messages)
        first = self.starts.setdefault(request.group, episode.prompt)
        if not np.array_equal(first, episode.prompt):
            what = f"the episodes of group {request.group} begin with different messages for one row and seed"
            self._fail(EpisodeError(f"rollout.environment: {what}: take all chance from reset's seed"))
        if len(episode.prompt) > limits.max_prompt_length:
            what = f"first messages of {len(episode.prompt)} tokens"
            limit = f"data.max_prompt_length={limits.max_prompt_length}"
            self._fail(EpisodeError(f"rollout.environment: {what}, {limit}: raise it, or write less"))
        self.ready[request.id] = episode

    def _ask_ready(self) -> None:
        """Ask for the turns that are ready; in rounds, when every environment has answered."""
        if self.failure or (self.engine.in_rounds and (self.answering or self.generating)):
            return
        if not self.ready:
            return
        ready = sorted(self.ready.values(), key=lambda e: (e.request.group, e.request.index))
        self.ready = {}
        for episode in ready:
            self.generating[episode.request.id] = episode
        self.inner.submit([self._turn(episode) for episode in ready])

    def _turn(self, episode: Playing) -> Request:
        """Return the request of the next turn: it is sent before the first turns of others."""
        request, number = episode.request, len(episode.turns)
        sampling = replace(request.sampling, max_tokens=request.sampling.max_tokens - episode.length)
        return replace(
            request,
            prompt=replace(request.prompt, tokens=episode.next_input()),
            seed=turn_seed(request.seed, number),
            sampling=sampling,
            priority=max(request.priority, number > 0),
        )

    def _take_turn(self, turn: Sample) -> None:
        """Add the policy's turn, and hand it to the environment."""
        episode = self.generating.pop(f"{turn.group}.{turn.index}", None)
        if episode is None or not episode.is_wanted:
            return
        episode.add(turn)
        room = episode.request.sampling.max_tokens - episode.length
        is_last = len(episode.turns) == self.engine.limits.max_turns
        step = Step(episode.number, turn.tokens.tobytes(), turn.is_truncated, 0 if is_last else room)
        self._call(episode, step, self._answered)

    def _answered(self, episode: Playing, answer: Answer) -> None:
        counts, turn = episode.counts, answer.turn
        counts.num_calls += answer.num_calls
        counts.num_unreadable += answer.num_unreadable
        counts.num_failed += answer.num_failed
        counts.num_neutralised += answer.num_neutralised
        episode.reward += turn.reward
        episode.is_correct = episode.is_correct if turn.is_correct is None else turn.is_correct
        episode.messages.append({"role": "assistant", "content": answer.text})
        is_cut = episode.turns[-1].is_truncated
        if answer.tokens is None or is_cut:
            episode.messages += turn.messages  # which the policy has not read
            self._finish(episode, "stop" if turn.is_done and not is_cut else "length", answer.text)
            return
        episode.messages += turn.messages
        episode.suffixes.append(np.frombuffer(answer.tokens, np.int32))
        self.ready[episode.request.id] = episode

    def _finish(self, episode: Playing, finish_reason: FinishReason, text: str) -> None:
        sample = episode.sample(finish_reason, self.engine.correct_above, text)
        if self.engine.row_of is None and sample.episode:
            sample.episode.prompt_tokens = None  # the prompt has them
        self._end(episode, is_wanted=True)
        self.finished.put((episode, sample))

    def begin_again(self, episode: Playing, what: str, is_at_fault: bool) -> None:
        """Play an episode anew whose environment has failed. After ATTEMPTS its group is lost."""
        with self.changed:
            if not episode.is_wanted or episode.number not in self.engine.players:
                return
            self.answering.pop(episode.number, None)
            self.ready.pop(episode.request.id, None)
            if self.generating.pop(episode.request.id, None):
                self.inner.abort([episode.request.id])
            self.engine.workers.end(episode.number)
            if is_at_fault:
                episode.attempt += 1
                self.engine.workers.warn(f"episode {episode.request.id}: {what}")
            if episode.attempt <= ATTEMPTS:
                self._begin(episode)
            else:
                self._lose(episode.request.group, what)
            self._ask_ready()
            self.changed.notify_all()

    def _lose(self, group: int, what: str) -> None:
        """End all episodes of a group that are played, without samples."""
        for id, episode in self.episodes.items():
            if episode.request.group == group and episode.number in self.engine.players:
                if self.generating.pop(id, None):
                    self.inner.abort([id])
                self.engine.workers.end(episode.number)
                self._end(episode, is_wanted=True)
                self.finished.put((episode, lost(episode.request, what)))

    def _end(self, episode: Playing, is_wanted: bool = False) -> None:
        """Forget an episode, and close its environment."""
        episode.is_wanted = is_wanted
        self.generating.pop(episode.request.id, None)
        self.ready.pop(episode.request.id, None)
        self.answering.pop(episode.number, None)
        if self.engine.players.pop(episode.number, None):
            self.num_playing -= 1
            if self.engine.row_of:
                self.engine.workers.end(episode.number)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.finished.put(None)

    # --- the thread ---

    def _play(self) -> None:
        """Read turns from the engine as long as episodes are played."""
        try:
            while self._has_turns():
                for turn in self.inner.completed():
                    with self.changed:
                        self._take_turn(turn)
                        self.changed.notify_all()
        except BaseException as error:  # noqa: BLE001  # `completed` raises it
            with self.changed:
                self.thread = None
                self._fail(error)

    def _has_turns(self) -> bool:
        """Wait until the policy is to write. Return False, and end the thread, when nothing is played."""
        with self.changed:
            while self.num_playing and not self.failure and not self.engine.workers.failure:
                self._ask_ready()
                if self.generating:
                    return True
                self.changed.wait(CHECK_EVERY)
            self.thread = None
            self.finished.put(None)
            return False


def lost(request: Request, what: str) -> Sample:
    """Return what stands for a sample that is lost. `what`: why."""
    none = np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, bool)
    return Sample(request.group, request.index, *none, (), "abort", what)


def group_seed(run_seed: int, group: int) -> int:
    """Return the 63-bit seed of a group's environments: a hash of its name."""
    return _hash(b"environment", run_seed, group)


def turn_seed(seed: int, turn: int) -> int:
    """Return the 63-bit seed of one turn, given the sample's."""
    return _hash(b"turn", seed, turn)


def _hash(kind: bytes, *numbers: int) -> int:
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8, person=kind).digest()
    return int.from_bytes(digest, "little") >> 1
