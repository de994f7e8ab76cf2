"""What an answer becomes, without a server."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest

from dapo.engine import generate
from dapo.engine.generate import BadAnswer
from dapo.types import EngineError, Prompt, Request, Sample, Sampling

RID, VOCAB = "a1-3.1-7;", 50
REQUEST = Request(3, 1, Prompt(0, np.array([5, 6, 7], np.int32), ""), 42, Sampling(0.8, 6, (9, 4)))


def answer(tokens: list[int], reason: Any = None, request: Request = REQUEST, **changes: Any) -> bytes:
    """SGLang's answer: log-probs −0.125, −0.25, … of these tokens. `reason` defaults to the limit."""
    meta = {
        "id": RID,
        "prompt_tokens": len(request.prompt.tokens),
        "finish_reason": {"type": reason}
        if isinstance(reason, str)
        else reason or {"type": "length", "length": len(tokens)},
        "weight_version": "12",
        "weight_versions": [{"version": "12", "start": 0, "end": len(tokens)}],
        "output_token_logprobs": [[-0.125 * (i + 1), token, None] for i, token in enumerate(tokens)],
    }
    return orjson.dumps({"text": "…", "output_ids": tokens, "meta_info": meta | changes})


def read(answer: bytes, request: Request = REQUEST) -> Sample:
    return generate.read(answer, generate.asked(request, RID), VOCAB)


def test_a_request_sets_everything_that_a_server_could_decide_by_itself() -> None:
    sampling = Sampling(0.8, 6, (9, 4), top_p=0.7)
    request = Request(3, 1, Prompt(0, np.array([0, 6, 7], np.int32), ""), 42, sampling)
    assert orjson.loads(generate.body(request, RID)) == {
        "rid": RID,
        "input_ids": [0, 6, 7],
        "sampling_params": {
            "max_new_tokens": 6,
            "temperature": 0.8,
            "top_p": 0.7,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "min_new_tokens": 0,
            "n": 1,
            "stop_token_ids": [9, 4],
            "ignore_eos": False,
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "sampling_seed": 42,
        },
        "return_logprob": True,
        "logprob_start_len": -1,
        "stream": False,
    }


@pytest.mark.parametrize("tokens", [[0, 20, 9], [49, 0, 9], [0] * 6])
def test_the_first_and_the_last_id_of_the_vocabulary_are_tokens_as_any_other(tokens: list[int]) -> None:
    assert read(answer(tokens)).tokens.tolist() == tokens


def test_a_certain_token_may_have_a_log_prob_of_zero_or_a_little_above() -> None:
    entries = [[0, 20, None], [1e-6, 21, None], [-90.0, 9, None]]
    assert read(answer([20, 21, 9], "stop", output_token_logprobs=entries)).behavior_logprobs.tolist() == [
        0.0,
        np.float32(1e-6),
        -90.0,
    ]


def test_an_answer_becomes_a_sample() -> None:
    sample = read(answer([20, 21, 22, 9], {"type": "stop", "matched": 9}), REQUEST)
    assert (sample.group, sample.index, sample.finish_reason, sample.versions) == (
        3,
        1,
        "stop",
        ((12, 0, 4),),
    )
    assert sample.tokens.dtype == np.int32 and sample.tokens.tolist() == [20, 21, 22, 9]
    assert sample.behavior_logprobs.dtype == np.float32 and sample.behavior_logprobs.tolist() == [
        -0.125,
        -0.25,
        -0.375,
        -0.5,
    ]
    assert sample.loss_mask.dtype == bool and sample.loss_mask.tolist() == [True] * 4


def test_a_response_is_cut_at_its_first_stop_token_with_all_that_belongs_to_it() -> None:
    spans = [
        {"version": "11", "start": 0, "end": 2},
        {"version": "12", "start": 2, "end": 4},
        {"version": "13", "start": 4, "end": 6},
    ]
    sample = read(answer([20, 21, 4, 9, 22, 23], weight_versions=spans), REQUEST)
    assert sample.tokens.tolist() == [20, 21, 4] and sample.finish_reason == "stop"
    assert sample.length == len(sample.behavior_logprobs) == len(sample.loss_mask) == 3
    assert sample.versions == ((11, 0, 2), (12, 2, 3))


def test_the_limit_ends_a_response_unless_its_last_token_is_a_stop_token() -> None:
    assert read(answer([20, 21, 22, 23, 24, 25]), REQUEST).finish_reason == "length"
    assert read(answer([20, 21, 22, 23, 24, 9]), REQUEST).finish_reason == "stop"


def test_a_server_that_knows_only_the_last_weight_version_is_believed() -> None:
    assert read(answer([20, 9], "stop", weight_versions=None), REQUEST).versions == ((12, 0, 2),)


