"""A stage for episodes: real workers, and a policy that says what it is asked to say."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dapo.episodes.player import Setup
from dapo.episodes.stream import ABORTED, EpisodeEngine, turn_seed
from dapo.episodes.workers import Workers
from dapo.types import Prompt, Request, Sample, Sampling
from tests.dapo.episodes.families import FAMILIES

HERE = "tests.dapo.episodes.obedient"
FAMILY = FAMILIES[0]
REFUSING = FAMILY.template + (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers') }}"
    "{% endif %}{% endfor %}"
)
SECONDS = 0.5  # rollout.turn_seconds
MOST = 400  # tokens of an episode
DONE = "I am done"


class Policy:
    """An engine, and its streams: what `say(group, index, turn)` returns is its turn."""

    is_colocated = False

    def __init__(self, say: Callable[[int, int, int], str] = lambda group, index, turn: f"turn {turn}"):
        self.say, self.version = say, 3
        self.rounds: list[list[tuple[str, int]]] = []  # ids and seeds, as they were asked for
        self.streams: list[PolicyStream] = []
        self.is_closed = False

    def stream(self) -> PolicyStream:
        self.streams.append(PolicyStream(self))
        return self.streams[-1]

    def answer(self, request: Request) -> Sample:
        group, index = request.group, request.index % ABORTED
        turn = next(n for n in range(99) if turn_seed(seed_of(group, index), n) == request.seed)
        tokens = encode(self.say(group, index, turn))[: request.sampling.max_tokens]
        n = len(tokens)
        logprobs = logprobs_of(request.seed, request.prompt.tokens, n)
        is_whole = tokens[-1] in FAMILY.stop_ids
        return Sample(
            group,
            request.index,
            np.array(tokens, np.int32),
            logprobs,
            np.ones(n, bool),
            ((self.version, 0, n),),
            "stop" if is_whole else "length",
        )

    def waiting(self) -> str:
        return "the policy is there"

    def prepare_weights(self, version: int) -> None: ...

    def load_weights(self, weights: Any, version: int) -> None:
        self.version = version

    def take_idle(self) -> list[float]:
        return [0.0]

    def score(self, groups: Any) -> list[np.ndarray]:
        return []

    def release_memory(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


class PolicyStream:
    """Answers in order, as the embedded engine does: what is popped is answered, even if it is aborted."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.queue: list[Request] = []
        self.lock = threading.Lock()
        self.failure: BaseException | None = None

    def submit(self, requests: Iterable[Request]) -> None:
        requests = list(requests)
        with self.lock:
            self.queue += requests
            self.policy.rounds.append([(request.id, request.seed) for request in requests])

    def completed(self) -> Iterator[Sample]:
        while True:
            with self.lock:
                if self.failure:
                    failure, self.failure = self.failure, None
                    raise failure
                if not self.queue:
                    return
                request = self.queue.pop(0)
            yield self.policy.answer(request)

    def abort(self, ids: Iterable[str] | None = None) -> None:
        with self.lock:
            gone = {request.id for request in self.queue} if ids is None else set(ids)
            self.queue = [request for request in self.queue if request.id not in gone]


def encode(text: str) -> list[int]:
    return [*FAMILY.tokenizer.encode(text, add_special_tokens=False).ids, FAMILY.stop_ids[0]]


def logprobs_of(seed: int, given: np.ndarray, count: int) -> np.ndarray:
    """Log-probs of a turn: others for another seed, or other tokens before it."""
    rng = np.random.default_rng([seed, zlib.crc32(np.asarray(given, np.int32).tobytes())])
    return -rng.random(count, np.float32) - 1e-3


def seed_of(group: int, index: int) -> int:
    return 1000 * group + index


class Origin:
    def __init__(self, row: dict[str, Any]):
        self.row = row

    def read(self, prompt: Prompt, names: Any) -> dict[str, Any]:
        return {"task": self.row, "messages": [{"role": "user", "content": "begin"}]}


