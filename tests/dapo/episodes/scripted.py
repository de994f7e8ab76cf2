"""Episodes of a scripted policy and environment through EpisodeStream, and what is wrong with them."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from dapo.episodes.chat import Chat
from dapo.episodes.environment import Message, Turn
from dapo.episodes.player import Answer, Began, Begin, End, Step
from dapo.episodes.stream import EpisodeEngine
from dapo.episodes.workers import Call
from dapo.types import Prompt, Request, Sample, Sampling
from tests.dapo.episodes.families import TOOL, Family, split_randomly, words

NUM_TURNS = 5  # at most
GROUP = 4


@dataclass
class Script:
    """What happens in one episode, and what was seen of it."""

    turns: list[str]  # of the policy
    answers: list[list[Message]]  # of the environment
    calls: list[tuple[list[int], list[int]]] = field(
        default_factory=list
    )  # input ids, the policy's raw tokens
    versions: list[int] = field(default_factory=list)  # of each raw token
    budget: int = 0  # tokens


def make_script(family: Family, rng: random.Random) -> Script:
    num_turns = rng.randint(1, NUM_TURNS)
    turns, answers = [], []
    for _ in range(num_turns):
        thought = f"<think>\n{words(rng)}\n</think>\n\n" if family.thinks and rng.random() < 0.8 else ""
        call = ""
        said = [{"role": "user", "content": words(rng)}]
        if rng.random() < 0.5:
            call = (
                f'\n<tool_call>\n{{"name": "add", "arguments": {{"a": {rng.randint(0, 99)}}}}}\n</tool_call>'
            )
            said = [{"role": "tool", "name": "add", "content": words(rng)} for _ in range(rng.randint(1, 2))]
        turns.append(thought + words(rng) + call)
        answers.append(said)
    return Script(turns, answers)


class Engine:
    """Writes what the scripts say, in tokens that are seldom the tokenizer's own."""

    is_colocated = False

    def __init__(self, family: Family, scripts: dict[str, Script], seed: int):
        self.family, self.scripts, self.rng = family, scripts, random.Random(seed)
        self.tokenizer = family.tokenizer
        self.queue: deque[Request] = deque()

    def stream(self) -> Engine:
        return self

    def submit(self, requests: Iterable[Request]) -> None:
        self.queue.extend(requests)

    def abort(self, ids: Iterable[str] | None = None) -> None:
        raise AssertionError("nothing is aborted here")

    def completed(self) -> Iterator[Sample]:
        while self.queue:
            yield self.sample(self.queue.popleft())

    def sample(self, request: Request) -> Sample:
        rng, script = self.rng, self.scripts[request.id]
        number = len(script.calls)
        raw = split_randomly(self.tokenizer, script.turns[number], rng)
        if rng.random() < 0.1:  # any token at all, of whichever role's marker
            others = set(range(self.tokenizer.get_vocab_size())) - set(self.family.stop_ids)
            raw.insert(rng.randrange(len(raw)), rng.choice(sorted(others)[-20:]))
        raw = [*raw, self.family.end(script.answers[number], rng)]
        raw = raw[: request.sampling.max_tokens]
        script.calls.append((request.prompt.tokens.tolist(), raw))
        split, n = rng.randrange(len(raw)), len(raw)
        script.versions += [number] * split + [number + 1] * (n - split)
        return Sample(
            request.group,
            request.index,
            np.array(raw, np.int32),
            np.array([-1.0 - number - i / 64 for i in range(n)], np.float32),
            np.ones(n, bool),
            ((number, 0, split), (number + 1, split, n)),
            "stop" if raw[-1] in self.family.stop_ids else "length",
        )


class Workers:
    """Answers at once, in this process, as a Player does."""

    setup = SimpleNamespace(environment="scripted:Environment", name="rollout.environment=scripted")
    failure: BaseException | None = None

    def __init__(
        self, chat: Chat, scripts: Callable[[dict[str, Any]], Script], first: Callable[[int], Message]
    ):
        self.chat, self.scripts, self.first = chat, scripts, first
        self.numbers = itertools.count()
        self.playing: dict[int, tuple[Script, int]] = {}

    def listen(self, listener: Any) -> None: ...

    def end(self, number: int) -> None:
        self.playing.pop(number, None)

    def close(self) -> None: ...

    def ask(self, call: Call) -> None:
        message = call.message
        if isinstance(message, Begin):
            messages = [self.first(message.seed)]
            self.playing[message.episode] = self.scripts(message.row), 0
            tokens = self.chat.start(messages, [TOOL])
            call.done(Began(message.episode, np.array(tokens, np.int32).tobytes(), messages))
        else:
            assert isinstance(message, Step) and not isinstance(message, End)
            call.done(self.step(message))

    def step(self, message: Step) -> Answer:
        script, number = self.playing[message.episode]
        self.playing[message.episode] = script, number + 1
        raw = np.frombuffer(message.tokens, np.int32).tolist()
        is_done = number + 1 == len(script.turns)
        turn = Turn([] if is_done else script.answers[number], is_done, 1.0)
        tokens, count = None, 0
        if not (is_done or message.is_truncated):
            suffix = self.chat.after(raw[-1], turn.messages, [TOOL], message.room)
            tokens, count = suffix.tokens, suffix.num_neutralised
        encoded = None if tokens is None else np.array(tokens, np.int32).tobytes()
        return Answer(message.episode, self.chat.text(raw), turn, encoded, 0, 0, 0, count)


