"""Finds why engine and policy disagree: samples a fixed set of responses and compares |old − behavior|
after one change at a time.

dapo mismatch CONFIG
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

import numpy as np
import torch
from dapo_kernels import Head, Tokens
from torch import Tensor

from dapo import files
from dapo.assemble import enter, make_sampler
from dapo.checkpoint import Checkpoints
from dapo.config import Config, ConfigError
from dapo.learn.batch import Share, shares
from dapo.measure.attribution import Attribution, Change
from dapo.mesh import Mesh
from dapo.model.families import read_shape
from dapo.model.layout import check_layout
from dapo.model.routing import sampled_routing
from dapo.policy.megatron import PlacedMicrobatch, Policy
from dapo.policy.replay import Source
from dapo.policy.support import mass_above, mass_beyond
from dapo.rollout import probe
from dapo.sampler import Sampler
from dapo.types import EpisodeError, Group

COARSE = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)  # × rollout.temperature
FINE = (0.94, 0.96, 0.98, 0.99, 1.0, 1.01, 1.02, 1.04, 1.06)  # × the best of the former
EXPLAINED = 0.5  # of the mismatch by a temperature: then the engine's is another, and prefill has none


def with_routes(config: Config) -> Config:
    """Return the config with routes of the rollout, if the model has experts and the run's own engine can
    return them.
    """
    shape = read_shape(config.policy.model)
    if not shape.num_experts or config.engine.urls:
        return config
    with_replay = config.changed(["policy.routing_replay=rollout"])
    try:
        check_layout(shape, with_replay)
    except ConfigError:  # what the run has excludes it, or is wrong by itself, which is said later
        return config
    return with_replay


def mismatch(config: Config, mesh: Mesh, num_responses: int, sampled_by: int | None = None) -> None:
    """Compare, print a table, write <run.dir>/mismatch.json. The policy has the weights of the run's newest
    checkpoint, of run.resume if that is a step, or of policy.model.

    `sampled_by`: step of the checkpoint whose weights sample; None: the policy's own.

    Raises:
        ConfigError: there is no such checkpoint, or nothing can be built of the config.
        EngineError: the engine failed.
    """
    asked, config = config, with_routes(config)
    with ExitStack() as opened:
        checkpoints = Checkpoints(config.run, mesh)
        shape = enter(config, mesh, opened)
        found = checkpoints.find(shape)
        sampler, _ = make_sampler(config, mesh, names_changes=False)
        opened.callback(sampler.close)
        policy = Policy(config, mesh)
        step = checkpoints.newest or 0
        if sampled_by is not None:
            folder = config.run.dir / "checkpoints" / f"step-{sampled_by:06}"
            if not mesh.on_main(folder.is_dir):
                raise ConfigError(f"--sampled-by {sampled_by}: there is no {folder}")
            policy.load(folder / "policy")
        elif found:
            policy.load(found / "policy")
        source: Source = "replay" if asked.policy.routing_replay == "rollout" else "router"
        made = Comparison(config, mesh, sampler, policy, step, source)
        made.sample(num_responses, step if sampled_by is None else sampled_by)
        if sampled_by is not None and found:
            policy.load(found / "policy")
        result = made.compare()
        if mesh.is_main:
            print("\n".join(result.describe()), flush=True)
            path = config.run.dir / "mismatch.json"
            files.write_text(path, json.dumps(asdict(result), indent=1) + "\n")


class Comparison:
    """Compares the same responses again and again. Every method is collective."""

    def __init__(
        self, config: Config, mesh: Mesh, sampler: Sampler, policy: Policy, version: int, source: Source
    ):
        """`version`: of the policy's weights; `source`: of its routes, in the run."""
        self.source = source
        self.config, self.mesh, self.sampler, self.policy = config, mesh, sampler, policy
        self.version = version
        self.routing = sampled_routing(config)
        self.groups: list[Group] = []  # one response each, on the main rank
        self.num_responses = 0
        self.rescored: list[np.ndarray] = []  # their log-probs by the engine, of whole responses at once

    def sample(self, num_responses: int, version: int) -> None:
        """Sample by weights `version`, which the policy has now."""
        self.sampler.load_weights(self.policy, version)
        self.groups = self.mesh.on_main_only(self._sample, num_responses) or []
        self.num_responses = self.mesh.on_main(lambda: len(self.groups))
        self.rescored = self._rescore()
        self.mesh.on_main_only(lambda: self.sampler.rollouts.engine.release_memory())

    def _sample(self, num_responses: int) -> list[Group]:
        rollouts = self.sampler.rollouts
        prompts, seed = rollouts.prompts.prompts, self.config.run.seed
        cycled = [prompts[i % len(prompts)] for i in range(num_responses)]
        groups = probe.responses(rollouts.engine, cycled, rollouts.sampling, seed)
        if not groups:
            raise EpisodeError("all responses are lost: their environments failed, as the warnings say")
        for group in groups:  # whatever wrote them, they are compared with the policy
            for sample in group.samples:
                sample.versions = ((self.version, 0, sample.length),)
        return groups

    def _rescore(self) -> list[np.ndarray]:
        score = self.mesh.on_main_only(lambda: self.sampler.rollouts.engine.score(self.groups))
        return score or []

    def compare(self) -> Attribution:
        """Make each change, by the weights that the policy has now."""
        behavior = [group.samples[0].behavior_logprobs for group in self.groups]
        work = self._work(behavior)
        own = self._logprobs(work)
        mean, largest, count = self._gaps(work, own)
        changes = [self._routing(work), self._head(work), self._temperature(work)]
        whole = self._gaps(self._work(self.rescored), own)[0]
        explained = changes[-1].share(mean) or 0.0
        is_plain = self.config.rollout.temperature == 1.0 and explained < EXPLAINED
        changes.append(
            Change(
                "kernels and batches",
                "the engine scores whole responses" if is_plain else "(at temperature 1 only)",
                whole if is_plain else None,
                "decoding and prefill of the engine round differently: see run.deterministic",
            )
        )
        before, support = self.rescored, self._support(work)
        self.sampler.load_weights(self.policy, self.version)
        now = self._rescore()
        self.mesh.on_main_only(lambda: self.sampler.rollouts.engine.release_memory())
        moved = [b + (x - y) for b, x, y in zip(behavior, now, before, strict=True)]
        stale = Change(
            "stale weights",
            "the engine gets the policy's weights once more",
            self._gaps(self._work(moved), own)[0],
            "the engine had other weights than the policy: look at the weight sync, or lower "
            "rollout.max_staleness",
        )
        return Attribution(mean, largest, self.num_responses, count, [stale, *changes], *support)

    def _work(self, behavior: Sequence[np.ndarray]) -> list[PlacedMicrobatch]:
        """Return the responses in microbatches, always the same ones, with these log-probs by the engine."""
        config, mesh = self.config, self.mesh

        def make() -> Iterator[Share]:
            groups = [
                replace(group, samples=[replace(group.samples[0], behavior_logprobs=b.astype(np.float32))])
                for group, b in zip(self.groups, behavior, strict=True)
            ]
            return shares(groups, config, mesh.data, {}, self.version, routing=self.routing)

        share = mesh.scatter(make, by_stage=self.routing is not None)
        batch = self.policy.place(share.batch(config.parallel, mesh.context_rank))
        return [microbatch for minibatch in batch.minibatches for microbatch in minibatch]

    def _logprobs(
        self, work: list[PlacedMicrobatch], head: Head | None = None, source: Source | None = None
    ) -> list[Tensor]:
        """Return the policy's log-probs of each microbatch, on the last stage."""

        def finish(microbatch: PlacedMicrobatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
            used = head or self.policy.head
            found = used.logprobs(
                hidden.to(used.weight.dtype), Tokens(microbatch.targets, microbatch.loss_mask)
            )
            return found.sum(), found

        return self.policy.forward(work, finish, source or self.source)

    def _gaps(self, work: list[PlacedMicrobatch], logprobs: list[Tensor]) -> tuple[float, float, int]:
        """Return the mean and the largest |log-prob − behavior|, and the number of tokens."""
        gaps = [
            (found - microbatch.behavior_logprobs)[microbatch.loss_mask].abs().double()
            for microbatch, found in zip(work, logprobs, strict=False)
            if self.policy.reports
        ]
        gap = torch.cat(gaps) if gaps else torch.zeros(0)
        total, count = self.mesh.sum(np.array([float(gap.sum()), len(gap)]))
        return total / max(count, 1), self.mesh.max(float(gap.max()) if len(gap) else 0.0), int(count)

    def _routing(self, work: list[PlacedMicrobatch]) -> Change:
        what, mean = "tokens go to the experts that sampled them", None
        if self.source == "replay":
            what = "(the run replays routes)"
        elif not self.routing:
            has_experts = self.policy.shape.num_experts
            what = "(the engine returns no routes)" if has_experts else "(the model has no experts)"
        else:
            mean = self._gaps(work, self._logprobs(work, source="replay"))[0]
        return Change("routing", what, mean, "set policy.routing_replay=rollout")

    def _head(self, work: list[PlacedMicrobatch]) -> Change:
        is_exact = self.config.policy.logits_dtype == "float32"
        head = None
        if self.policy.is_last_stage:
            weight = self.policy.head.weight
            weight = weight.bfloat16() if is_exact else weight
            head = replace(self.policy.head, weight=weight, fp32_logits=not is_exact)
        dtype = "bfloat16" if is_exact else "float32"
        return Change(
            "head",
            f"the policy's logits in {dtype}",
            self._gaps(work, self._logprobs(work, head))[0],
            "the engine's are rounded: engine.sglang.enable-fp32-lm-head=true"
            if is_exact
            else "the policy's are rounded: policy.logits_dtype=float32",
        )

    def _temperature(self, work: list[PlacedMicrobatch]) -> Change:
        best, mean = self.config.rollout.temperature, 0.0
        for factors in (COARSE, FINE):
            temperatures = [best * factor for factor in factors]

            def all_of_them(
                microbatch: PlacedMicrobatch, hidden: Tensor, temperatures: list[float] = temperatures
            ) -> tuple[Tensor, list[Tensor]]:
                heads = [replace(self.policy.head, temperature=t) for t in temperatures]
                tokens = Tokens(microbatch.targets, microbatch.loss_mask)
                return hidden.sum(), [head.logprobs(hidden, tokens) for head in heads]

            found = self.policy.forward(work, all_of_them, self.source)
            means = [self._gaps(work, [each[i] for each in found])[0] for i in range(len(temperatures))]
            mean, best = min(zip(means, temperatures, strict=True))
        return Change(
            "temperature",
            f"the policy's at {best:.3g}, which fits best (rollout.temperature is "
            f"{self.config.rollout.temperature:g})",
            mean,
            f"the engine samples, or reports, at temperature {best:.3g}: look for what overrides the request",
        )

    def _support(self, work: list[PlacedMicrobatch]) -> tuple[float, float]:
        """Return the most probability above any token that was drawn, and how many tokens from beyond it so
        many draws from the policy have.
        """

        def above(microbatch: PlacedMicrobatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
            found = mass_above(self.policy.head, hidden, microbatch.targets, microbatch.loss_mask)
            return found.sum(), found[microbatch.loss_mask]

        drawn = self.policy.forward(work, above, self.source)
        most = self.mesh.max(max((float(mass.max()) for mass in drawn if len(mass)), default=0.0))

        def beyond(microbatch: PlacedMicrobatch, hidden: Tensor) -> tuple[Tensor, float]:
            found = mass_beyond(self.policy.head, hidden, microbatch.loss_mask, most)
            return found.sum(), float(found.double().sum())

        masses = self.policy.forward(work, beyond, self.source)
        own = sum(masses) if self.policy.reports else 0.0
        return most, float(self.mesh.sum(np.array([own]))[0])
