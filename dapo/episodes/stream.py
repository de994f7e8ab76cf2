"""An engine whose streams answer a request by an episode: the policy's turn, its environment's answer, ….

A sample's tokens are (the policy's raw turn + what the chat template puts after it)* + its last raw turn.
What the policy wrote is never decoded and encoded again: each turn is asked for with exactly these tokens.
"""

from __future__ import annotations

import hashlib
import queue
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

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
ABORTED = 1_000_000  # added to the index of a turn's request for each turn that was aborted before
Reading = Callable[[Prompt], dict[str, object]]


@dataclass(eq=False)
class _Group:
    """A group's episodes, and the things that they have in common."""

    row: dict[str, object] = field(default_factory=dict)  # for their environments
    messages: list[Message] = field(default_factory=list)  # the first ones, with rollout.tools
    first: np.ndarray | None = None  # tokens of their first messages
    episodes: dict[str, Playing] = field(default_factory=dict)  # not read yet, by request id


class EpisodeEngine:
    """The Engine protocol over another engine, whose turns it makes episodes of.

    Args:
        max_turns: of the policy, in an episode.
        in_rounds: ask for turns when all environments have answered, in the order of the requests: then what
            is generated together depends on no timing.
        row_of: reads a prompt's row for its environment; None: `rollout.tools`, whose conversations begin
            with the prompt. messages_of reads these.
    """

    def __init__(
        self,
        engine: Engine,
        workers: Workers,
        max_turns: int,
        run_seed: int,
        in_rounds: bool,
        correct_above: float,
        row_of: Reading | None,
        messages_of: Callable[[Prompt], list[Message]],
        is_interrupted: Callable[[], bool] = lambda: False,
    ):
        self.engine = engine
        self.max_turns, self.run_seed, self.in_rounds = max_turns, run_seed, in_rounds
        self.correct_above = correct_above
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
        self.groups: dict[int, _Group] = {}  # theirs
        # an episode that is played is in one of these
        self.generating: dict[str, Playing] = {}  # by id of the turn's request
        self.answering: set[int] = set()  # by number of the attempt
        self.ready: dict[str, Playing] = {}  # whose next turn is to be asked for, by request id
        self.aborted: list[str] = []  # ids of turns that the engine's stream is to abort
        self.num_aborts = 0  # of turns
        self.num_asked = 0  # times that turns were asked for
        self.finished: queue.SimpleQueue[tuple[Playing, Sample] | None] = queue.SimpleQueue()
        self.num_playing = 0
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None

    def submit(self, requests: Iterable[Request]) -> None:
        with self.changed:
            for request in requests:
                assert request.id not in self.episodes, f"request {request.id} is outstanding already"
                episode = self._group_of(request).episodes[request.id] = Playing(request)
                self.episodes[request.id] = episode
                self.num_playing += 1
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
            if found and self._is_taken(found[0]):
                yield found[1]

    def abort(self, ids: Iterable[str] | None = None) -> None:
        with self.changed:
            dropped = list(self.episodes if ids is None else self.episodes.keys() & set(ids))
            for id in dropped:
                self._end(self.episodes[id])
                self._forget(self.episodes[id])
            if ids is None:
                self.inner.abort()
                self.aborted = []
                self.failure = None
            self._abort_turns()
            self._ask_ready()
            self.finished.put(None)
            self.changed.notify_all()

    # --- one episode; the caller has the lock ---

    def _group_of(self, request: Request) -> _Group:
        if request.group not in self.groups:
            group = self.groups[request.group] = _Group()
            if self.engine.row_of:
                group.row = self.engine.row_of(request.prompt)
                # the group's other samples, asked for earlier, began with these
                group.first = request.prompt.tokens if len(request.prompt.tokens) else None
            else:
                group.messages = self.engine.messages_of(request.prompt)
        return self.groups[request.group]

    def _is_taken(self, episode: Playing) -> bool:
        """Forget an episode that is read. Return False if it was aborted before."""
        with self.changed:
            is_wanted = episode.is_wanted
            if is_wanted:
                self._forget(episode)
            return is_wanted

    def _forget(self, episode: Playing) -> None:
        request = episode.request
        episode.is_wanted = False
        del self.episodes[request.id]
        group = self.groups[request.group]
        del group.episodes[request.id]
        if not group.episodes:
            del self.groups[request.group]

    def _begin(self, episode: Playing) -> None:
        """Begin, or begin again, under the same names and seeds."""
        engine, request = self.engine, episode.request
        episode.begin(next(engine.workers.numbers))
        engine.players[episode.number] = self, episode
        if engine.row_of is None:
            episode.prompt = request.prompt.tokens
            episode.messages = list(self.groups[request.group].messages)
            self.ready[request.id] = episode
        else:
            row, seed = self.groups[request.group].row, group_seed(engine.run_seed, request.group)
            self._call(episode, Begin(episode.number, row, seed), self._begun)

    def _call(self, episode: Playing, message: Begin | Step, done: Callable[..., None]) -> None:
        number = episode.number
        self.answering.add(number)

        def answered(answer: Began | Answer | Fault) -> None:
            with self.changed:
                if number not in self.answering:  # the attempt was aborted
                    return
                if isinstance(answer, Fault):
                    self.begin_again(episode, answer.what, is_at_fault=True)
                else:
                    self.answering.remove(number)
                    done(episode, answer)
                    self._ask_ready()
                self.changed.notify_all()

        self.engine.workers.ask(Call(message, answered))

    def _begun(self, episode: Playing, answer: Began) -> None:
        request, group = episode.request, self.groups[episode.request.group]
        episode.prompt = np.frombuffer(answer.tokens, np.int32)
        episode.messages = list(answer.messages)
        group.first = episode.prompt if group.first is None else group.first
        if not np.array_equal(group.first, episode.prompt):
            what = f"the episodes of group {request.group} begin with different messages for one row and seed"
            self._fail(EpisodeError(f"rollout.environment: {what}: take all chance from reset's seed"))
        self.ready[request.id] = episode

    def _ask_ready(self) -> None:
        """Ask for the turns that are ready; in rounds, when every environment has answered."""
        is_round = not (self.answering or self.generating)
        if not self.ready or self.failure or (self.engine.in_rounds and not is_round):
            return
        ready = sorted(self.ready.values(), key=lambda e: (e.request.group, e.request.index))
        self.ready = {}
        turns = [self._turn(episode) for episode in ready]
        for episode, turn in zip(ready, turns, strict=True):
            episode.turn_id = turn.id
            self.generating[turn.id] = episode
        self.inner.submit(turns)
        self.num_asked += 1

    def _turn(self, episode: Playing) -> Request:
        """Return the request of the next turn: it is sent before the first turns of others.

        One that was aborted may still come, so its name is not used again.
        """
        request, number = episode.request, len(episode.turns)
        sampling = replace(request.sampling, max_tokens=request.sampling.max_tokens - episode.length)
        return replace(
            request,
            index=request.index + ABORTED * self.num_aborts,
            prompt=replace(request.prompt, tokens=episode.next_input()),
            seed=turn_seed(request.seed, number),
            sampling=sampling,
            priority=max(request.priority, number > 0),
        )

    def _take_turn(self, turn: Sample) -> None:
        """Add the policy's turn, and hand it to the environment."""
        episode = self.generating.pop(f"{turn.group}.{turn.index}", None)
        if episode is None:  # it was aborted
            return
        episode.add(turn)
        room = episode.request.sampling.max_tokens - episode.length
        is_last = len(episode.turns) == self.engine.max_turns
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
        episode.messages += turn.messages
        is_cut = episode.turns[-1].is_truncated
        if answer.tokens is None or is_cut:  # the policy has not read them
            self._finish(episode, "stop" if turn.is_done and not is_cut else "length", answer.text)
            return
        episode.suffixes.append(np.frombuffer(answer.tokens, np.int32))
        self.ready[episode.request.id] = episode

    def _finish(self, episode: Playing, finish_reason: FinishReason, text: str) -> None:
        sample = episode.sample(finish_reason, self.engine.correct_above, text)
        if self.engine.row_of is None and sample.episode:
            sample.episode.prompt_tokens = None  # the prompt has them
        self._end(episode)
        self.finished.put((episode, sample))

    def begin_again(self, episode: Playing, what: str, is_at_fault: bool) -> None:
        """Play an episode anew whose environment has failed. After ATTEMPTS its group is lost.

        The workers' thread alone calls this.
        """
        with self.changed:
            if episode.number not in self.engine.players:  # it was aborted
                return
            if is_at_fault:
                episode.attempt += 1
                self.engine.workers.warn(what, f"episode {episode.request.id}: ")
            if episode.attempt <= ATTEMPTS:
                self._end(episode)
                self.num_playing += 1
                self._begin(episode)
            else:
                self._lose(episode.request.group, what)
            self._abort_turns()
            self._ask_ready()
            self.changed.notify_all()

    def _lose(self, group: int, what: str) -> None:
        """End all episodes of a group that are played, without samples."""
        for episode in self.groups[group].episodes.values():
            if episode.number in self.engine.players:
                self._end(episode)
                self.finished.put(
                    (episode, lost(episode.request, f"of {self.engine.workers.setup.name}: {what}"))
                )

    def _end(self, episode: Playing) -> None:
        """Play an episode no more, and close its environment."""
        if not self.engine.players.pop(episode.number, None):  # it has finished
            return
        self.num_playing -= 1
        self.ready.pop(episode.request.id, None)
        if self.generating.pop(episode.turn_id, None):
            self.aborted.append(episode.turn_id)
            self.num_aborts += 1
        is_called = episode.number in self.answering
        self.answering.discard(episode.number)
        if is_called or self.engine.row_of:
            self.engine.workers.end(episode.number)

    def _abort_turns(self) -> None:
        if self.aborted:
            self.inner.abort(self.aborted)
            self.aborted = []

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.finished.put(None)

    # --- the thread ---

    def _play(self) -> None:
        """Read turns from the engine as long as episodes are played."""
        try:
            while self._has_turns():
                num_asked = self.num_asked
                for turn in self.inner.completed():
                    with self.changed:
                        self._take_turn(turn)
                with self.changed:
                    missing = list(self.generating) if self.num_asked == num_asked else []
                    assert not missing, f"the engine has returned everything, but not the turns {missing[:8]}"
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