def play(
    family: Family,
    num_episodes: int,
    seed: int = 0,
    script_of: Callable[[Family, random.Random], Script] = make_script,
) -> Iterator[tuple[Script, Sample]]:
    """Play episodes of a family; yield each with what it was to be. The random numbers are the seed's."""
    rng = random.Random(f"{family.name}{seed}")
    scripts: dict[str, Script] = {}
    requests = []
    for number in range(num_episodes):
        group, index = divmod(number, GROUP)
        prompt = Prompt(group, np.zeros(0, np.int32), "", None)
        sampling = Sampling(1.0, rng.choice([20, 60, 150, 2000]), family.stop_ids)
        requests.append(Request(group, index, prompt, rng.getrandbits(60), sampling))
        scripts[requests[-1].id] = script_of(family, rng)
        scripts[requests[-1].id].budget = sampling.max_tokens
    order = iter([scripts[request.id] for request in requests])  # environments are made in that of requests
    workers: Any = Workers(
        family.chat(),
        lambda row: next(order),
        lambda seed: {"role": "user", "content": words(random.Random(seed))},
    )
    inner: Any = Engine(family, scripts, seed)
    engine = EpisodeEngine(
        inner, workers, NUM_TURNS - 1, seed, False, 0.5, lambda prompt: {}, lambda prompt: []
    )
    stream = engine.stream()
    stream.submit(requests)
    for sample in stream.completed():
        yield scripts[f"{sample.group}.{sample.index}"], sample


def faults(family: Family, script: Script, sample: Sample) -> list[str]:
    """Return what is wrong with an episode: its calls, mask, log-probs, versions, or the other tokens."""
    found = []
    assert sample.episode and sample.episode.prompt_tokens is not None
    prompt = sample.episode.prompt_tokens.tolist()
    whole = prompt + sample.tokens.tolist()
    is_written = [False] * len(whole)
    logprobs = np.zeros(len(whole), np.float32)
    end = 0
    for number, (given, raw) in enumerate(script.calls):
        start, end = len(given), len(given) + len(raw)
        if whole[:start] != given:
            found.append(f"call {number} was asked for with other tokens")
        if whole[start:end] != raw:
            found.append(f"turn {number} was tokenized again")
        is_written[start:end] = [True] * len(raw)
        logprobs[start:end] = [-1.0 - number - i / 64 for i in range(len(raw))]
        if number + 1 < len(script.calls):
            between = family.between(script.answers[number])
            ends = {i: family.tokenizer.id_to_token(i) for i in family.stop_ids}
            expected = between.removeprefix(ends.get(raw[-1], "")) if raw[-1] in ends else between
            following = whole[end : len(script.calls[number + 1][0])]
            if family.tokenizer.decode(following, skip_special_tokens=False) != expected:
                found.append(f"turn {number} is followed by other text")
    if sample.length > script.budget:
        found.append("it has more tokens than it may")
    if end != len(whole):
        found.append("the last turn does not end the episode")
    if is_written[len(prompt) :] != sample.loss_mask.tolist():
        found.append("the mask is wrong")
    if not np.array_equal(logprobs[len(prompt) :], sample.behavior_logprobs):
        found.append("the log-probs are wrong")
    versions = np.full(sample.length, -1)
    for version, start, stop in sample.versions:
        versions[start:stop] = version
    if versions[sample.loss_mask].tolist() != script.versions or (versions[~sample.loss_mask] >= 0).any():
        found.append("the versions are wrong")
    return found


def render_again(family: Family, chat: Chat, script: Script, sample: Sample) -> Sequence[tuple[bool, bool]]:
    """Return for each later call whether rendering the conversation anew has other text, and other tokens."""
    assert sample.episode
    found, messages = [], sample.episode.messages
    at = 1
    for number, (given, _) in enumerate(script.calls):
        if number:
            at += 1 + len(script.answers[number - 1])
            text = chat._render(messages[:at], [TOOL], goes_on=True)
            had = family.tokenizer.decode(given, skip_special_tokens=False)
            ids = family.tokenizer.encode(text, add_special_tokens=False).ids
            found.append((text != had, ids != given))
    return found
