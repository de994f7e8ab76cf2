"""What an answer becomes, without a server."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import orjson
import pytest

from dapo.engine import generate
from dapo.engine.generate import BadAnswer
from dapo.types import EngineError, Prompt, Request, Sampling

REQUEST = Request(3, 1, Prompt(0, np.array([5, 6, 7], np.int32), ""), 42, Sampling(0.8, 6, (9, 4)))


def answer(tokens: list[int], reason: Any = None, request: Request = REQUEST, **changes: Any) -> bytes:
    """SGLang's answer: log-probs −0.125, −0.25, … of these tokens. `reason` defaults to the limit."""
    meta = {
        "finish_reason": {"type": reason}
        if isinstance(reason, str)
        else reason or {"type": "length", "length": len(tokens)},
        "weight_version": "12",
        "weight_versions": [{"version": "12", "start": 0, "end": len(tokens)}],
        "output_token_logprobs": [[-0.125 * (i + 1), token, None] for i, token in enumerate(tokens)],
    }
    return orjson.dumps({"text": "…", "output_ids": tokens, "meta_info": meta | changes})


def test_an_answer_becomes_a_sample() -> None:
    sample = generate.read(answer([20, 21, 22, 9], {"type": "stop", "matched": 9}), REQUEST)
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
    sample = generate.read(answer([20, 21, 4, 9, 22, 23], weight_versions=spans), REQUEST)
    assert sample.tokens.tolist() == [20, 21, 4] and sample.finish_reason == "stop"
    assert sample.length == len(sample.behavior_logprobs) == len(sample.loss_mask) == 3
    assert sample.versions == ((11, 0, 2), (12, 2, 3))


def test_the_limit_ends_a_response_unless_its_last_token_is_a_stop_token() -> None:
    assert generate.read(answer([20, 21, 22, 23, 24, 25]), REQUEST).finish_reason == "length"
    assert generate.read(answer([20, 21, 22, 23, 24, 9]), REQUEST).finish_reason == "stop"


def test_a_server_that_knows_only_the_last_weight_version_is_believed() -> None:
    assert generate.read(answer([20, 9], "stop", weight_versions=None), REQUEST).versions == ((12, 0, 2),)


def test_weights_that_no_sync_has_named_are_of_an_unknown_version() -> None:
    spans = [{"version": "default", "start": 0, "end": 2}]
    assert generate.read(answer([20, 9], "stop", weight_versions=spans), REQUEST).versions == (
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
        (answer([-1, 9], "stop"), "log-probs of other tokens"),
        (answer([20, 9], "stop", output_token_logprobs=[[-1.0, 20, None], [None, 9, None]]), "not finite"),
        (
            answer([20, 9], "stop", output_token_logprobs=[["x", 20, None], [-1.0, 9, None]]),
            "no answer of SGLang: ValueError",
        ),
        (answer([20, 9], "stop", output_token_logprobs=None), "no answer of SGLang: TypeError"),
        (answer([20, 2**40], "stop"), "no answer of SGLang: OverflowError"),
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
        generate.read(bad, REQUEST)


def test_an_end_at_a_token_that_is_no_stop_id_of_ours_ends_the_run() -> None:
    with pytest.raises(
        EngineError,
        match=r"response 3\.1 ended at token id 33, .* stop ids \(9, 4\): name it as eos_token_id",
    ):
        generate.read(answer([20, 33], {"type": "stop", "matched": 33}), REQUEST)


def test_a_response_that_the_server_has_no_room_for_ends_the_run() -> None:
    with pytest.raises(
        EngineError, match=r"response 3\.1 was cut off after 2 of 6 tokens: the server has no room"
    ):
        generate.read(answer([20, 21]), REQUEST)


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_is_as_it_was_after_an_answer_good_or_bad(was_enabled: bool) -> None:
    if not was_enabled:
        gc.disable()
    try:
        generate.read(answer([20, 9], "stop"), REQUEST)
        assert gc.isenabled() == was_enabled
        with pytest.raises(BadAnswer):
            generate.read(b"{", REQUEST)
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
