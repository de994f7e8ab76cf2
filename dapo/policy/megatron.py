"""π_θ on Megatron-core: build it, score with it, update it, read its weights, save and load it.

T = packed tokens of a microbatch on a context rank (T/tp of them on a rank under sequence parallelism), H =
hidden size, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dapo_kernels import linear_logprobs, linear_policy_loss
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from dapo.clock import heartbeat, timed
from dapo.config import Config, ConfigError
from dapo.learn.batch import Batch, Microbatch, Place
from dapo.learn.traces import Trace, blank
from dapo.mesh import Mesh
from dapo.model.shape import read_shape
from dapo.policy import cpu, torch_dist, weight_files
from dapo.policy.layout import initialize_megatron, interleaved
from dapo.policy.model import build_model, optimizer_config, split_passthrough, transformer_config
from dapo.policy.optimizer_state import OwnState, groups
from dapo.policy.weights import Weights


class PolicyError(RuntimeError):
    """Training met numbers it cannot learn from. Every rank raises it, before the parameters are touched."""


@dataclass
class _Tensors:
    """A Microbatch on this rank's device, and π_θold's view of it."""

    tokens: Tensor  # [1, T]
    positions: Tensor  # [1, T]
    targets: Tensor  # [T]
    mask: Tensor  # [T]
    weights: Tensor  # [T]
    advantages: Tensor  # [T]
    behavior_logprobs: Tensor  # [T]
    is_stale: Tensor  # [T]
    packed: PackedSeqParams
    dumped: list[Place]
    old_logprobs: Tensor | None = None  # [T], last pipeline stage only


class Policy:
    """The trained model. Every method but `is_last_stage` is collective: all ranks call it together.

    Raises:
        ConfigError: the model directory or the layout cannot be used; the message says what to change.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        if mesh.device.type == "cpu":
            cpu.return_freed_memory()
        self.shape = read_shape(config.policy.model)
        self.transformer = transformer_config(self.shape, config)
        optimizer = optimizer_config(config, self.transformer)
        initialize_megatron(config.parallel)
        assert parallel_state.get_data_parallel_rank(with_context_parallel=True) == mesh.share, (
            "mesh and Megatron disagree on the ranks"
        )
        model_parallel_cuda_manual_seed(config.run.seed)
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.is_last_stage = parallel_state.is_pipeline_last_stage()
        # metrics are summed over these ranks
        self.reports = self.is_last_stage and parallel_state.get_tensor_model_parallel_rank() == 0

        _, _, ddp_fields = split_passthrough(config.policy.megatron)
        self.chunks = [chunk.to(mesh.device) for chunk in build_model(self.shape, self.transformer)]
        self._weights = Weights(self.chunks, self.shape)
        self._weights.load(weight_files.open_weights(config.policy.model, self.shape))
        ddp = DistributedDataParallelConfig(
            **dict(use_distributed_optimizer=True, grad_reduce_in_fp32=True) | ddp_fields
        )
        self.models = [
            DistributedDataParallel(
                self.transformer,
                ddp,
                Float16Module(self.transformer, chunk) if self.transformer.bf16 else chunk,
            )
            for chunk in self.chunks
        ]
        self.optimizer = get_megatron_optimizer(optimizer, self.models)
        self.scheduler = self._make_scheduler()
        self.transformer.finalize_model_grads_func = finalize_model_grads
        self.transformer.grad_scale_func = self.optimizer.scale_loss
        no_sync = [model.no_sync for model in self.models]
        self.transformer.no_sync_func = (
            (no_sync if len(no_sync) > 1 else no_sync[0]) if ddp.overlap_grad_reduce else None
        )
        self._on_device: dict[int, _Tensors] = {}
        self._traces: dict[tuple[int, int], Trace] = {}  # by (group, index), where this rank reports

    @timed("old_logprobs")
    @torch.no_grad()  # Megatron's schedule would keep a graph
    def set_old_logprobs(self, batch: Batch) -> dict[str, float]:
        """log π_θold of every token of the batch, by the trainer's own numerics and the updates' own packing:
        the ratio's denominator.

        A stale token's weight is multiplied by the truncated importance weight min(exp(old − behavior),
        objective.importance_cap): older weights than π_θold wrote it. The current weights' tokens keep
        theirs, for what differs there is rounding.

        Returns the mismatch |old − behavior| over the current weights' tokens, mean and max: the alarm for a
        weight sync that went wrong; over the stale ones the mean importance weight, and the share that was
        cut to the cap.

        Raises:
            PolicyError: a log-prob is not finite.
        """
        self._on_device = {id(m): self._tensors(m) for minibatch in batch.minibatches for m in minibatch}
        work = list(self._on_device.values())
        if not work:
            return {}
        cap = self.config.objective.importance_cap
        # not finite; current tokens, Σ|old − behavior|; stale tokens, Σ importance, cut to the cap
        sums, largest = np.zeros(6), 0.0
        # results on the last stage only
        for tensors, logprobs in zip(work, self._run(work, self._score, forward_only=True), strict=False):
            tensors.old_logprobs = logprobs
            log_importance = logprobs - tensors.behavior_logprobs
            importance = log_importance.exp().clamp(max=cap)
            tensors.weights = torch.where(tensors.is_stale, tensors.weights * importance, tensors.weights)
            gap, stale = (
                log_importance[tensors.mask & ~tensors.is_stale].abs(),
                importance[tensors.mask & tensors.is_stale],
            )
            if self.reports:
                bad, cut = (~logprobs.isfinite()).sum(), (stale >= cap).sum()
                sums += [float(x) for x in (bad, len(gap), gap.sum(), len(stale), stale.sum(), cut)]
                largest = max(largest, float(gap.max()) if len(gap) else 0.0)
        broken, current, gaps, num_stale, importances, num_cut = self.mesh.sum(sums)
        if broken:
            raise PolicyError(
                f"{broken:.0f} of {current + num_stale:.0f} log-probs of the policy are not finite: its "
                "weights are damaged; "
                "resume from a checkpoint"
            )
        mismatch = (
            {"policy/mismatch": gaps / current, "policy/mismatch_max": self.mesh.max(largest)}
            if current
            else {}
        )
        if not num_stale:
            return mismatch
        return mismatch | {
            "policy/importance": importances / num_stale,
            "policy/importance_cut": num_cut / num_stale,
        }

    @timed("update")
    def update(self, minibatch: list[Microbatch]) -> dict[str, float]:
        """One optimizer step on one minibatch (Eq. 8). `set_old_logprobs` came before.

        Raises:
            PolicyError: the loss is not finite; the parameters are as they were.
        """
        metrics = self.backward(minibatch)
        self.scheduler.step(1)  # before the update: the first one has the first warm-up value, not lr 0
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise PolicyError(
                f"gradient norm is {grad_norm}: the update destroyed the policy; resume from the last "
                "checkpoint"
            )
        return metrics | {"policy/grad_norm": float(grad_norm), "policy/lr": self.scheduler.get_lr({})}

    def backward(self, minibatch: list[Microbatch]) -> dict[str, float]:
        """Gradients of the minibatch's loss, summed over microbatches and data-parallel ranks; its metrics,
        means over response tokens.
        """
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        work = [self._on_device[id(microbatch)] for microbatch in minibatch]
        sums = sum(
            self._run(work, self._loss, forward_only=False), start=torch.zeros(len(SUMS), dtype=torch.float64)
        )
        totals = dict(
            zip(SUMS, self.mesh.sum(sums.numpy() if self.reports else np.zeros(len(SUMS))), strict=True)
        )
        if not math.isfinite(totals["loss"]):
            raise PolicyError(
                f"the loss is {totals['loss']}: stopped before the update; the last checkpoint is whole"
            )
        tokens = max(totals["tokens"], 1)
        return {
            "policy/loss": totals["loss"],  # the weights hold the normaliser: the sum is the loss
            "policy/entropy": totals["entropy"] / tokens,
            "policy/probability": totals["probability"] / tokens,
            "policy/clip_low": totals["clipped_low"] / tokens,
            "policy/clip_high": totals["clipped_high"] / tokens,
            "policy/clip_high_probability": totals["clipped_high_probability"]
            / max(totals["clipped_high"], 1),
        }

    def take_traces(self) -> list[Trace]:
        """What the updates since the last call saw of each dumped sample, of those that this rank reports."""
        traces, self._traces = list(self._traces.values()), {}
        return traces

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) of the whole model, one at a time, on every rank: every rank
        drains it.
        """
        return self._weights.export()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """As `weights`, the gradients of the last `backward` (whole on every rank only without data
        parallelism).
        """
        return self._weights.export(lambda p: p.main_grad)  # type: ignore[attr-defined]

    def free_unused(self) -> None:
        """Give back the GPU memory that is kept for later: servers that share the GPU sample from it."""
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()

    @timed("export")
    def save_hf(self, target: Path) -> None:
        """Write the model as a Hugging Face directory, which appears whole or not at all."""
        if self.mesh.is_main:
            dtype = self.transformer.params_dtype
            weight_files.save_hf(
                [self.weights()], self.shape, dtype, self.config.policy.model, target, may_replace=True
            )
        else:
            for _ in self.weights():
                pass
        self.mesh.barrier()

    def save(self, directory: Path) -> torch_dist.Save:
        """Plan a Megatron distributed checkpoint of model, optimizer and scheduler, in an existing, empty
        directory: `start` it.
        """
        copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
        tensors, _ = self._sharded_state()
        state = tensors | {"optimizer": groups(self.optimizer), "num_updates": self.scheduler.num_steps}
        return torch_dist.Save(state, directory, copies, self.mesh.barrier)

    def load(self, directory: Path) -> None:
        """Restore what `save` planned, in this layout or another.

        Raises:
            ConfigError: a parameter holds NaN or infinite values.
        """
        now = [{key: group[key] for key in SETTINGS} for group in self.optimizer.param_groups]
        tensors, own = self._sharded_state()
        state = dist_checkpointing.load(tensors, str(directory))
        for i, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state["model"][f"chunk{i}"])
        with torch.no_grad():
            self.optimizer.load_state_dict(state["optimizer"])
            own.take()
        for group, settings in zip(self.optimizer.param_groups, now, strict=True):
            group.update(settings)  # what the config says now, not what it said then
        self.scheduler.num_steps = 0
        self.scheduler.step(state["num_updates"])
        broken = [
            name
            for chunk in self.chunks
            for name, param in chunk.named_parameters()
            if not param.isfinite().all()
        ]
        self.mesh.on_main(_refuse_broken, directory, self.mesh.gather(broken))

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

    def _sharded_state(self) -> tuple[dict[str, Any], OwnState]:
        """The tensors that a checkpoint holds, this rank's parts of them; and those of the optimizer among
        them.
        """
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        model = {
            f"chunk{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(self.chunks)
        }
        own = OwnState(self.optimizer, model)
        return {"model": model, "state": own.boxes}, own

    def _run(self, work: list[_Tensors], finish: Any, forward_only: bool) -> list[Any]:
        """Megatron's pipeline schedule over the microbatches. Returns what `finish` reported for each, on the
        last stage; else nothing.
        """

        # Megatron's 16-bit wrapper would widen the hidden states
        keep_dtype = {"fp32_output": False} if self.transformer.bf16 else {}

        def forward_step(data: Iterator[_Tensors], model: torch.nn.Module) -> tuple[Tensor, Any]:
            heartbeat()
            tensors = next(data)
            hidden = model(
                tensors.tokens, tensors.positions, None, packed_seq_params=tensors.packed, **keep_dtype
            )  # [T, 1, H]
            return hidden, lambda hidden: finish(tensors, hidden[:, 0])

        return get_forward_backward_func()(  # type: ignore[no-any-return]
            forward_step_func=forward_step,
            data_iterator=[iter(work) for _ in self.models],
            model=self.models,
            num_microbatches=len(work),
            seq_length=work[0].tokens.shape[1],  # not used: lengths travel with the activations
            micro_batch_size=1,
            forward_only=forward_only,
            **self._schedule_options([tensors.tokens.shape[1] for tensors in work]),
        )

    def _schedule_options(self, lengths: list[int]) -> dict[str, Any]:
        if len(self.models) == 1:
            return {}
        split = self.config.parallel.tensor if self.transformer.sequence_parallel else 1
        return interleaved(self.transformer, [length // split for length in lengths])

    def _score(self, tensors: _Tensors, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logprobs = linear_logprobs(hidden, self._head, tensors.targets, tensors.mask, **self._head_options)
        return logprobs.sum(), torch.zeros((), dtype=torch.int, device=hidden.device), logprobs

    def _loss(self, tensors: _Tensors, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss as a sum over this microbatch's tokens, "0 tokens" (Megatron then divides by nothing), and
        SUMS.
        """
        objective = self.config.objective
        out = linear_policy_loss(
            hidden,
            self._head,
            tensors.targets,
            tensors.old_logprobs,  # type: ignore[arg-type]
            tensors.advantages,
            tensors.mask,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            weights=tensors.weights,
            dual_clip=objective.dual_clip,
            weight_grad=self._head.main_grad,  # type: ignore[attr-defined]  # the head's gradient is added where Megatron keeps it
            **self._head_options,
        )
        if tensors.dumped and self.reports:
            per_token = [tensors.old_logprobs, out.logprobs, out.clipped_low, out.clipped_high]
            old, new, low, high = torch.stack([x.float() for x in per_token]).cpu().numpy()  # type: ignore[union-attr]
            for place in tensors.dumped:
                key, t = (place.group, place.index), place.tokens
                trace = self._traces.setdefault(key, blank(*key, place.length))
                here = slice(place.start, place.start + t.stop - t.start)
                trace.old_logprobs[here], trace.logprobs[here] = old[t], new[t]
                trace.clipped_low[here], trace.clipped_high[here] = low[t] > 0, high[t] > 0
        probability = out.logprobs[tensors.mask].exp()
        high = out.clipped_high[tensors.mask]
        sums = [
            tensors.mask.sum(),
            out.loss.detach(),
            out.entropy.sum(),
            probability.sum(),
            out.clipped_low.sum(),
            high.sum(),
            probability[high].sum(),
        ]
        return (
            out.loss,
            torch.zeros((), dtype=torch.int, device=hidden.device),
            torch.stack([s.double() for s in sums]).cpu(),
        )

    @property
    def _head(self) -> torch.nn.Parameter:
        """The LM head, on the last pipeline stage."""
        head: torch.nn.Parameter = self.chunks[-1].head
        return head

    @property
    def _head_options(self) -> dict[str, Any]:
        return {
            "temperature": self.config.rollout.temperature,  # π_θ is the distribution that was sampled from
            "tp_group": self.tensor_group if self.config.parallel.tensor > 1 else None,
            "sequence_parallel": self.transformer.sequence_parallel,
            "valid_vocab": self.shape.vocab_size,
            # 16-bit logits cost a log-prob 2e-2; this is the price of a few percent of the head's time
            "fp32_logits": True,
        }

    def _tensors(self, microbatch: Microbatch) -> _Tensors:
        def place(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(self.mesh.device, non_blocking=True)

        cu_seqlens = place(microbatch.cu_seqlens)
        longest = int(np.diff(microbatch.cu_seqlens).max())
        return _Tensors(
            tokens=place(microbatch.tokens)[None],
            positions=place(microbatch.positions)[None],
            targets=place(microbatch.targets),
            mask=place(microbatch.mask),
            weights=place(microbatch.weights),
            advantages=place(microbatch.advantages),
            behavior_logprobs=place(microbatch.behavior_logprobs),
            is_stale=place(microbatch.is_stale),
            packed=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            ),
            dumped=microbatch.dumped,
        )


def _refuse_broken(directory: Path, names: list[list[str]]) -> None:
    if broken := [name for of_rank in names for name in of_rank]:
        raise ConfigError(
            f"{directory}: {len(broken)} parameters hold NaN or infinite values, first {broken[0]}: use an "
            "earlier checkpoint"
        )


# of the optimizer's groups; the scheduler sets lr and weight_decay
SETTINGS = ("max_lr", "min_lr", "betas", "eps")

# what one microbatch adds up over its response tokens, in this order
SUMS = ("tokens", "loss", "entropy", "probability", "clipped_low", "clipped_high", "clipped_high_probability")
