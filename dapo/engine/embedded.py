"""The engine without a server: Hugging Face `generate` in the main rank's process, for small models.

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
from dapo.config import ConfigError
from dapo.types import Request, Sample, Sampling


class EmbeddedEngine:
    """The model in this process. A stream's samples are generated when its `completed` is read."""

    is_colocated = False  # its weights stay, and its cache is there only while it generates

    def __init__(self, model: Path, dtype: torch.dtype, device: torch.device, max_concurrent: int):
        self.directory = model
        try:
            config = transformers.AutoConfig.from_pretrained(model)
            built = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
        except (OSError, ValueError, KeyError) as error:
            wrong = f"policy.model={model}: engine.kind=embedded cannot build it"
            raise ConfigError(f"{wrong}: {' '.join(str(error).split())}") from error
        self.model = built.to(device).eval()
        self.model.generation_config = GenerationConfig()  # without the authors' repetition penalty, top_k, …
        self.device = device
        self.max_concurrent = max_concurrent
        self.version = -1  # of the weights; none are loaded
        self.streams: weakref.WeakSet[EmbeddedStream] = weakref.WeakSet()
        self.lock = threading.Lock()  # the model serves one stream at a time

    def stream(self) -> EmbeddedStream:
        made = EmbeddedStream(self)
        self.streams.add(made)
        return made

    def prepare_weights(self, version: int) -> None: ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy the weights in.

        Raises:
            ConfigError: a parameter is missing, of another shape, or has no place in the model.
        """
        params = dict(as_stored(self.model.named_parameters()))
        with self.lock, torch.no_grad():
            for name, tensor in weights:
                if name not in params:
                    raise ConfigError(f"{self.directory}: tensor {name} has no place in this architecture")
                if (wanted := params[name].shape) != tensor.shape:
                    both = f"has shape {tuple(tensor.shape)}, config.json means {tuple(wanted)}"
                    raise ConfigError(f"{self.directory}: tensor {name} {both}")
                params.pop(name).copy_(tensor)
        if params:
            raise ConfigError(f"{self.directory}: {len(params)} tensors are missing, first {min(params)}")
        self.version = version

    def waiting(self) -> str:
        queued = sum(len(stream.queue) for stream in list(self.streams))
        return f"{queued} responses queued in this process"

    def release_memory(self) -> None: ...

    def close(self) -> None: ...

    @torch.no_grad()
    def generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        """Generate one sample per request, all together. The caller holds the lock."""
        longest = max(len(request.prompt.tokens) for request in requests)
        prompts = np.zeros((len(requests), longest), np.int64)  # padded on the left
        is_real = np.zeros_like(prompts)
        for row, request in enumerate(requests):
            start = longest - len(request.prompt.tokens)
            prompts[row, start:] = request.prompt.tokens
            is_real[row, start:] = 1
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
        return [self._sample(*row) for row in zip(requests, tokens, logprobs, strict=True)]

    def _sample(self, request: Request, tokens: np.ndarray, logprobs: np.ndarray) -> Sample:
        """Cut at the first stop token, inclusive, and not at padding, which may be a stop token itself."""
        stops = np.flatnonzero(np.isin(tokens, request.sampling.stop_ids))
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
        if ids is None:
            self.queue, self.finished = [], deque()
            return
        dropped = set(ids)
        self.queue = [request for request in self.queue if request.id not in dropped]
        self.finished = deque(s for s in self.finished if f"{s.group}.{s.index}" not in dropped)

    def _generate_next(self) -> None:
        """Generate the first requests of the queue that have the same sampling settings."""
        sampling = self.queue[0].sampling
        alike = itertools.takewhile(lambda request: request.sampling == sampling, self.queue)
        batch = list(itertools.islice(alike, self.engine.max_concurrent))
        self.queue = self.queue[len(batch) :]
        with self.engine.lock:
            self.finished.extend(self.engine.generate(batch, sampling))


def as_stored(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield a transformers model's tensors, as views, under the names in its files: with experts apart."""
    for name, tensor in tensors:
        layer, _, fused = name.partition(".experts.")
        if fused == "gate_up_proj":  # [experts, 2 · F, H]
            for i, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                yield f"{layer}.experts.{i}.gate_proj.weight", gate
                yield f"{layer}.experts.{i}.up_proj.weight", up
        elif fused == "down_proj":  # [experts, H, F]
            for i, expert in enumerate(tensor):
                yield f"{layer}.experts.{i}.down_proj.weight", expert
        else:
            yield name, tensor


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's next token with the row's own seed, so that a sample does not depend on its batch.

    It keeps log softmax(logits / T) of the drawn token, before top_p, and leaves no other token to choose.
    """

    def __init__(self, seeds: list[int], sampling: Sampling, prompt_length: int):
        generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
        draws = [generator.random(sampling.max_tokens) for generator in generators]
        self.uniforms = torch.from_numpy(np.stack(draws))  # float64 [B, max_tokens]
        self.sampling = sampling
        self.prompt_length = prompt_length
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
        # [B, 1], never a token of probability 0
        token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
        token = token.clamp(max=scores.shape[-1] - 1)  # where u · total rounded up to the total
        self.logprobs.append(logprobs.gather(-1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)
