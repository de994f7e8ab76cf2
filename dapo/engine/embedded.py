"""The engine without a server: a Hugging Face model in the main rank's process, for small models."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from dapo.config import ConfigError
from dapo.engine.decoding import decode
from dapo.engine.idle import Idle
from dapo.engine.route_watch import RouteWatch
from dapo.model.routing import Routing
from dapo.model.shape import of_text, read_config
from dapo.types import Group, Request, Sample, Sampling


class EmbeddedEngine:
    """The model in this process. A stream's samples are generated when its `completed` is read."""

    is_colocated = False  # its weights stay, and its cache is there only while it generates

    def __init__(
        self,
        model: Path,
        dtype: torch.dtype,
        device: torch.device,
        max_concurrent: int,
        routing: Routing | None = None,
    ):
        """`routing`: of the model, whose samples come with their routes."""
        self.directory = model
        self.routing = routing
        try:
            config = transformers.AutoConfig.from_pretrained(model)
            if "text_config" in (raw := read_config(model)):
                config = config.get_text_config()
                config.tie_word_embeddings = bool(of_text(raw).get("tie_word_embeddings"))
            built = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
        except (OSError, ValueError, KeyError) as error:
            wrong = f"policy.model={model}: engine.kind=embedded cannot build it"
            raise ConfigError(f"{wrong}: {' '.join(str(error).split())}") from error
        self.model = built.to(device).eval()
        self.device = device
        self.max_concurrent = max_concurrent
        self.version = -1  # of the weights; none are loaded
        self.streams: weakref.WeakSet[EmbeddedStream] = weakref.WeakSet()
        self.lock = threading.Lock()  # the model serves one stream at a time
        self.idle = Idle()

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
        with self.lock, torch.no_grad():
            params = dict(as_stored(learnt_and_kept(self.model)))
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

    @torch.inference_mode()
    def score(self, groups: Sequence[Group]) -> list[np.ndarray]:
        found = []
        with self.lock:
            for prompt, sample in ((group.prompt, sample) for group in groups for sample in group.samples):
                whole = np.concatenate([prompt.tokens, sample.tokens[:-1]])
                fed = torch.from_numpy(whole).long()[None].to(self.device)
                logits = self.model(fed, logits_to_keep=sample.length).logits[0].float()
                tokens = torch.from_numpy(sample.tokens).long().to(self.device)
                found.append(logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].cpu().numpy())
        return found

    def waiting(self) -> str:
        queued = sum(len(stream.queue) for stream in list(self.streams))
        return f"{queued} responses queued in this process"

    def take_idle(self) -> list[float]:
        """Return the seconds since the last call in which nothing was generated."""
        return [self.idle.take()]

    def release_memory(self) -> None: ...

    def close(self) -> None: ...

    def generate(
        self, requests: list[Request], sampling: Sampling, is_wanted: Callable[[], bool] = lambda: True
    ) -> list[Sample]:
        """Generate one sample per request, all together. The caller holds the lock.

        `sampling.max_tokens` is the largest of the requests'; each is cut at its own.

        Ends at the next token, with samples that are cut off, when `is_wanted()` is no longer true.
        """
        prompts, seeds = [r.prompt.tokens for r in requests], [r.seed for r in requests]
        self.idle.note(False)
        watch = RouteWatch(self.model, self.routing) if self.routing and sampling.returns_routes else None
        with watch or nullcontext():
            tokens, logprobs = decode(self.model, prompts, seeds, sampling, is_wanted, watch)
        self.idle.note(True)
        is_stop = np.isin(tokens, sampling.stop_ids)  # once: a call for each row takes longer than its sample
        rows = zip(requests, tokens, logprobs, is_stop, strict=True)
        samples = [self._sample(*row) for row in rows]
        for row, sample in enumerate(samples if watch else ()):
            assert watch
            sample.routes = watch.of(row, len(prompts[row]), sample.length)
        return samples

    def _sample(
        self, request: Request, tokens: np.ndarray, logprobs: np.ndarray, is_stop: np.ndarray
    ) -> Sample:
        """Cut at the first stop token, inclusive, or at the request's limit."""
        tokens, is_stop = tokens[: request.sampling.max_tokens], is_stop[: request.sampling.max_tokens]
        has_stop = bool(is_stop.any())
        length = int(is_stop.argmax()) + 1 if has_stop else len(tokens)
        return Sample(
            group=request.group,
            index=request.index,
            tokens=tokens[:length].copy(),
            behavior_logprobs=logprobs[:length].copy(),
            loss_mask=np.ones(length, bool),
            versions=((self.version, 0, length),),
            finish_reason="stop" if has_stop else "length",
        )


class EmbeddedStream:
    """Generates what was submitted, at most `max_concurrent` samples at a time, when `completed` is read.

    Other threads may submit, and abort everything.
    """

    def __init__(self, engine: EmbeddedEngine):
        self.engine = engine
        self.queue: list[Request] = []
        self.finished: deque[Sample] = deque()  # generated, and not read yet
        self.num_aborts = 0  # of everything
        self.lock = threading.Lock()  # of these

    def submit(self, requests: Iterable[Request]) -> None:
        requests = list(requests)
        with self.lock:
            self.queue[:0] = [request for request in requests if request.priority]
            self.queue.extend(request for request in requests if not request.priority)

    def completed(self) -> Iterator[Sample]:
        """Yield samples in the order of their requests."""
        while self.queue or self.finished:
            if not self.finished:
                self._generate_next()
            with self.lock:
                sample = self.finished.popleft() if self.finished else None
            if sample:  # else it was aborted meanwhile
                yield sample

    def abort(self, ids: Iterable[str] | None = None) -> None:
        with self.lock:
            if ids is None:
                self.num_aborts += 1
                self.queue, self.finished = [], deque()
                return
            dropped = set(ids)
            self.queue = [request for request in self.queue if request.id not in dropped]
            self.finished = deque(s for s in self.finished if f"{s.group}.{s.index}" not in dropped)

    def _generate_next(self) -> None:
        """Generate the first requests of the queue that have the same sampling settings except max_tokens."""
        with self.lock:
            if not self.queue:
                return
            first, before = self.queue[0].sampling, self.num_aborts
            alike = itertools.takewhile(lambda request: _are_alike(request.sampling, first), self.queue)
            batch = list(itertools.islice(alike, self.engine.max_concurrent))
            sampling = replace(first, max_tokens=max(request.sampling.max_tokens for request in batch))
            self.queue = self.queue[len(batch) :]
        with self.engine.lock:
            samples = self.engine.generate(batch, sampling, lambda: self.num_aborts == before)
        with self.lock:
            if self.num_aborts == before:
                self.finished.extend(samples)


def _are_alike(one: Sampling, other: Sampling) -> bool:
    return replace(one, max_tokens=0) == replace(other, max_tokens=0)


def learnt_and_kept(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's parameters, a tied one once, and those of its buffers that are in its files."""
    yield from model.named_parameters()
    kept = model.state_dict().keys()
    yield from (named for named in model.named_buffers() if named[0] in kept)


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
