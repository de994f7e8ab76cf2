"""The first layout of a machine that fits a model: how trainer and servers share its devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dapo.config import Config, ConfigError
from dapo.model.layout import check_layout
from dapo.model.parameters import num_parameters
from dapo.model.shape import ModelShape
from dapo.plan.memory import mlp_modules
from dapo.plan.plan import make_plan
from dapo.plan.time import HARDWARE, MACHINE

Fields = dict[str, Any]
FRACTIONS = (0.8, 0.7, 0.6, 0.5, 0.4)  # of a GPU's memory, for servers that share it with the trainer
WEIGHTS = 0.6  # share of a server's GPUs that its weights may take: the rest is for keys and values
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
OFFLOAD = {
    "optimizer_cpu_offload": True,
    "optimizer_offload_fraction": 1.0,
    "use_precision_aware_optimizer": True,
}


class Choice(NamedTuple):
    """An option that is chosen, and the reason."""

    key: str  # "rollout.group_size"
    value: Any
    why: str = ""


@dataclass(frozen=True)
class Machine:
    """The devices that are planned for."""

    gpu: str  # a key of HARDWARE
    count: int  # GPUs, or processes of a CPU

    @property
    def is_cpu(self) -> bool:
        return self.gpu == "cpu"

    def __str__(self) -> str:
        return f"{self.count} × {HARDWARE[self.gpu].name}"


class Layout(NamedTuple):
    """A way for trainer and servers to share the machine."""

    ranks: int  # of the trainer
    choices: list[Choice]


def layout(common: list[Choice], model: Path, shape: ModelShape, machine: Machine) -> Layout:
    """Return the first layout that fits, with all other options given; `model` is the directory.

    Servers apart come before servers on the trainer's GPUs, little recomputed before few ranks to a model.

    Raises:
        ConfigError: none does.
    """
    values = _nested(common)
    longest = values["data"]["max_prompt_length"] + values["rollout"]["max_response_length"]
    cause: ConfigError | None = None
    for candidate in _of_cpu(machine) if machine.is_cpu else _of_gpus(machine, shape, longest):
        try:
            config = Config.model_validate(
                _nested([*common, *candidate.choices, Choice("policy.model", str(model))])
            )
            config.check()
            check_layout(shape, config)
            fits = make_plan(config, machine.gpu, candidate.ranks).fits
        except ConfigError as error:
            cause = cause or error  # the model cannot be split so
            continue
        if fits:
            return candidate
        cause = ConfigError(f"{machine}: no layout fits: {_remedy(machine)}")
    raise cause or ConfigError(f"{machine}: no layout fits: {_remedy(machine)}")


def _remedy(machine: Machine) -> str:
    if machine.is_cpu:
        return "this machine has too little main memory; plan for GPUs with --gpu and --gpus"
    several = "examples/qwen2.5_32b_paper is a config for several machines"
    return f"name more or larger ones by --gpus and --gpu; {several}"


def _of_cpu(machine: Machine) -> Iterator[Layout]:
    for tensor in (1, 2, 4, 8):
        if tensor <= machine.count:
            yield Layout(tensor, [Choice("parallel.tensor", tensor)])


def _of_gpus(machine: Machine, shape: ModelShape, longest: int) -> Iterator[Layout]:
    for ranks, engine in _engines(machine, shape, longest):
        for fields in _savings(shape):
            megatron = [Choice("policy.megatron", fields, "saves memory, costs time")] if fields else []
            for tensor, pipeline in _splits(ranks):
                split = [Choice("parallel.tensor", tensor, "GPUs share every matrix" if tensor > 1 else "")]
                split += [Choice("parallel.pipeline", pipeline)] if pipeline > 1 else []
                expert = min(ranks // pipeline, shape.num_experts)
                split += (
                    [Choice("parallel.expert", expert, "GPUs share a layer's experts")] if expert > 1 else []
                )
                yield Layout(ranks, [*split, *megatron, *engine])


def _engines(machine: Machine, shape: ModelShape, longest: int) -> Iterator[tuple[int, list[Choice]]]:
    """Yield the trainer's ranks and the servers: on other GPUs, about half of all; then on the trainer's."""
    memory = HARDWARE[machine.gpu].memory * 2**30
    size = next((n for n in (1, 2, 4, 8) if 2 * num_parameters(shape) <= WEIGHTS * n * memory), MACHINE)
    kind = Choice("engine.kind", "sglang")
    arguments: Fields = {"context-length": longest} | ({"tp-size": size} if size > 1 else {})
    powers = [1 << n for n in range(machine.count.bit_length())]
    for ranks in sorted(powers, key=lambda n: (abs(2 * n - machine.count), -n)):
        servers = (machine.count - ranks) // size
        if servers < 1:
            continue
        where = f"of {size} GPU{'s' * (size > 1)} each, after the trainer's"
        apart = arguments | {"mem-fraction-static": 0.85}
        yield ranks, [kind, Choice("engine.servers", servers, where), Choice("engine.sglang", apart)]
    ranks = powers[-1]
    for fraction in FRACTIONS if ranks >= size else ():
        shared = arguments | {"enable-memory-saver": True, "mem-fraction-static": fraction}
        where = "on the trainer's GPUs"
        servers = ranks // size
        sync = Choice("engine.weight_sync", "tensor")
        yield ranks, [kind, Choice("engine.servers", servers, where), sync, Choice("engine.sglang", shared)]


def _savings(shape: ModelShape) -> list[Fields]:
    """Return fields of policy.megatron, from the fastest to those that save most memory."""
    selective = {"recompute_granularity": "selective", "recompute_modules": mlp_modules(shape)}
    return [{}, selective, FULL, FULL | OFFLOAD]


def _splits(ranks: int) -> list[tuple[int, int]]:
    """Return tensor × pipeline sizes that divide `ranks`, the smallest products first, tensor first."""
    powers = [1 << n for n in range(MACHINE.bit_length())]
    pairs = [(t, p) for t in powers for p in powers if ranks % (t * p) == 0]
    return sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1]))


def _nested(choices: Iterable[Choice]) -> dict[str, Any]:
    """Return choices as a config's values, by section."""
    values: dict[str, Any] = {}
    for key, value, _ in choices:
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    return values
