"""Does a config fit on its devices? If not, which changes make it fit?"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod

from dapo.config import Config, ConfigError
from dapo.model.layout import check_layout
from dapo.model.shape import ModelShape
from dapo.plan.activations import Backend
from dapo.plan.memory import GIB, Rank, mlp_modules
from dapo.plan.servers import CONTEXT, FRACTION, Servers, are_colocated
from dapo.plan.time import Hardware, Time

FREE_FRACTION = 0.05  # of a GPU's memory: what the allocator cannot use between blocks of unlike size


@dataclass(frozen=True)
class Plan:
    """A config on `world` devices: memory for the longest samples, times for `length` tokens a sample."""

    config: Config
    shape: ModelShape
    hardware: Hardware
    world: int
    backend: Backend
    length: int

    @property
    def data(self) -> int:
        return self.config.parallel.data(self.world)

    @cached_property
    def stages(self) -> list[Rank]:
        """A rank of each pipeline stage; on the first one, the main rank."""
        pipeline = self.config.parallel.pipeline
        return [Rank(self.config, self.shape, self.backend, self.data, stage) for stage in range(pipeline)]

    @cached_property
    def worst(self) -> Rank:
        """The rank that holds most."""
        return max(self.stages, key=lambda rank: rank.peak)

    @property
    def room(self) -> float:
        """GiB for one rank's tensors."""
        if self.backend == "cpu":
            return self.hardware.memory / self.world - self.hardware.runtime
        context = CONTEXT if self.servers else 0.0
        return self.hardware.memory * (1 - FREE_FRACTION) - self.hardware.runtime - context

    @cached_property
    def servers(self) -> Servers | None:
        """The servers on the trainer's GPUs, if there are any."""
        is_shared = self.backend != "cpu" and are_colocated(self.config)
        return Servers(self.stages, self.hardware) if is_shared else None

    @property
    def problems(self) -> list[str]:
        """Lines about what does not fit; none if all does."""
        worst, too_much = self.worst, self.worst.peak / GIB - self.room
        where = f"out of memory during {worst.peak_moment} on stage {worst.stage}"
        learning = f"{where}: {too_much:.1f} GiB too much" if too_much > 0 else ""
        return [problem for problem in (learning, self.servers.problem if self.servers else "") if problem]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def time(self) -> Time:
        return Time(self.worst, self.hardware, self.world, self.length)


@dataclass(frozen=True)
class Change:
    """Something to try: overrides for the command line, and `times` as many devices."""

    overrides: tuple[str, ...] = ()
    times: int = 1


def remedies(plan: Plan) -> list[tuple[str, Plan]]:
    """Return what makes it fit: (what to add to the command line, the plan with it), cheapest first.

    Single changes, the smallest of each kind; where none is enough, two at once, then three, … Empty: no
    known change makes it fit.
    """
    kinds = _kinds(plan)
    for count in range(1, len(kinds) + 1):
        tried = (_first_that_fits(plan, chosen) for chosen in itertools.combinations(kinds, count))
        if found := [remedy for remedy in tried if remedy]:
            return found
    return []


def _kinds(plan: Plan) -> list[list[Change]]:
    """Return changes by kind, from the cheapest to the dearest; of each kind, the smallest first."""
    policy, parallel, megatron = plan.config.policy, plan.config.parallel, plan.worst.megatron
    num_tokens = {max(policy.tokens_per_microbatch >> n, plan.worst.longest) for n in range(1, 6)}
    num_tokens -= {policy.tokens_per_microbatch}
    modules = ",".join(mlp_modules(plan.shape))
    mlp = _passthrough("recompute_granularity=selective", f"recompute_modules=[{modules}]")
    full = _passthrough("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1")
    precision = "use_precision_aware_optimizer=true"  # without it no checkpoint can be loaded
    offload = _passthrough("optimizer_cpu_offload=true", "optimizer_offload_fraction=1.0", precision)
    recompute = {None: [mlp, full], "selective": [full]}
    fractions = plan.servers.other_fractions if plan.servers else []
    can_offload = plan.backend != "cpu" and policy.dtype == "bfloat16" and not megatron.optimizer_cpu_offload
    return [
        [Change((f"{FRACTION}={fraction}",)) for fraction in fractions],
        [Change((f"policy.tokens_per_microbatch={n}",)) for n in sorted(num_tokens, reverse=True)],
        recompute.get(megatron.recompute_granularity, []),
        _wider("tensor", parallel.tensor, (2, 4, 8)),
        _wider("pipeline", parallel.pipeline, (2, 4, 8, 16)),
        _wider("context", parallel.context, (2, 4, 8)),
        _wider("expert", parallel.expert, (2, 4, 8, 16, 32)) if plan.shape.num_experts else [],
        [Change(times=n) for n in (2, 4, 8)],
        [offload] if can_offload else [],
    ]


def _passthrough(*fields: str) -> Change:
    return Change(tuple(f"policy.megatron.{field}" for field in fields))


def _wider(option: str, now: int, sizes: tuple[int, ...]) -> list[Change]:
    return [Change((f"parallel.{option}={size}",)) for size in sizes if size > now]


def _first_that_fits(plan: Plan, kinds: tuple[list[Change], ...]) -> tuple[str, Plan] | None:
    for changes in itertools.product(*kinds):
        changed = _changed(plan, changes)
        if changed is not None and changed.fits:
            size = [f"--world-size {changed.world}"] if changed.world != plan.world else []
            return " ".join([*_overrides(changes), *size]), changed
    return None


def _overrides(changes: tuple[Change, ...]) -> list[str]:
    return [override for change in changes for override in change.overrides]


def _changed(plan: Plan, changes: tuple[Change, ...]) -> Plan | None:
    """Return the changed plan, on as many devices as it needs; None if the model cannot be split so."""
    try:
        config = plan.config.changed(_overrides(changes))
        check_layout(plan.shape, config)
    except ConfigError:
        return None
    least = config.parallel.least_world
    world = ceil(plan.world / least) * least * prod(change.times for change in changes)
    return replace(plan, config=config, world=world)
