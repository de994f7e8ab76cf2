"""The engine without a server: Hugging Face `generate`, in the main rank's process. For one machine and small
models.

B = samples generated together, V = vocabulary.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from dapo.clock import heartbeat
from dapo.types import Request, Sample, Sampling


class EmbeddedEngine:
    """The model in this process. A stream's samples are generated when its `completed` is read."""

    def __init__(self, model: Path, dtype: torch.dtype, device: torch.device, max_concurrent: int):
        config = transformers.AutoConfig.from_pretrained(model)
        self.model = (
            transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
            .to(device)
            .eval()
        )
        # nothing is inherited: no repetition penalty, no top_k of the model's authors
        self.model.generation_config = GenerationConfig()
        self.device, self.max_concurrent = device, max_concurrent
        self.version = -1
        self.streams: weakref.WeakSet[EmbeddedStream] = weakref.WeakSet()
        self.lock = threading.Lock()  # the model serves one stream at a time

    def stream(self) -> EmbeddedStream:
        made = EmbeddedStream(self)
        self.streams.add(made)
        return made

    def prepare_weights(self, version: int) -> None: ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy the weights in; every parameter must be among them."""
        params = dict(as_stored(self.model.named_parameters()))
        with self.lock, torch.no_grad():
            for name, tensor in weights:
                params.pop(name).copy_(tensor)
        assert not params, f"weights not sent: {sorted(params)}"
        self.version = version

    def waiting(self) -> str:
        return f"{sum(len(stream.queue) for stream in self.streams)} responses queued in this process"

    def release_memory(self) -> None: ...

    def close(self) -> None: ...

    @torch.no_grad()
    def generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        longest = max(len(request.prompt.tokens) for request in requests)
        prompts = np.zeros((len(requests), longest), np.int64)  # padded on the left
        is_real = np.zeros_like(prompts)
        for row, request in enumerate(requests):
            prompts[row, longest - len(request.prompt.tokens) :] = request.prompt.tokens
            is_real[row, longest - len(request.prompt.tokens) :] = 1
        sampler = SeededSampling([request.seed for request in requests], sampling, longest)
        out = self.model.generate(
            torch.from_numpy(prompts).to(self.device),
            attention_mask=torch.from_numpy(is_real).to(self.device),
            logits_processor=LogitsProcessorList([sampler]),
            generation_config=GenerationConfig(
                do_sample=False,  # the processor has already drawn: greedy takes what it drew
                max_new_tokens=sampling.max_tokens,
                eos_token_id=list(sampling.stop_ids),
                pad_token_id=sampling.stop_ids[0],
            ),
        )
        tokens = out[:, longest:].to(torch.int32).cpu().numpy()
        logprobs = torch.stack(sampler.logprobs, dim=1).cpu().numpy()  # [B, n]
        return [self._sample(*row, sampling) for row in zip(requests, tokens, logprobs, strict=True)]

    def _sample(
        self, request: Request, tokens: np.ndarray, logprobs: np.ndarray, sampling: Sampling
    ) -> Sample:
        """Cut at the first stop token, inclusive; never by looking for padding, which may be a stop token
        itself.
        """
        stops = np.flatnonzero(np.isin(tokens, sampling.stop_ids))
        length = int(stops[0]) + 1 if len(stops) else len(tokens)
        return Sample(
            group=request.group,
            index=request.index,
            tokens=tokens[:length].copy(),
            behavior_logprobs=logprobs[:length].astype(np.float32),
            loss_mask=np.ones(length, bool),
            versions=((self.version, 0, length),),
            finish_reason="stop" if len(stops) else "length",
        )


class EmbeddedStream:
    """Generates what was submitted, at most `max_concurrent` samples at a time, when `completed` is read."""

    def __init__(self, engine: EmbeddedEngine):
        self.engine = engine
        self.queue: list[Request] = []
        self.finished: deque[Sample] = deque()  # generated, and not read yet

    def submit(self, requests: Iterable[Request]) -> None:
        self.queue.extend(requests)

    def completed(self) -> Iterator[Sample]:
        """Yield samples in the order of their requests."""
        while self.queue or self.finished:
            if not self.finished:
                self._generate_next()
            yield self.finished.popleft()

    def abort(self, ids: Iterable[str] | None = None) -> None:
        gone = None if ids is None else set(ids)
        self.queue = [request for request in self.queue if gone is not None and request.id not in gone]
        kept = (s for s in self.finished if gone is not None and f"{s.group}.{s.index}" not in gone)
        self.finished = deque(kept)

    def _generate_next(self) -> None:
        """Generate the first requests of the queue that have the same sampling settings."""
        sampling = self.queue[0].sampling
        alike = itertools.takewhile(lambda request: request.sampling == sampling, self.queue)
        batch = list(itertools.islice(alike, self.engine.max_concurrent))
        self.queue = self.queue[len(batch) :]
        with self.engine.lock:
            self.finished.extend(self.engine.generate(batch, sampling))


def as_stored(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A transformers model's (name, tensor) as its files have them: a layer's experts, fused in memory, one
    by one. They are views.
    """
    for name, tensor in tensors:
        layer, _, fused = name.partition(".experts.")
        if fused == "gate_up_proj":  # [experts, 2 · F, H]
            for i, expert in enumerate(tensor):
                yield from zip(
                    (f"{layer}.experts.{i}.{part}_proj.weight" for part in ("gate", "up")),
                    expert.chunk(2),
                    strict=True,
                )
        elif fused == "down_proj":  # [experts, H, F]
            yield from ((f"{layer}.experts.{i}.down_proj.weight", expert) for i, expert in enumerate(tensor))
        else:
            yield name, tensor


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's next token from the row's own seed, so that a sample does not depend on what it was
    batched with.

    Keeps log softmax(logits / T) of what it drew, before top_p; leaves only the drawn token to choose.
    """

    def __init__(self, seeds: list[int], sampling: Sampling, prompt_length: int):
        draws = [
            np.random.Generator(np.random.Philox(key=seed)).random(sampling.max_tokens) for seed in seeds
        ]
        self.uniforms = torch.from_numpy(np.stack(draws))  # float64 [B, max_tokens]
        self.sampling, self.prompt_length = sampling, prompt_length
        self.top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        heartbeat()
        scaled = scores.float() / self.sampling.temperature  # [B, V]
        logprobs = scaled.log_softmax(-1)
        drawn_from = self.top_p(input_ids, scaled).log_softmax(-1) if self.top_p else logprobs
        cumulative = drawn_from.double().exp().cumsum(-1)
        position = input_ids.shape[1] - self.prompt_length
        uniform = self.uniforms[:, position].to(scores.device)
        # [B, 1], never of probability 0
        token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
        token = token.clamp(max=scores.shape[-1] - 1)  # where u · total rounded up to the total
        self.logprobs.append(logprobs.gather(-1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)
