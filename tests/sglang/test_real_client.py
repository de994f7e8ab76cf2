"""The engine against the real SGLang server: log-probs, ends, aborts, refusals."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dapo.config import Limits
from dapo.engine import generate
from dapo.engine.control import Server
from dapo.engine.generate import BadAnswer
from dapo.engine.sglang import SGLangEngine, SGLangStream
from dapo.types import EngineError, Prompt, Request, Sample, Sampling
from tests.sglang.conftest import VOCAB

LIMIT = 120.0  # seconds, on a busy machine


class Alone:
    """One server, which somebody else starts and stops, with the weights that it has."""

    def __init__(self, server: Server):
        self.workers, self.generate_urls = [server], [server.url]

    def key_of(self, url: str) -> str | None:
        return self.workers[0].key

    def check(self) -> None: ...

    def restart(self, url: str, fault: str) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def engine(sglang_server: Any) -> Iterator[SGLangEngine]:
    alone = Alone(sglang_server.server)
    engine = SGLangEngine(alone, alone, 64, Limits(LIMIT), VOCAB)  # type: ignore[arg-type]  # no sync takes place
    yield engine
    engine.close()
    wait_until_idle(sglang_server.server)


@pytest.fixture
def stream(engine: SGLangEngine) -> SGLangStream:
    return engine.stream()


@pytest.fixture
def long_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server goes on behind a stop token, up to max_tokens; the engine cuts there."""
    body = generate.body

    def endless(request: Request, rid: str) -> bytes:
        asked = json.loads(body(request, rid))
        asked["sampling_params"]["ignore_eos"] = True
        return json.dumps(asked).encode()

    monkeypatch.setattr(generate, "body", endless)


@pytest.fixture(scope="module")
def model(sglang_server: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(sglang_server.model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def shape(sglang_server: Any) -> SimpleNamespace:
    config = json.loads((sglang_server.model / "config.json").read_text())
    return SimpleNamespace(
        stop_ids=(config["eos_token_id"],),
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
    )


def requests(count: int, shape: SimpleNamespace, sampling: Sampling) -> list[Request]:
    """Prompts of different lengths without stop tokens."""
    rng = np.random.default_rng(0)
    usable = np.setdiff1d(np.arange(shape.vocabulary), shape.stop_ids)
    prompts = [rng.choice(usable, int(rng.integers(3, 30))).astype(np.int32) for _ in range(count)]
    return [Request(i // 4, i % 4, Prompt(i, tokens, ""), i, sampling) for i, tokens in enumerate(prompts)]


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def num_running(server: Server) -> int:
    return sum(
        load["num_running_reqs"] + load["num_waiting_reqs"] for load in server.get("/v1/loads")["loads"]
    )


def wait_until_idle(server: Server) -> None:
    wait_for(lambda: num_running(server) == 0)


def expected_logprobs(model: Any, request: Request, sample: Sample) -> np.ndarray:
    """log softmax(logits / T) of the response's tokens, by a plain forward of the Hugging Face model."""
    prompt = request.prompt.tokens
    tokens = torch.from_numpy(np.concatenate([prompt, sample.tokens])).long()
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, len(prompt) - 1 : -1] / request.sampling.temperature
    return logits.log_softmax(-1).gather(-1, tokens[len(prompt) :, None])[:, 0].numpy()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7)])
def test_64_concurrent_responses_have_the_models_logprobs(
    stream, model, shape, temperature: float, top_p: float
) -> None:
    wanted = {
        request.id: request
        for request in requests(64, shape, Sampling(temperature, 48, shape.stop_ids, top_p))
    }
    stream.submit(wanted.values())
    samples = list(stream.completed())
    assert {f"{sample.group}.{sample.index}" for sample in samples} == wanted.keys() and len(samples) == 64
    worst = 0.0
    for sample in samples:
        expected = expected_logprobs(model, wanted[f"{sample.group}.{sample.index}"], sample)
        worst = max(worst, float(np.abs(sample.behavior_logprobs - expected).max()))
        stops = np.flatnonzero(np.isin(sample.tokens, shape.stop_ids)).tolist()
        assert stops == ([sample.length - 1] if sample.finish_reason == "stop" else [])
        assert sample.finish_reason == "stop" or sample.length == 48
        assert [span[1:] for span in sample.versions] == [(0, sample.length)]
    assert worst <= 1e-4
    assert len({sample.tokens.tobytes() for sample in samples}) > 32, "they are drawn, not all alike"


