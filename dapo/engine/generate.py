"""SGLang's generation call: a Request becomes its body, its answer a Sample. Pure: tested without a server.

n = response tokens.
"""

from __future__ import annotations

import binascii
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np
import orjson

from dapo.engine.versions import weight_spans
from dapo.model.routing import Routing
from dapo.types import EngineError, FinishReason, Request, Sample

UNKNOWN_VERSION = -1  # of weights from before the first sync, which SGLang calls "default"
BYTES_PER_TOKEN = 1024  # of an answer, at most: its id twice, its log-prob, its text; honest ones need 60
OTHER_BYTES = 2**20  # of an answer
# natural logarithms: rounding makes a probability a little larger than 1, and none that is drawn is smaller
LEAST, LARGEST = -1e4, 0.01


class BadAnswer(Exception):
    """The answer is no response to the request. It may be sent again, preferably to another server."""


class NoWorker(BadAnswer):
    """A router has no worker, for this request or another. It has not begun with it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The part of a request, sent as `rid`, that its answer is checked against."""

    rid: str
    group: int
    index: int
    num_prompt_tokens: int
    max_tokens: int
    stop_ids: tuple[int, ...]
    returns_routes: bool

    @property
    def id(self) -> str:
        """The request's own id."""
        return f"{self.group}.{self.index}"

    def max_bytes(self, routing: Routing | None) -> int:
        """Return the most bytes that an answer may have. `routing`: of the policy, if it has experts."""
        most = OTHER_BYTES + BYTES_PER_TOKEN * self.max_tokens
        if routing and self.returns_routes:
            most += (self.num_prompt_tokens + self.max_tokens) * route_bytes(routing)
        return most


def asked(request: Request, rid: str) -> Asked:
    prompt, sampling = request.prompt, request.sampling
    size = len(prompt.tokens), sampling.max_tokens
    return Asked(rid, request.group, request.index, *size, sampling.stop_ids, sampling.returns_routes)