def request_of(group: int, index: int, row: dict[str, Any] | None = None, most: int = MOST) -> Request:
    """`row`: of the environment; None: for tools."""
    tokens = encode("begin") if row is None else []
    prompt = Prompt(group, np.array(tokens, np.int32), "", Origin(row or {}))
    return Request(group, index, prompt, seed_of(group, index), Sampling(1.0, most, FAMILY.stop_ids))


def setup_of(kind: str = "Obedient", tools: Sequence[str] = (), seconds: float = SECONDS) -> Setup:
    from dapo.episodes.tools import schemas

    paths = tuple(f"{HERE}:{name}" for name in tools)
    environment = None if tools else f"{HERE}:{kind}"
    return Setup(FAMILY.chat(REFUSING), environment, paths, schemas(paths), seconds, max_prompt_length=500)


class Stage:
    """An engine of episodes over a Policy."""

    def __init__(
        self,
        setup: Setup | None = None,
        policy: Policy | None = None,
        workers: int = 1,
        memory: float = 4.0,
        max_turns: int = 6,
        in_rounds: bool = False,
        is_interrupted: Callable[[], bool] = lambda: False,
    ):
        self.setup, self.policy = setup or setup_of(), policy or Policy()
        self.workers = Workers(self.setup, workers, memory)
        self.engine = EpisodeEngine(
            self.policy,
            self.workers,
            max_turns,
            run_seed=5,
            in_rounds=in_rounds,
            correct_above=0.9,
            row_of=(lambda prompt: prompt.origin.read(prompt, ())["task"])
            if self.setup.environment
            else None,
            messages_of=lambda prompt: [{"role": "user", "content": "begin"}],
            is_interrupted=is_interrupted,
        )

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.close()

    def requests(self, rows: Sequence[dict[str, Any] | None], group_size: int = 1) -> list[Request]:
        return [request_of(g, i, row) for g, row in enumerate(rows) for i in range(group_size)]

    def play(self, rows: Sequence[dict[str, Any] | None], group_size: int = 1) -> dict[str, Sample]:
        """Play episodes with these rows; return the samples by id, once each request has one."""
        requests = self.requests(rows, group_size)
        stream = self.engine.stream()
        stream.submit(requests)
        samples = [*stream.completed()]
        found = {f"{sample.group}.{sample.index}": sample for sample in samples}
        assert len(found) == len(samples) and found.keys() == {request.id for request in requests}
        assert_nothing_is_left(self, stream)
        for sample in samples:
            assert_is_exact(sample)
        return found


def assert_nothing_is_left(stage: Stage, stream: Any) -> None:
    assert not (stream.episodes or stream.groups or stream.generating or stream.answering or stream.ready)
    assert stream.num_playing == 0
    assert not any(each is stream for each, _ in stage.engine.players.values())


def assert_is_exact(sample: Sample) -> None:
    """The policy's tokens are what it said to what stands before them; the others are not learnt from."""
    if sample.is_lost:
        assert not len(sample.tokens) and sample.text
        return
    assert sample.episode and sample.finish_reason in ("stop", "length")
    of_environment = sample.episode.prompt_tokens
    prompt = encode("begin") if of_environment is None else of_environment
    edges = np.flatnonzero(np.diff(sample.loss_mask)) + 1
    own = np.split(np.arange(sample.length), edges)[::2]
    assert sample.loss_mask[0] and sample.loss_mask[-1] and len(own) == sample.episode.num_turns
    for turn, places in enumerate(own):
        seed = turn_seed(seed_of(sample.group, sample.index), turn)
        expected = logprobs_of(seed, np.concatenate([prompt, sample.tokens[: places[0]]]), len(places))
        assert np.array_equal(sample.behavior_logprobs[places], expected)
    assert not sample.behavior_logprobs[~sample.loss_mask].any()
    said = [m["content"] for m in sample.episode.messages if m["role"] == "assistant"]
    decoded = [FAMILY.chat().text(sample.tokens[places].tolist()) for places in own]
    assert said == decoded
