"""π_θ on Megatron-core: build it, score with it, update it, read its weights, save and load it.

T = packed tokens of a microbatch on a context rank (T/tp of them on a rank under sequence parallelism), H =
hidden size, V = vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from dapo_kernels import Head, Objective, Sequences, Tokens
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from dapo.clock import timed
from dapo.config import Config, ConfigError
from dapo.learn.batch import Batch, Microbatch, Scores
from dapo.learn.objective import importance, is_cut
from dapo.learn.traces import Key, Trace, record
from dapo.mesh import Mesh
from dapo.model.families import read_shape
from dapo.model.passthrough import Passthrough
from dapo.model.routing import Routing
from dapo.policy import cpu, metrics, mismatch, schedule, torch_dist, weight_files
from dapo.policy.layout import initialize_megatron
from dapo.policy.memory import UpdateMemory
from dapo.policy.metrics import Sums
from dapo.policy.model import build_model, optimizer_config, split_passthrough, transformer_config
from dapo.policy.replay import Routes, Source
from dapo.policy.saving import PolicyError as PolicyError
from dapo.policy.saving import Saved, named
from dapo.policy.weights import StoredWeights, Weights
from dapo.types import token_fields

R = TypeVar("R")
PlacedBatch = Batch[Tensor]
PlacedMicrobatch = Microbatch[Tensor]
NOT_TAKEN = "this update was not taken: go on from the last checkpoint; if it fails again, lower optim.lr"


class Policy(Saved):
    """The trained model. Every method is collective: all ranks call it together.

    `weights`: what it begins with; None: those of policy.model.

    Raises:
        ConfigError: the model directory or the layout cannot be used; the message says what to change.
    """

    def __init__(self, config: Config, mesh: Mesh, weights: StoredWeights | None = None):
        self.config, self.mesh = config, mesh
        if mesh.device.type == "cpu":
            cpu.return_freed_memory()
        self.shape = read_shape(config.policy.model)
        self.transformer = transformer_config(self.shape, config)
        optimizer = optimizer_config(config, self.transformer)
        initialize_megatron(config.parallel)
        ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_context_parallel_rank()
        assert ranks == (mesh.data_rank, mesh.context_rank), "mesh and Megatron disagree on the ranks"
        model_parallel_cuda_manual_seed(config.run.seed)
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.is_last_stage = parallel_state.is_pipeline_last_stage()
        # True on the ranks whose tokens metrics are summed over
        self.reports = self.is_last_stage and parallel_state.get_tensor_model_parallel_rank() == 0

        _, _, ddp_fields = split_passthrough(config.policy.megatron)
        self.chunks = [chunk.to(mesh.device) for chunk in build_model(self.shape, self.transformer)]
        ddp_fields = dict(use_distributed_optimizer=True, grad_reduce_in_fp32=True) | ddp_fields
        ddp = DistributedDataParallelConfig(**ddp_fields)
        modules = self.chunks
        if self.transformer.bf16:
            modules = [Float16Module(self.transformer, chunk) for chunk in self.chunks]
            for name, buffer in (item for chunk in self.chunks for item in chunk.named_buffers()):
                if name.endswith("expert_bias"):  # 16 bits would choose other experts
                    buffer.data = buffer.data.float()
        self.routes: Routes | None = None
        if config.policy.routing_replay != "off":
            megatron = Passthrough.of(config.policy.megatron)
            split = self.transformer.sequence_parallel
            self.routes = Routes(self.chunks, Routing(self.shape), split, megatron)
        self._weights = Weights(self.chunks, self.shape)
        self._kept: weight_files.Kept = {}  # tensors beside the language model
        self._weights.load(weights or self._stored_weights())
        self.models = [DistributedDataParallel(self.transformer, ddp, module) for module in modules]
        self.optimizer = get_megatron_optimizer(optimizer, self.models)
        self.memory = UpdateMemory(self.models, self.optimizer, mesh.device)
        self.scheduler = self._make_scheduler()
        self.transformer.finalize_model_grads_func = schedule.sum_grads
        self.transformer.grad_scale_func = self.optimizer.scale_loss
        if ddp.overlap_grad_reduce:
            no_sync = [model.no_sync for model in self.models]
            self.transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._saving: torch_dist.Save | None = None  # it reads parameters and optimizer state
        self._traces: dict[Key, Trace] = {}  # of the tokens that this rank reports

    def _stored_weights(self) -> StoredWeights:
        """Open those of policy.model, and say what of them is left out."""
        found = weight_files.open_weights(self.config.policy.model, self.shape)
        if isinstance(found, weight_files.HFWeights) and (left_out := found.left_out):
            self._kept = found.kept()
            if self.config.policy.other_tensors == "refuse":
                raise ConfigError(f"policy.other_tensors=refuse: {left_out}")
            if self.mesh.is_main:
                print(f"{left_out}; exports have them as they are", file=sys.stderr, flush=True)
        return found

    @timed("old_logprobs")
    def place(self, batch: Batch[np.ndarray]) -> PlacedBatch:
        """Copy this rank's microbatches onto its device."""
        *minibatches, probe = [
            [self._placed(m) for m in microbatches] for microbatches in [*batch.minibatches, batch.probe]
        ]
        return Batch(minibatches, batch.metrics, probe)

    def _placed(self, microbatch: Microbatch[np.ndarray]) -> PlacedMicrobatch:
        if self.routes and microbatch.routes is not None:
            microbatch = replace(microbatch, routes=self.routes.own(microbatch.routes))
        placed = schedule.on_device(microbatch, self.mesh.device)
        if self.config.policy.routing_replay == "old":
            assert self.routes
            placed.routes = self.routes.blank(placed)
        return placed

    @timed("old_logprobs")
    @torch.no_grad()  # Megatron's schedule would keep a graph
    def score(self, batch: PlacedBatch) -> dict[str, float]:
        """Compute log π_θold of every token, the ratio's denominator, and the token's importance weight.

        The numerics are the trainer's own, the packing is the updates' own.
        Returns mean, tail and maximum of |old − behavior| over the current weights' tokens, the alarm for a
        wrong weight sync, also by place and log-prob, and the mean over the probe's; over the tokens that
        objective.importance_of names the mean importance, and the part that is cut; and over all tokens the
        effective sample size.

        Raises:
            PolicyError: a log-prob is not finite.
        """
        learnt = [microbatch for minibatch in batch.minibatches for microbatch in minibatch]
        if not (work := learnt + batch.probe):
            return {}
        objective = self.config.objective
        rows, largest_gap = [metrics.score_sums()], 0.0
        table = mismatch.blank(self.mesh.device)
        scored, own = self._scored(work)
        for number, (microbatch, old) in enumerate(zip(work, scored, strict=False)):  # on the last stage only
            behavior, is_stale, mask = microbatch.behavior_logprobs, microbatch.is_stale, microbatch.loss_mask
            corrected = mask if objective.importance_of == "all" else mask & is_stale
            means = self._sequences(microbatch).means
            weights = importance(old, behavior, corrected, objective, means)
            is_applied = objective.importance != "none"
            microbatch.scores = Scores(old, weights if is_applied else torch.ones_like(weights))
            if not self.reports:
                continue
            is_current = mask & ~is_stale
            gap = (old - behavior)[is_current].abs()
            if number >= len(learnt):
                rows.append(metrics.score_sums(old, probe=gap))
                continue
            cut = is_cut(weights, objective)[corrected]
            rows.append(metrics.score_sums(old, gap, weights[mask], weights[corrected], cut))
            largest_gap = max(largest_gap, float(gap.max()) if len(gap) else 0.0)
            positions = mismatch.response_positions(microbatch, self.config.parallel.context)
            table += mismatch.table(gap, behavior[is_current], positions[is_current])
        sums = self.mesh.sum_by_key(metrics.total(rows) | own)
        if sums["broken"]:
            count = sums["tokens"]
            found = f"{sums['broken']:.0f} of {count:.0f} log-probs of the policy are not finite"
            broken = self._broken_parameters()
            cause = named(broken) if broken else "its parameters are finite, so its activations overflow"
            raise PolicyError(f"{found}: {cause}; resume from an earlier checkpoint with a lower optim.lr")
        routes = {name: sums.pop(name) for name in own}
        values = metrics.score_metrics(sums, self.mesh.max(largest_gap))
        values |= metrics.own_route_metrics(routes, sums["current"] + sums["probe_tokens"])
        return values | mismatch.metrics(self.mesh.sum(table.cpu().numpy()))

    def _scored(self, work: list[PlacedMicrobatch]) -> tuple[list[Tensor], Sums]:
        """Return log π_θold of each microbatch, on the last stage.

        Also returns sums for metrics.own_route_metrics; {} unless routes of the rollout are replayed.
        """
        replay = self.config.policy.routing_replay
        if replay != "rollout":
            return self.forward(work, self._score, "record" if replay == "old" else "router"), {}
        scored = self.forward(work, self._score, "replay", is_counted=True)
        assert self.routes
        others = metrics.route_sums(self.routes.routing.layers, self.routes.take_others())
        # the interleaved schedule takes as many as there are stages
        few = work[: self.config.parallel.pipeline if len(self.models) > 1 else 1]
        gaps = [
            (old - m.behavior_logprobs)[m.loss_mask & ~m.is_stale].abs()
            for m, old in zip(few, self.forward(few, self._score), strict=False)
            if self.reports
        ]
        return scored, others | metrics.own_route_sums(torch.cat(gaps) if gaps else metrics.EMPTY)

    @torch.no_grad()  # Megatron's schedule would keep a graph
    def forward(
        self,
        work: list[PlacedMicrobatch],
        finish: Callable[[PlacedMicrobatch, Tensor], tuple[Tensor, R]],
        source: Source = "router",
        is_counted: bool = False,
    ) -> list[R]:
        """Run forward passes, with routes of `source`. Return the results of `finish` on the last stage.

        `finish` takes a microbatch and its hidden states, [T, H]; it returns a number, which is not used, and
        its result.

        `is_counted`: count the tokens that the routers themselves would send elsewhere.
        """
        with self.routes.replayed(source, is_counted) if self.routes else nullcontext():
            return schedule.run(self.models, self.transformer, work, finish, True, self.routes)

    @timed("update")
    def update(self, minibatch: list[PlacedMicrobatch]) -> Sums:
        """Take one optimizer step on one minibatch (Eq. 8), which `score` has scored.

        Without a token that has a weight and an advantage the gradient is 0, and Adam would only repeat
        earlier updates: then there is no step, no decay and no tick of the learning rate. Returns sums for
        metrics.step_metrics.

        Raises:
            PolicyError: the loss or the gradient's norm is not finite; the parameters are as they were.
        """
        sums = self.backward(minibatch)
        if not sums["learnt"]:
            return sums | {"taken": 0.0, "grad_norm": 0.0, "lr": 0.0}
        self.optimizer.prepare_grads()
        if not math.isfinite(norm := self.optimizer.get_grad_norm()):  # Megatron would take the step
            raise PolicyError(f"the gradient's norm is {norm}: {NOT_TAKEN}")
        self._detach_save()
        self.scheduler.step(1)  # before the update: the first one has the first warm-up value, not lr 0
        _, grad_norm, _ = self.optimizer.step()
        return sums | {"taken": 1.0, "grad_norm": float(grad_norm), "lr": self.scheduler.get_lr({})}

    def backward(self, minibatch: list[PlacedMicrobatch]) -> Sums:
        """Compute the gradients of a minibatch's loss over all ranks; return sums over response tokens."""
        self.memory.resume()
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self.routes.replayed("replay", has_backward=True) if self.routes else nullcontext():
            rows = schedule.run(self.models, self.transformer, minibatch, self._loss, False, self.routes)
        blank = metrics.update_sums(dual_clip=self.config.objective.dual_clip)
        sums = self.mesh.sum_by_key(metrics.total([blank, *(rows if self.reports else [])]))
        if not math.isfinite(sums["loss"]):
            raise PolicyError(f"the loss is {sums['loss']}: {NOT_TAKEN}")
        return sums

    def take_traces(self) -> list[Trace]:
        """Return what updates since the last call saw of dumped samples, where this rank reports it."""
        traces, self._traces = list(self._traces.values()), {}
        return traces

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, full tensor) of the whole model on every rank. Every rank drains it.

        At its end all ranks have given back the memory that this took: servers may take it.
        """
        yield from self._weights.export()
        self._give_back()

    @timed("sync")
    def release_memory(self) -> None:
        """Give back the memory that only updates need, on all ranks: servers on the same GPUs generate.

        The next update takes it again. Until then weights can be sent and checkpoints be saved.
        """
        self._detach_save()
        self.memory.release()
        self._give_back()

    def _give_back(self) -> None:
        """Return what torch keeps for later to the device, on all ranks."""
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()
        self.mesh.barrier()

    def _make_scheduler(self) -> OptimizerParamScheduler:
        optim = self.config.optim
        warmup = optim.warmup_steps * self.config.updates_per_step  # warm-up is counted in rollout steps
        return OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=optim.lr,
            min_lr=0.0,
            lr_warmup_steps=warmup,
            lr_decay_steps=warmup + 1,
            lr_decay_style="constant",
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def _score(self, microbatch: PlacedMicrobatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return a loss that nothing differentiates, and log π_θold, [T]."""
        logprobs = self.head.logprobs(hidden, Tokens(microbatch.targets, microbatch.loss_mask))
        return logprobs.sum(), logprobs

    def _loss(self, microbatch: PlacedMicrobatch, hidden: Tensor) -> tuple[Tensor, Sums]:
        """Return the loss, a sum over this microbatch's tokens, and what its metrics are made of."""
        scores, head = microbatch.scores, self.head
        assert scores, "score comes before update"
        targets, mask = microbatch.targets, microbatch.loss_mask
        weights = microbatch.token_weights * scores.importance
        bounds = self.config.objective
        objective = Objective(bounds.clip_low, bounds.clip_high, bounds.dual_clip, bounds.kind)
        sequences = self._sequences(microbatch) if bounds.kind == "gspo" else None
        tokens = Tokens(
            targets, mask, scores.old_logprobs, microbatch.advantages, weights=weights, sequences=sequences
        )
        # the gradient of the head's weight is added where Megatron keeps it
        weight_grad = head.weight.main_grad  # type: ignore[attr-defined]
        out = head.loss(hidden, tokens, objective, weight_grad)
        if microbatch.dumped and self.reports:
            seen = {"old_logprobs": scores.old_logprobs} | vars(out)
            values = torch.stack([seen[name].float() for name in token_fields(Trace)]).cpu().numpy()
            record(self._traces, microbatch.dumped, dict(zip(token_fields(Trace), values, strict=True)))
        return out.loss, metrics.update_sums(out, tokens, bounds.dual_clip)

    def _sequences(self, microbatch: PlacedMicrobatch) -> Sequences:
        """Return which of this rank's tokens make up a sequence, and who has the others."""
        context = self.config.parallel.context
        group = parallel_state.get_context_parallel_group() if context > 1 else None
        return Sequences(microbatch.cu_seqlens // context, group)

    @property
    def head(self) -> Head:
        """The LM head, on the last pipeline stage."""
        return Head(
            weight=self.chunks[-1].head,
            temperature=self.config.rollout.temperature,  # π_θ is the distribution that was sampled from
            tp_group=self.tensor_group if self.config.parallel.tensor > 1 else None,
            sequence_parallel=self.transformer.sequence_parallel,
            valid_vocab=self.shape.vocab_size,
            fp32_logits=self.config.policy.logits_dtype == "float32",
        )