def test_weights_that_no_sync_has_named_are_of_an_unknown_version() -> None:
    spans = [{"version": "default", "start": 0, "end": 2}]
    assert read(answer([20, 9], "stop", weight_versions=spans), REQUEST).versions == (
        (generate.UNKNOWN_VERSION, 0, 2),
    )


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"", "no answer of SGLang"),
        (b"{}", "no answer of SGLang: KeyError: 'meta_info'"),
        (b"[]", "0 samples, expected one"),
        (b"[1, 2]", "2 samples"),
        (b"7", "JSON, but no object"),
        (answer([20, 9], "stop")[:-40], "no answer of SGLang: JSONDecodeError"),
        (answer([], "stop"), "0 tokens, expected 1 to 6"),
        (answer([20, 21, 22, 23, 24, 25, 26]), "7 tokens, expected 1 to 6"),
        (
            answer(
                [20, 9],
                "stop",
                output_token_logprobs=[[-1.0, 20, None]],
                weight_version="1",
                weight_versions=None,
            ),
            "1 log-probs for 2",
        ),
        (
            answer([20, 9], "stop", output_token_logprobs=[[-1.0, 9, None], [-1.0, 20, None]]),
            "log-probs of other tokens",
        ),
        (answer([-1, 9], "stop"), "token id -1, where the policy's vocabulary has 50"),
        (answer([50, 9], "stop"), "token id 50, where the policy's vocabulary has 50: another model?"),
        (answer([20, 2**40], "stop"), f"token id {2**40}, where"),
        (answer([20, 9], "stop").replace(b"20,", b"%d," % 2**80), "no answer of SGLang: "),
        (answer([20, 9], "stop").replace(b"20,", b"3.7,"), "no answer of SGLang: TypeError: float among int"),
        (
            answer([20, 9], "stop").replace(b"20,", b"20.0,"),
            "no answer of SGLang: TypeError: float among int",
        ),
        (answer([1, 9], "stop").replace(b"1,", b"true,"), "no answer of SGLang: TypeError: bool among int"),
        (answer([20, 9], "stop").replace(b"[20,9]", b'"20"'), "a list is expected, not str"),
        *[
            (answer([20, 9], "stop", output_token_logprobs=[[-1.0, 20, None], [wrong, 9, None]]), says)
            for wrong, says in (
                (5.0, "a log-prob of 5, which no drawn token has"),
                (0.02, "a log-prob of 0.02"),
                (1e30, r"a log-prob of 1e\+30"),
                (-1e30, r"a log-prob of -1e\+30"),
                (True, "no answer of SGLang: TypeError: bool among float and int and NoneType"),
                (False, "no answer of SGLang: TypeError: bool among"),
                ("-1.0", "no answer of SGLang: TypeError: str among"),
            )
        ],
        (answer([20, 9], "stop").replace(b"-0.25", b"NaN"), "no answer of SGLang: JSONDecodeError"),
        (answer([20, 9], "stop").replace(b"-0.25", b"-1e999"), "no answer of SGLang|not finite"),
        (answer([20, 9], "stop", id="a1-3.1-6;"), "the answer to another request, 'a1-3.1-6;'"),
        (answer([20, 9], "stop", prompt_tokens=4), "a prompt of 4 tokens, not of the 3 that were sent"),
        (b'{"meta_info": ' + b"[" * 100_000, "no answer of SGLang: JSONDecodeError"),
        (answer([20, 9], "stop").replace("…".encode(), rb"\ud800"), "no answer of SGLang: JSONDecodeError"),
        (
            answer([20, 9], "stop", weight_versions=[{"version": "1", "start": False, "end": 2}]),
            "bool among int",
        ),
        (answer([20, 9], "stop", output_token_logprobs=[[-1.0, 20, None], [None, 9, None]]), "not finite"),
        (
            answer([20, 9], "stop", output_token_logprobs=[["x", 20, None], [-1.0, 9, None]]),
            "no answer of SGLang: TypeError",
        ),
        (answer([20, 9], "stop", output_token_logprobs=None), "no answer of SGLang: TypeError"),
        (answer([20, 9], {"type": "stop", "matched": "NaN happened"}), "stopped by 'NaN happened'"),
        (answer([20, 9], "tired"), "unknown finish reason 'tired'"),
        (answer([20], {"type": "abort", "message": "out of memory"}), "aborted by the server: out of memory"),
        (
            answer([20, 9], "stop", weight_versions=[{"version": "1", "start": 0, "end": 1}]),
            "weight versions",
        ),
        (
            answer([20, 9], "stop", weight_versions=[{"version": "1", "start": 1, "end": 2}]),
            "weight versions",
        ),
    ],
)
def test_what_is_no_response_says_why(bad: bytes, says: str) -> None:
    with pytest.raises(BadAnswer, match=says):
        read(bad, REQUEST)


def test_an_end_at_a_token_that_is_no_stop_id_of_ours_ends_the_run() -> None:
    with pytest.raises(
        EngineError,
        match=r"response 3\.1 ended at token id 33, .* stop ids \(9, 4\): name it as eos_token_id",
    ):
        read(answer([20, 33], {"type": "stop", "matched": 33}), REQUEST)


def test_a_response_that_the_server_has_no_room_for_ends_the_run() -> None:
    with pytest.raises(
        EngineError, match=r"response 3\.1 was cut off after 2 of 6 tokens: the server has no room"
    ):
        read(answer([20, 21]), REQUEST)


def test_garbage_is_not_collected_while_an_answer_is_read() -> None:
    assert gc.isenabled()
    with generate._collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_is_as_it_was_after_an_answer_good_or_bad(was_enabled: bool) -> None:
    if not was_enabled:
        gc.disable()
    try:
        read(answer([20, 9], "stop"), REQUEST)
        assert gc.isenabled() == was_enabled
        with pytest.raises(BadAnswer):
            read(b"{", REQUEST)
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()


@pytest.mark.parametrize("count", [1, 50_000])
def test_an_answer_may_have_the_bytes_of_its_tokens_and_little_more(count: int) -> None:
    request = replace(REQUEST, sampling=Sampling(0.8, count, ()))
    exact = len(
        answer([VOCAB - 1] * count, output_token_logprobs=[[-123.45678901234567, 151_642, None]] * count)
    )
    assert exact < generate.asked(request, RID).max_bytes(None) < 2**21 + 50 * exact
