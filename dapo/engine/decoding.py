"""Draws responses from a Hugging Face causal LM: one forward pass a token, for all rows that go on.

B = rows that go on, P = distinct prompts, L = tokens of the longest prompt, V = vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dapo.clock import heartbeat
from dapo.engine import one_token
from dapo.engine.route_watch import RouteWatch
from dapo.types import Sampling

CUT = (DynamicLayer, DynamicSlidingWindowLayer)  # rows of these layers of a cache can be taken
LEAST_OPEN = 0.75  # of a batch's rows: below it those that have ended are taken out, which copies the cache


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    sampling: Sampling,
    is_wanted: Callable[[], bool] = lambda: True,
    watch: RouteWatch | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a response to each prompt, int32 [p]. A row's draws depend on its seed alone. Stop at the next
    token when `is_wanted()` is no longer true. `watch` gets the routes.

    Returns:
        Tokens, int32 [rows, max_tokens], and their log-probs, float32. What follows a stop token is noise.
    """
    limit, device = sampling.max_tokens, model.device
    cache = DynamicCache(config=model.config)
    named = {_cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}

    def logits_of(tokens: Tensor, is_real: Tensor, positions: Tensor) -> Tensor:
        """Feed tokens; return the last one's logits, [·, V]. `is_real`: of all tokens so far."""
        out = model(tokens, attention_mask=is_real, position_ids=positions, **named)
        return cast(Tensor, out.logits[:, -1])

    # every prompt once; then a row of its cache for each of its responses, where all its layers can be cut so
    is_cut = all(type(layer) in CUT for layer in cache.layers)
    distinct, owners = _distinct(prompts) if is_cut else (list(prompts), list(range(len(prompts))))
    fed, is_real = (array.to(device) for array in _padded(distinct))
    positions = (is_real.long().cumsum(-1) - 1).clamp(min=0)  # [P, L]
    logits = logits_of(fed, is_real, positions)
    owner = torch.tensor(owners, device=device)
    if watch:
        watch.begin(is_real, owner, limit)
    if is_cut:
        cache.batch_select_indices(owner)
    logits, position = logits[owner], positions[owner, -1:]  # [B, V], [B, 1]
    # a mask with all its dimensions is taken as it is, which saves its making; but it would serve all layers
    is_full = all(type(layer) is DynamicLayer for layer in cache.layers)
    feed = partial(one_token.logits, model, cache) if is_full and one_token.is_known(model) else logits_of
    is_seen = torch.cat([is_real[owner], is_real.new_ones(len(owners), limit)], dim=1)  # [B, L + max_tokens]

    draws = [np.random.Generator(np.random.Philox(key=seed)).random(limit) for seed in seeds]
    uniforms = torch.from_numpy(np.stack(draws)).to(device)  # float64 [rows, max_tokens]
    stop_ids = torch.tensor(sampling.stop_ids, device=device)
    tokens = torch.zeros(len(owners), limit, dtype=torch.int32, device=device)
    logprobs = torch.zeros(len(owners), limit, device=device)
    rows = torch.arange(len(owners), device=device)  # [B]: whose response it is
    is_open = torch.ones_like(rows, dtype=torch.bool)  # [B]
    for step in range(limit):
        heartbeat()
        token, logprob = draw(logits, uniforms[rows, step], sampling)
        tokens[rows, step], logprobs[rows, step] = token.int(), logprob
        is_open &= (token[:, None] != stop_ids).all(-1)
        num_open = int(is_open.sum())
        if not num_open or step + 1 == limit or not is_wanted():
            break
        if is_cut and num_open < LEAST_OPEN * len(rows):
            kept = is_open.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            of_rows = (x[kept] for x in (rows, token, is_seen, position, is_open))
            rows, token, is_seen, position, is_open = of_rows
        position = position + 1
        seen = is_seen[:, : fed.shape[1] + step + 1]
        logits = feed(token[:, None], seen[:, None, None] if is_full else seen, position)
        if watch:
            watch.step(step, rows)
    return tokens.cpu().numpy(), logprobs.cpu().numpy()


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw each row's token, [B], by inversion at its uniform number, float64 [B]; return log softmax(logits
    / T) of it too, as it is before top_p.
    """
    device = logits.device
    if torch.are_deterministic_algorithms_enabled():  # there are no such cumulative sums on a GPU
        logits, uniform = logits.cpu(), uniform.cpu()
    scaled = logits.float() / sampling.temperature  # [B, V]
    logprobs = scaled.log_softmax(-1)
    top_p = sampling.top_p
    drawn_from = TopPLogitsWarper(top_p)(None, scaled).log_softmax(-1) if top_p < 1 else logprobs
    cumulative = drawn_from.double().exp().cumsum(-1)
    # never a token of probability 0
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    token = token.clamp(max=logits.shape[-1] - 1)  # where u · total rounded up to the total
    return token[:, 0].to(device), logprobs.gather(-1, token)[:, 0].to(device)


def _distinct(prompts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[int]]:
    """Return each prompt once, and the place among them of every row's."""
    places: dict[bytes, int] = {}
    owners = [places.setdefault(prompt.tobytes(), len(places)) for prompt in prompts]
    return [prompts[owners.index(i)] for i in range(len(places))], owners


def _padded(prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return the tokens, padded on the left, int64 [P, L], and where they are real, bool [P, L]."""
    longest = max(map(len, prompts))
    tokens, is_real = np.zeros((len(prompts), longest), np.int64), np.zeros((len(prompts), longest), bool)
    for row, prompt in enumerate(prompts):
        here = slice(longest - len(prompt), None)
        tokens[row, here], is_real[row, here] = prompt, True
    return torch.from_numpy(tokens), torch.from_numpy(is_real)


def _cache_argument(model: Any) -> str:
    """Return the name of forward's cache, which changed within transformers 5."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
