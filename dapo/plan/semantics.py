"""The meaning of a run's numbers: each choice that a reader of its curves has to know, and its sources'.

`paper` is arXiv:2503.14476; `verl` is the released reproduction, recipe/dapo/run_dapo_qwen2.5_32b.sh and the
code it runs. Choices that are options are declared in dapo/config/sections.py; those that the code
has fixed, here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dapo.config import UNSAID, Config, ConfigError
from dapo.model import hub
from dapo.plan import methods, stack
from dapo.types import reason

Source = Literal["paper", "verl"]
VERSIONED = (
    "dapo", "torch", "megatron-core", "transformer-engine", "transformers", "triton", "sglang", "numpy",
    "mpmath",
)  # fmt: skip
# what older manifests do not say, because there was no other
FORMER = {
    "objective.kind": "dapo", "objective.advantage": "group_std", "policy.logits_dtype": "float32",
    "objective.importance_band": "none", "policy.routing_replay": "off", "run.deterministic": False,
    "rollout.environment": "none", "rollout.tools": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """One choice: what this run does, what the sources do, and the reason to do as this run does."""

    name: str
    value: Any
    paper: Any
    verl: Any
    reason: str


def _options(config: Config) -> dict[str, Choice]:
    """Return the choices that are options, by name, in the order of dapo/config/sections.py."""
    found = {}
    for section in Config.model_fields:
        options = getattr(config, section)
        for name, field in type(options).model_fields.items():
            if isinstance(field.json_schema_extra, dict):
                value = getattr(options, name)
                value = list(value) if isinstance(value, tuple) else value
                sources: dict[str, Any] = field.json_schema_extra
                found[f"{section}.{name}"] = Choice(f"{section}.{name}", value, **sources)
    return found


def choices(config: Config) -> list[Choice]:
    """Return all choices, options and what the code has fixed, by topic."""
    options = _options(config)

    def option(*prefixes: str) -> list[Choice]:
        names = [name for prefix in prefixes for name in options if name.startswith(prefix)]
        return [options.pop(name) for name in names]

    reward = config.reward
    cache = reward.overlong_cache if reward.soft_overlong_punishment else 0
    objective = config.objective
    importance = objective.importance if config.is_corrected else "none"
    of = {"stale": "older weights' tokens", "all": "all tokens"}[objective.importance_of]
    has_band = importance in ("band", "sequence_mask")
    arguments = {name.replace("_", "-"): value for name, value in config.engine.sglang.items()}
    served = "float32" if arguments.get("enable-fp32-lm-head") else "as policy.dtype"
    if config.engine.urls:
        served = UNSAID
    weights = [
        list(x.values()) if isinstance(x, dict) else "none" for x in (config.data.train, reward.function)
    ]
    plain = config.model_dump(mode="json")
    return [
        Choice("method", methods.name(config), UNSAID, UNSAID, "see the options below"),
        *option("objective."),
        Choice("the log-ratio is clamped to", 20.0, UNSAID, 20.0, "exp stays finite"),
        Choice("KL to a reference", "none", "none", "none", "section 2.3 drops it"),
        Choice("advantage: ddof of the std", "none" if objective.advantage == "no_std" else 1, UNSAID, 1,
               "the sample standard deviation, as the released code's"),
        Choice("advantage: added to the std", 1e-6, UNSAID, 1e-6, "equal rewards give zeros"),
        Choice("old log-probs", "recomputed by the policy", UNSAID, "recomputed by the policy",
               "ratios start at 1"),
        *option("rollout.dynamic_sampling"),
        Choice("groups are filtered on", "correctness", "correctness", "correctness",
               "a length penalty must not make groups mixed"),
        Choice("groups are admitted", "in asking order", UNSAID, "in asking order",
               "else short responses would be favoured"),
        Choice("surplus prompts", "return to the stream", UNSAID, "dropped",
               "an epoch then holds every prompt once"),
        *option("rollout.max_staleness"),
        Choice("objective.importance and objective.importance_of",
               importance if importance == "none" else f"{importance}, {of}", UNSAID, "none",
               "exp(old − behavior): they were drawn from another distribution than the ratio's denominator"),
        Choice("objective.importance_cap", objective.importance_cap if importance == "tis" else "none",
               UNSAID, "none", "no token may weigh too much"),
        Choice("objective.importance_band", list(objective.importance_band) if has_band else "none",
               UNSAID, "none", "what lies outside weighs nothing"),
        *option("rollout.at_cap", "rollout.prompts", "rollout.max_rounds"),
        *option("rollout."),
        *option("data."),
        Choice("copies of a prompt", "left out", UNSAID, "kept",
               "the published file repeats its 17 thousand prompts a hundred times"),
        Choice("reward: right, wrong", "+1, −1", "+1, −1", "+1, −1", "Eq. 7"),
        Choice("reward.function", ", ".join(reward.weights), UNSAID,
               "the last 300 characters, compared as text", "integers are compared exactly, other answers as "
               "mathematics: fewer right answers are called wrong"),
        *option("reward."),
        Choice("soft overlong punishment (tokens of L_cache, 0: none)", cache, 4096, 4096,
               "other lengths; without it length costs nothing"),
        Choice("soft overlong punishment is at least", -1.0, -1.0, UNSAID,
               "Eq. 13; the released code has no floor"),
        *option("optim.lr", "optim.warmup", "optim.prompts", "optim.weight", "optim.clip", "optim.betas"),
        Choice("unit of a step", "rollout step", "update", "rollout step",
               f"the paper's axis counts updates, of which a step here has {config.updates_per_step}"),
        *option("eval."),
        Choice("run.seed", config.run.seed, UNSAID, UNSAID, "prompts and samples are other draws"),
        Choice("run.deterministic", config.run.deterministic, UNSAID, UNSAID,
               "a run can be repeated to the bit, and takes longer on a GPU"),
        Choice("weights of data.train", weights[0], "none", "none", "the sources are not equally useful"),
        Choice("weights of reward.function", weights[1], "none", "none", "more is wanted than right answers"),
        Choice("rollout.environment", config.rollout.environment or "none", "none", "none",
               "what the policy is to learn takes several turns"),
        Choice("rollout.tools", ", ".join(config.rollout.tools) or "none", "none", "none",
               "the policy need not do in its head what a tool does"),
        Choice("rollout.replay", plain["rollout"]["replay"] or "none", "none", "none",
               "the samples are those of another run"),
        Choice("policy.dtype", config.policy.dtype, UNSAID, "bfloat16",
               "float32 rounds less and costs more"),
        *option("policy."),
        Choice("the engine's logits (engine.sglang.enable-fp32-lm-head)", served, UNSAID,
               "as policy.dtype",
               "they are nearer to the policy's in float32, and the server takes longer"),
        Choice("policy.megatron", plain["policy"]["megatron"], UNSAID, UNSAID, "Megatron's own options"),
        Choice("eval.data", plain["eval"]["data"] or "none", UNSAID, UNSAID, "accuracy of other problems"),
        *options.values(),
    ]  # fmt: skip


def diff(config: Config, source: Source) -> list[str]:
    """Return a line for each departure of this config from the paper, or from verl."""
    return [
        f"{choice.name}: {_shown(choice.value)}; {source}: {_shown(there)}. Why one would: {choice.reason}"
        for choice in choices(config)
        if (there := getattr(choice, source)) not in (UNSAID, choice.value)
    ]


def manifest(config: Config, data: str) -> dict[str, Any]:
    """Return what is kept with a run. `data`: the hash of its training prompts."""
    functions = [*config.reward.weights, *config.reward.shadow, *config.rollout.tools]
    functions += filter(None, [config.rollout.environment])
    found = {name: stack.installed("dapo-rl" if name == "dapo" else name) for name in VERSIONED}
    versions = {name: version for name, version in found.items() if version}
    return {
        "choices": {choice.name: choice.value for choice in choices(config)},
        "prompts": data,  # version 0.1.0 kept a hash of their tokens, as "data"
        "reward functions": {name: fingerprint(name) for name in functions},
        "versions": {"python": platform.python_version()} | versions,
        "hub": hub.origins(config),
    }


def changes(found: dict[str, Any], path: Path) -> list[str]:
    """Return a line for each choice that differs from those of the run's manifest at `path`, if there is one.

    Versions may change silently, and what an older manifest does not hold.

    Raises:
        ConfigError: the file there is no manifest.
    """
    rows, cap = found["prompts"], "objective.importance_cap, of older weights' tokens"
    now = found["choices"] | {"data": rows} | found["reward functions"]
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else found
        then = FORMER | before["choices"] | {"data": before.get("prompts", rows)} | before["reward functions"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({reason(error)}): restore it, or remove it") from error
    if cap in then:  # version 0.1.0
        importance = "none" if then[cap] == "none" else "tis, older weights' tokens"
        then |= {
            "objective.importance_cap": then[cap],
            "objective.importance and objective.importance_of": importance,
        }
    changed = [name for name in now if then.get(name, now[name]) != now[name]]
    return [f"{name} was {_shown(then[name])} and is {_shown(now[name])} from here on" for name in changed]


def dump(found: dict[str, Any]) -> str:
    """Return the manifest as the text of its file."""
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def fingerprint(function: str) -> str:
    """Hash a reward function's source: all of dapo/reward, or another function's file; "unknown" of a URL."""
    module = function.partition(":")[0]
    try:  # `__main__` is the program that runs, or has no file
        spec = None if "://" in function or module == "__main__" else importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a part of the path is no package
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return "unknown"
    origin = Path(spec.origin)
    files = sorted(origin.parent.glob("*.py")) if module.startswith("dapo.reward") else [origin]
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | list | dict) or value is None else str(value)
