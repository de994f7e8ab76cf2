"""Where the text of a response is made of its tokens: in a worker, or here."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dapo.config import ConfigError
from dapo.model.tokenizer import decoder_json, load_tokenizer
from dapo.reward import remote, worker
from dapo.reward.pool import Decoder, Reward
from dapo.reward.worker import Job
from dapo.types import Interrupted, Prompt, Sample
from dapo.watch import forked, frames
from tests.conftest import make_config, make_prompt, make_sample
from tests.dapo.reward.test_reward import FUNCTIONS

BASE = Path(__file__).parents[3] / "examples/arithmetic/base"
TOKENIZER = load_tokenizer(BASE)
EOS = TOKENIZER.eos_token_id
Make = Callable[..., Reward]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """`make(decoder, "workers=1", …)`: a Reward, closed at the end."""
    made: list[Reward] = []

    def make(decoder: Decoder, *options: str) -> Reward:
        options = "soft_overlong_punishment=false", *options
        reward = make_config(tmp_path, *[f"reward.{option}" for option in options]).reward
        made.append(Reward(reward, 32, tmp_path / "disputes.jsonl", decoder=decoder))
        return made[-1]

    yield make
    for each in made:
        each.close()


def nowhere(tokens: np.ndarray) -> str:
    raise AssertionError("decoded in this process")


def here(tokens: np.ndarray) -> str:
    return str(TOKENIZER.decode(tokens, skip_special_tokens=True))


THERE = Decoder(nowhere, decoder_json(TOKENIZER))


def pairs_of(texts: list[str]) -> list[tuple[Prompt, Sample]]:
    """Samples of these texts and an EOS, which have no text yet."""
    pairs = []
    for i, text in enumerate(texts):
        sample = make_sample(group=i, index=i)
        sample.tokens = np.array([*TOKENIZER(text, add_special_tokens=False)["input_ids"], EOS], np.int32)
        pairs.append((make_prompt(i, answer="1"), sample))
    return pairs


def texts_of(pairs: list[tuple[Prompt, Sample]]) -> list[str]:
    return [sample.text for _, sample in pairs]


TEXTS = [str(i // 2 % 7) for i in range(100)] + ["1+2=3"]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_decodes_and_sends_the_text_back(make: Make, workers: int) -> None:
    pairs = pairs_of(TEXTS)
    make(THERE, f"workers={workers}", f"function={FUNCTIONS}:long_bool").score(pairs)
    assert texts_of(pairs) == TEXTS
    assert [sample.is_correct for _, sample in pairs] == [text == "1" for text in TEXTS]


@pytest.mark.parametrize("decoder", [Decoder(here, THERE.tokenizer), Decoder(here)], ids=["any", "none"])
@pytest.mark.parametrize("workers", [0, 2])
def test_without_a_worker_that_can_this_process_decodes(make: Make, decoder: Decoder, workers: int) -> None:
    pairs = pairs_of(TEXTS)
    make(decoder, f"workers={workers}", f"function={FUNCTIONS}:long_bool").score(pairs)
    assert texts_of(pairs) == TEXTS
    assert [sample.is_correct for _, sample in pairs] == [text == "1" for text in TEXTS]


def test_a_remote_function_is_sent_text(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[str]] = []

    def judge(name: str, url: str, jobs: list[Any], *limits: float, **named: Any) -> list[bool]:
        sent.append([job.response for job in jobs])
        return [True] * len(jobs)

    monkeypatch.setattr(remote, "judge", judge)
    url = "http://127.0.0.1:9/score"
    make(Decoder(here, THERE.tokenizer), f"function={url}").score(pairs_of(["1", "2"]))
    both = json.dumps({f"{FUNCTIONS}:long_bool": 1.0, url: 1.0})
    make(THERE, "workers=1", f"function={both}").score(pairs_of(["1", "2"]))
    assert sent == [["1", "2"]] * 2


@pytest.mark.parametrize("num_samples", [1, 50])
def test_several_functions_are_sent_one_text(
    make: Make, num_samples: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    both = json.dumps({f"{FUNCTIONS}:long_bool": 2.0, f"{FUNCTIONS}:graded": 0.5})
    pool = make(THERE, "workers=3", f"function={both}", f"shadow=[{FUNCTIONS}:one_or_two]")
    replies = []
    assert pool.workers
    judge = pool.workers.judge
    monkeypatch.setattr(
        pool.workers, "judge", lambda *given, **named: replies.extend(judge(*given, **named)) or replies
    )
    texts = [str(1 + i % 9) for i in range(num_samples)]  # each other than the one before
    pairs = pairs_of(texts)
    pool.score(pairs)
    assert len(replies) == 3 * num_samples
    assert [reply.text for reply in replies if reply and reply.text is not None] == texts == texts_of(pairs)
    expected = [(2.0 if text == "1" else -2.0) + 0.5 * float(text) for text in texts]
    assert [sample.reward for _, sample in pairs] == expected
    disputes = tmp_path / "disputes.jsonl"
    rows = [json.loads(line) for line in disputes.read_text().splitlines()] if disputes.exists() else []
    assert {row["response"] for row in rows} == ({"2"} if num_samples > 1 else set())


def served(messages: list[Any], functions: list[str]) -> list[Any]:
    """What `serve` sends when it is sent these messages."""
    ours, theirs = socket.socketpair()
    with ours:
        for message in messages:
            ours.sendall(frames.frame(message))
        ours.shutdown(socket.SHUT_WR)
        with theirs:
            worker.serve(theirs, functions)
        return list(frames.messages(ours))


def test_a_worker_decodes_a_response_once_for_all_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []

    def decode(tokens: bytes) -> str:
        decoded.append(tokens)
        return tokens.decode()

    monkeypatch.setattr(worker, "_decoder", lambda tokenizer: decode)
    monkeypatch.setattr(worker.streams, "keep_open", lambda: None)
    given = (("", b"1"), ("", b"2"), ("", b"2"), ("3", b""))
    jobs = [Job(function, text, "1", (), tokens) for text, tokens in given for function in (0, 1)]
    sent = served(["{}", jobs[:4], jobs[4:]], [f"{FUNCTIONS}:long_bool", f"{FUNCTIONS}:graded"])
    assert decoded == [b"1", b"2"]
    assert [i for i, reply in enumerate(sent) if reply is None] == [0, 1, 4], "at the start, and once decoded"
    texts, verdicts = zip(*[(reply.text, reply.verdict) for reply in sent if reply], strict=True)
    assert texts == ("1", None, "2", None, "2", None, None, None)
    assert verdicts == (True, 1.0, False, 2.0, False, 2.0, False, 3.0)


def test_the_text_of_a_call_that_did_not_return_is_made_here(make: Make) -> None:
    pool = make(Decoder(here, THERE.tokenizer), "workers=2", f"function={FUNCTIONS}:dying_at_2")
    texts = ["1", "2", "1", "1", "2", "1"] * 4
    pairs = pairs_of(texts)
    pool.score(pairs)
    assert texts_of(pairs) == texts
    assert [sample.is_correct for _, sample in pairs] == [text == "1" for text in texts]
    assert pool.take_metrics()["reward/crashes"] == 8


def test_a_worker_that_decodes_imports_no_torch(make: Make) -> None:
    pairs = pairs_of(["1"])
    make(THERE, "workers=1", f"function={FUNCTIONS}:is_free_of_torch").score(pairs)
    assert pairs[0][1].is_correct


def test_a_tokenizer_that_no_worker_can_load_is_one_line(make: Make) -> None:
    pool = make(Decoder(here, "{"), "workers=2", f"function={FUNCTIONS}:long_bool")
    said = r"^policy\.model: no reward worker can load its tokenizer: .+"
    with pytest.raises(ConfigError, match=said) as refused:
        pool.score(pairs_of(["1"]))
    assert "\n" not in str(refused.value)


def test_another_model_s_tokenizer_decodes_from_then_on(make: Make) -> None:
    other = json.loads(THERE.tokenizer or "")
    vocabulary = other["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    pool = make(THERE, "workers=1", f"function={FUNCTIONS}:long_bool")
    for decoder, expected in (
        (THERE, ["1", "2"]), (Decoder(nowhere, json.dumps(other)), ["2", "1"]), (Decoder(here), ["1", "2"]),
    ):  # fmt: skip
        pool.decode_with(decoder)
        pairs = pairs_of(["1", "2"])
        pool.score(pairs)
        assert texts_of(pairs) == expected
        assert [sample.is_correct for _, sample in pairs] == [text == "1" for text in expected]


def test_a_tokenizer_larger_than_what_a_socket_holds_is_no_argument_of_a_process(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(process: Any) -> None:
        assert " " * 100 not in repr((process._target, process._args, process._kwargs))
        started.append(process)
        original(process)

    original, started = forked.start, list[Any]()
    monkeypatch.setattr(forked, "start", start)
    large = " " * 2**22 + (THERE.tokenizer or "")
    pairs = pairs_of(["1", "2"])
    make(Decoder(nowhere, large), "workers=1", f"function={FUNCTIONS}:long_bool").score(pairs)
    assert started and texts_of(pairs) == ["1", "2"]


def test_workers_go_on_with_the_tokenizer_they_have(make: Make) -> None:
    pool = make(THERE, "workers=1", f"function={FUNCTIONS}:process_id")
    first, second = pairs_of(["1"]), pairs_of(["1"])
    pool.score(first)
    pool.decode_with(Decoder(nowhere, THERE.tokenizer))
    pool.score(second)
    assert first[0][1].reward == second[0][1].reward


def test_an_interruption_ends_decoding(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    config = make_config(tmp_path, "reward.workers=0", f"reward.function={FUNCTIONS}:long_bool").reward
    decoded = SimpleNamespace(count=0)

    def count(tokens: np.ndarray) -> str:
        decoded.count += 1
        return "1"

    pool = Reward(config, 32, is_interrupted=lambda: next(asked), decoder=Decoder(count))
    with pytest.raises(Interrupted):
        pool.score(pairs_of(["1"] * 5))
    assert decoded.count == 2