def test_every_stop_id_ends_a_response_and_stays_in_it(stream, shape) -> None:
    more = tuple(range(2, shape.vocabulary, 3))
    stream.submit(requests(32, shape, Sampling(1.0, 32, (*shape.stop_ids, *more))))
    samples = list(stream.completed())
    assert len(samples) == 32 and all(
        sample.finish_reason == "stop" for sample in samples if sample.length < 32
    )
    ends = {int(sample.tokens[-1]) for sample in samples if sample.finish_reason == "stop"}
    assert ends & set(more) and ends <= {*shape.stop_ids, *more}
    assert not any(np.isin(sample.tokens[:-1], (*shape.stop_ids, *more)).any() for sample in samples)


@pytest.mark.parametrize("excess", ["prompt", "response"])
def test_what_does_not_fit_the_context_is_refused_with_one_clear_error(stream, shape, excess: str) -> None:
    length, limit = (shape.context + 10, 8) if excess == "prompt" else (10, shape.context)
    prompt = Prompt(5, np.full(length, shape.vocabulary - 1, np.int32), "")
    stream.submit([Request(5, 0, prompt, 0, Sampling(1.0, limit, shape.stop_ids))])
    with pytest.raises(
        EngineError,
        match=rf"refused request 5\.0 \({length} tokens of prompt, max_tokens {limit}\): 400 .*context",
    ):
        list(stream.completed())


def test_abort_ends_one_request_and_not_the_one_whose_id_begins_alike(
    stream, shape, sglang_server, long_responses
) -> None:
    sampling = Sampling(1.0, shape.context // 2, shape.stop_ids)
    prompt = requests(1, shape, sampling)[0].prompt
    wanted = [Request(1, index, prompt, index, sampling) for index in range(32)]
    stream.submit(wanted)
    wait_for(lambda: num_running(sglang_server.server) > 16)
    stream.abort(request.id for request in wanted if request.index in (1, 2))
    samples = list(stream.completed())
    assert {sample.index for sample in samples} == set(range(32)) - {1, 2}
    for sample in samples:
        stops = np.flatnonzero(np.isin(sample.tokens, shape.stop_ids)).tolist()
        assert stops == ([sample.length - 1] if sample.finish_reason == "stop" else [])
        assert sample.finish_reason == "stop" or sample.length == sampling.max_tokens
    assert [endpoint.fault for endpoint in stream.client.endpoints] == [""], (
        "none came back aborted and was asked again"
    )


def test_an_aborted_response_comes_back_in_part_and_is_no_sample(
    shape, sglang_server, long_responses
) -> None:
    server, sampling = sglang_server.server, Sampling(1.0, shape.context // 2, shape.stop_ids)
    [request] = requests(1, shape, sampling)
    body, asked = json.loads(generate.body(request, "partial;")), generate.asked(request, "partial;")
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(server.post("/generate", body, timeout=LIMIT)))
    asking.start()
    wait_for(lambda: num_running(server) == 1)
    server.post("/abort_request", {"rid": "partial;"})
    asking.join(LIMIT)
    [answer] = answers
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert (
        0
        < len(answer["output_ids"])
        == len(answer["meta_info"]["output_token_logprobs"])
        < sampling.max_tokens
    )
    with pytest.raises(BadAnswer, match="aborted by the server"):
        generate.read(json.dumps(answer).encode(), asked, VOCAB)


def test_a_long_response_is_no_stall(
    engine, shape, sglang_server, long_responses, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is completed for longer than stall_seconds, an eighth of what it took before or 1.5 s; but
    the server generates, and says so in time.
    """
    wanted = requests(24, shape, Sampling(1.0, shape.context * 3 // 4, shape.stop_ids))

    def seconds_to_first(engine: SGLangEngine) -> float:
        start, stream = time.monotonic(), engine.stream()
        stream.submit(wanted)
        completed = stream.completed()
        next(completed)
        seconds = time.monotonic() - start
        assert len(list(completed)) == len(wanted) - 1
        return seconds

    stall = max(1.5, seconds_to_first(engine) / 8)  # the machine may be that much faster the second time
    alone = Alone(sglang_server.server)
    impatient = SGLangEngine(alone, alone, 64, Limits(stall), VOCAB)  # type: ignore[arg-type]
    assert seconds_to_first(impatient) > stall
    impatient.close()
    assert "no progress" not in capfd.readouterr().err


def test_close_leaves_the_server_idle(shape, sglang_server, long_responses) -> None:
    alone = Alone(sglang_server.server)
    engine = SGLangEngine(alone, alone, 64, Limits(LIMIT), VOCAB)  # type: ignore[arg-type]
    engine.stream().submit(requests(32, shape, Sampling(1.0, shape.context // 2, shape.stop_ids)))
    wait_for(lambda: num_running(sglang_server.server) > 8)
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < 10
    wait_until_idle(sglang_server.server)
