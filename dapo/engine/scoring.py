"""Lets a server compute the log-probs of responses that are there already."""

from __future__ import annotations

import numpy as np

from dapo.engine.control import Server
from dapo.types import EngineError, Prompt, Sample

TIMEOUT = 600.0  # seconds for one response


def score(server: Server, prompt: Prompt, sample: Sample) -> np.ndarray:
    """Return log softmax of the logits of the response's tokens, float32 [n]: nothing is generated.

    Raises:
        EngineError: the server does not answer with the log-probs of these tokens.
    """
    whole = [*prompt.tokens.tolist(), *sample.tokens.tolist()]
    first = len(prompt.tokens) - 1  # the first entry has no log-prob: so one token earlier
    asked = {
        "input_ids": whole,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": first,
    }
    answer = server.post("/generate", asked, timeout=TIMEOUT, fields={"meta_info": dict})
    entries = answer["meta_info"].get("input_token_logprobs")
    try:
        assert isinstance(entries, list)
        _, *found = entries
        logprobs, ids = np.array([e[0] for e in found], np.float32), np.array([e[1] for e in found])
    except (AssertionError, ValueError, TypeError, IndexError) as error:
        raise EngineError(f"{server.url} returns no log-probs of what it is sent: {error}") from None
    if len(ids) != sample.length or not np.isfinite(logprobs).all():
        raise EngineError(
            f"{server.url} returns {len(ids)} log-probs of {sample.length} tokens, or not finite"
        )
    # SGLang scores token 0 instead of the vocabulary's last token: that one keeps what was reported
    others = ids != sample.tokens
    if ids[others].any() or len(set(sample.tokens[others].tolist())) > 1:
        raise EngineError(f"{server.url} returns the log-probs of other tokens than it was sent")
    return np.where(others, sample.behavior_logprobs, logprobs)