def route_bytes(routing: Routing) -> int:
    """Return the bytes of a token's routes on the wire: int32 for every layer, as base64."""
    return -(-4 * routing.shape.num_layers * routing.per_token * 4 // 3) + 1


def body(request: Request, rid: str) -> bytes:
    """Return the body of POST /generate. It sets all sampling parameters: no server's default applies.

    `ignore_eos` stays off, because it would also switch off `stop_token_ids`. Only servers that run with
    --enable-deterministic-inference use the seed.
    """
    sampling = request.sampling
    return orjson.dumps(
        {
            "rid": rid,
            "input_ids": request.prompt.tokens,
            "sampling_params": {
                "max_new_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": -1,
                "min_p": 0.0,
                "frequency_penalty": 0.0,
                "presence_penalty": 0.0,
                "repetition_penalty": 1.0,
                "min_new_tokens": 0,
                "n": 1,
                "stop_token_ids": sampling.stop_ids,
                "ignore_eos": False,
                "no_stop_trim": True,
                "skip_special_tokens": False,
                "sampling_seed": request.seed,
            },
            "return_logprob": True,
            "logprob_start_len": -1,  # of the response alone
            "stream": False,
            **({"return_routed_experts": True} if sampling.returns_routes else {}),
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def read(answer: bytes, asked: Asked, vocab_size: int, routing: Routing | None = None) -> Sample:
    """Return the sample in the body of an answer with status 200. `routing`: of the policy, for its routes.

    Raise BadAnswer if it is not one response to what was asked, or aborted, or tokens and log-probs do not
    match or cannot be; EngineError if the server returns no routes, or always ends such a response too early:
    another EOS, or too little room.
    """
    try:
        with _collector_paused():
            parsed = orjson.loads(answer)
            if not isinstance(parsed, dict):
                is_list = isinstance(parsed, list)
                raise BadAnswer(f"{len(parsed)} samples, expected one" if is_list else "JSON, but no object")
            meta = parsed["meta_info"]
            reason = meta["finish_reason"]["type"]
            if reason == "abort":
                why = meta["finish_reason"].get("message", "no reason given")
                raise BadAnswer(f"aborted by the server: {why}")
            # [(log-prob, id, None)], of log_softmax(logits / temperature), before top_p
            entries = meta.pop("output_token_logprobs")
            logprobs = np.array(_of_types([entry[0] for entry in entries], float, int, NoneType), np.float64)
            ids = _of_types([entry[1] for entry in entries], int)
            del entries
        output_ids = _of_types(parsed["output_ids"], int)
        tokens = np.array(output_ids, np.int64)
        versions = _versions(meta, len(ids))
        matched = meta["finish_reason"].get("matched")
        answered, num_prompt_tokens = meta["id"], meta["prompt_tokens"]
        encoded = meta.pop("routed_experts", None)
        num_cached = meta.get("cached_tokens")
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError) as error:
        raise BadAnswer(f"no answer of SGLang: {type(error).__name__}: {error}") from None
    if answered != asked.rid:
        raise BadAnswer(f"the answer to another request, {str(answered)[:80]!r}")
    if num_prompt_tokens != asked.num_prompt_tokens:
        expected = f"not of the {asked.num_prompt_tokens} that were sent"
        raise BadAnswer(f"the answer to a prompt of {str(num_prompt_tokens)[:20]} tokens, {expected}")
    if not 0 < len(output_ids) <= asked.max_tokens:
        raise BadAnswer(f"{len(output_ids)} tokens, expected 1 to {asked.max_tokens}")
    if len(ids) != len(output_ids):
        raise BadAnswer(f"{len(ids)} log-probs for {len(output_ids)} tokens")
    if ids != output_ids:
        raise BadAnswer("log-probs of other tokens than output_ids")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise BadAnswer(f"token id {wrong}, where the policy's vocabulary has {vocab_size}: another model?")
    # requests have no stop strings: a server whose logits are NaN reports it here, and appends EOS
    if isinstance(matched, str):
        raise BadAnswer(f"stopped by {matched!r}")
    if not np.isfinite(logprobs).all():
        remedy = "if all servers send such, the policy is damaged: resume from an earlier step"
        raise BadAnswer(f"log-probs that are not finite: {remedy}")
    if logprobs.min() < LEAST or logprobs.max() > LARGEST:
        wrong = logprobs[(logprobs < LEAST) | (logprobs > LARGEST)][0]
        raise BadAnswer(f"a log-prob of {wrong:g}, which no drawn token has")
    length, finish_reason = _end(tokens, reason, asked)
    routes = None
    if routing and asked.returns_routes:
        routes = _routes(encoded, asked.num_prompt_tokens + len(tokens) - 1, routing)
        routes = routes[: asked.num_prompt_tokens + length - 1]
    return Sample(
        group=asked.group,
        index=asked.index,
        tokens=tokens[:length].astype(np.int32),
        behavior_logprobs=logprobs[:length].astype(np.float32),
        loss_mask=np.ones(length, bool),
        versions=tuple((v, start, min(end, length)) for v, start, end in versions if start < length),
        finish_reason=finish_reason,
        routes=routes,
        num_cached=num_cached if isinstance(num_cached, int) else 0,
    )


def _routes(encoded: Any, num_rows: int, routing: Routing) -> np.ndarray:
    """Return the routes of an answer: the base64 of them, of every token that was fed."""
    if encoded is None:
        remedy = "start it with --enable-return-routed-experts, or set policy.routing_replay=off"
        raise EngineError(f"a server returns no routes: {remedy}")
    try:
        return routing.read(binascii.a2b_base64(encoded, strict_mode=True), num_rows)
    except (ValueError, TypeError) as error:
        raise BadAnswer(str(error)) from None


def _of_types(values: Any, *types: type) -> list[Any]:
    """Return `values`. Raise TypeError unless it is a list of these types: NumPy would make 1 of true."""
    if not isinstance(values, list):
        raise TypeError(f"a list is expected, not {type(values).__name__}")
    if wrong := {*map(type, values)} - {*types}:
        raise TypeError(f"{wrong.pop().__name__} among {' and '.join(t.__name__ for t in types)}")
    return values


def _end(tokens: np.ndarray, reason: Any, asked: Asked) -> tuple[int, FinishReason]:
    """Return length and finish reason: a response ends at the first of our stop ids, inclusive."""
    if reason not in ("stop", "length"):
        raise BadAnswer(f"an unknown finish reason {reason!r}")
    stops = np.flatnonzero(np.any([tokens == stop for stop in asked.stop_ids], axis=0))
    if len(stops):
        return int(stops[0]) + 1, "stop"
    if len(tokens) == asked.max_tokens:
        return len(tokens), "length"
    if reason == "length":
        cut = f"response {asked.id} was cut off after {len(tokens)} of {asked.max_tokens} tokens"
        remedy = "raise its context-length or max-total-tokens, or lower rollout.max_response_length"
        raise EngineError(f"{cut}: the server has no room for more; {remedy}")
    ended = f"response {asked.id} ended at token id {tokens[-1]}, which is not among the policy's stop ids"
    remedy = "name it as eos_token_id in the model's generation_config.json"
    raise EngineError(f"{ended} {asked.stop_ids}: {remedy}")


def _versions(meta: dict[str, Any], length: int) -> tuple[tuple[int, int, int], ...]:
    """Return (weight version, start, end) of consecutive token ranges without gaps."""
    spans = weight_spans(meta, length)
    versions = tuple((version_of(span["version"]), span["start"], span["end"]) for span in spans)
    _of_types([end for _, *ends in versions for end in ends], int)
    if [start for _, start, _ in versions] + [length] != [0] + [end for _, _, end in versions]:
        raise ValueError(f"weight versions {spans} of {length} tokens")
    return versions


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause garbage collection: parsing makes a list per token, so n / 700 collections that free nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def version_of(name: str) -> int:
    """Return a weight version as a number: "12" → 12, "default" → UNKNOWN_VERSION."""
    return int(name) if name.isdecimal() else UNKNOWN_VERSION
