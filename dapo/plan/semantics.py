"""What a run's numbers mean: each choice that a reader of its curves has to know, beside the paper's and the
released code's.

`paper` is arXiv:2503.14476; `verl` is the released reproduction, recipe/dapo/run_dapo_qwen2.5_32b.sh and the
code it runs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dapo.config import Config
from dapo.files import write_text

Source = Literal["paper", "verl"]
UNSAID = "unsaid"  # the source leaves it open: nothing departs from it
VERSIONED = (
    "dapo",
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "triton",
    "sglang",
    "numpy",
    "math-verify",
)


@dataclass(frozen=True)
class Choice:
    """One choice: what this run does, what the sources do, and why one would do as this run does."""

    name: str
    value: Any
    paper: Any
    verl: Any
    reason: str

    def departs_from(self, source: Source) -> bool:
        there = getattr(self, source)
        return bool(there != UNSAID and there != self.value)


def choices(config: Config) -> list[Choice]:
    """All of them, options and what the code has fixed."""
    rollout, reward, objective, optim = config.rollout, config.reward, config.objective, config.optim
    cache = reward.overlong_cache if reward.soft_overlong_punishment else 0
    functions = [reward.function] if isinstance(reward.function, str) else list(reward.function)
    return [
        Choice("objective.normaliser", objective.normaliser, "group_token_mean", "token_mean",
               "every token of a minibatch weighs the same; Eq. 8 to the letter weighs short groups' tokens up"),
        Choice("objective.clip_low", objective.clip_low, 0.2, 0.2, "a narrower or wider trust region downwards"),
        Choice("objective.clip_high", objective.clip_high, 0.28, 0.28, "Clip-Higher: room for unlikely tokens keeps the entropy up"),
        Choice("objective.dual_clip", objective.dual_clip, None, 10.0, "bounds the loss of a bad token that became much likelier"),
        Choice("objective.overlong_filtering", objective.overlong_filtering, True, False,
               "Table 1 adds it and keeps it; the best public run went without, soft punishment alone tells length"),
        Choice("the log-ratio is clamped to", 20.0, UNSAID, 20.0, "exp stays finite"),
        Choice("KL to a reference", "none", "none", "none", "section 2.3 drops it"),
        Choice("advantage: ddof of the std", 1, UNSAID, 1, "the sample standard deviation, as the released code's"),
        Choice("advantage: added to the std", 1e-6, UNSAID, 1e-6, "equal rewards give zeros"),
        Choice("old log-probs", "recomputed by the policy", UNSAID, "recomputed by the policy", "ratios start at 1"),
        Choice("rollout.dynamic_sampling", rollout.dynamic_sampling, True, True, "without it a step is cheaper and teaches less"),
        Choice("groups are filtered on", "correctness", "correctness", "correctness", "a length penalty must not make groups mixed"),
        Choice("groups are admitted", "in asking order", UNSAID, "in asking order", "else short responses would be favoured"),
        Choice("surplus prompts", "return to the stream", UNSAID, "dropped", "an epoch then holds every prompt once"),
        Choice("rollout.max_staleness", rollout.max_staleness, UNSAID, 0, "finished groups without room are learnt from later"),
        Choice("objective.importance_cap, of older weights' tokens", objective.importance_cap if rollout.max_staleness else "none",
               UNSAID, "none", "exp(old − behavior): they were drawn from another distribution than the ratio's denominator"),
        Choice("rollout.at_cap", rollout.at_cap, UNSAID, "stop", "a late step that finds too few mixed groups learns from those"),
        Choice("rollout.prompts_per_step", rollout.prompts_per_step, 512, 512, "another batch size"),
        Choice("rollout.prompts_per_round", rollout.prompts_per_round, UNSAID, 1536, "how far sampling runs ahead"),
        Choice("rollout.max_rounds", rollout.max_rounds, UNSAID, 10, "how long to look for mixed groups"),
        Choice("rollout.group_size", rollout.group_size, 16, 16, "more samples find a mixed group more often, and cost more"),
        Choice("rollout.temperature", rollout.temperature, 1.0, 1.0, "hotter explores more; the loss uses the same"),
        Choice("rollout.max_response_length", rollout.max_response_length, 20480, 20480, "other tasks, other lengths"),
        Choice("data.max_prompt_length", config.data.max_prompt_length, UNSAID, 2048, "other tasks, other lengths"),
        Choice("data.too_long", config.data.too_long, UNSAID, "truncate", "a prompt that is cut may have lost its question"),
        Choice("copies of a prompt", "left out", UNSAID, "kept", "the published file repeats its 17 thousand prompts a hundred times"),
        Choice("reward: right, wrong", "+1, −1", "+1, −1", "+1, −1", "Eq. 7"),
        Choice("reward.function", ", ".join(functions), UNSAID, "the last 300 characters, compared as text",
               "integers are compared exactly, other answers by math-verify: fewer right answers are called wrong"),
        Choice("reward.truncated_is_wrong", reward.truncated_is_wrong, UNSAID, False, "where the task asks for an end"),
        Choice("soft overlong punishment (tokens of L_cache, 0: none)", cache, 4096, 4096, "other lengths; without it none is told"),
        Choice("soft overlong punishment is at least", -1.0, -1.0, UNSAID, "Eq. 13; the released code has no floor"),
        Choice("optim.lr", optim.lr, 1e-6, 1e-6, "a smaller model bears more"),
        Choice("optim.warmup_steps", optim.warmup_steps, 20, 10, "rollout steps, linear"),
        Choice("optim.prompts_per_minibatch", optim.prompts_per_minibatch, 32, 32, "other numbers of updates a step"),
        Choice("optim.weight_decay", optim.weight_decay, UNSAID, 0.1, "none for very small models"),
        Choice("optim.clip_grad", optim.clip_grad, UNSAID, 1.0, "another bound for the gradient's norm"),
        Choice("optim.betas", list(optim.betas), UNSAID, [0.9, 0.999], "a shorter memory bears larger steps"),
        Choice("unit of a step", "rollout step", "update", "rollout step",
               f"the paper's axis counts updates, of which a step here has {config.updates_per_step}"),
        Choice("eval.samples", config.eval.samples, 32, 32, "fewer samples, wider intervals"),
        Choice("eval.temperature", config.eval.temperature, 1.0, 1.0, "another way to ask"),
        Choice("eval.top_p", config.eval.top_p, 0.7, 0.7, "1.0 measures the distribution that is trained"),
    ]  # fmt: skip


def diff(config: Config, source: Source) -> list[str]:
    """A line for each departure of this config from the paper, or from verl."""
    return [
        f"{choice.name}: {_shown(choice.value)}; {source}: {_shown(getattr(choice, source))}. Why one would: "
        f"{choice.reason}"
        for choice in choices(config)
        if choice.departs_from(source)
    ]


def manifest(config: Config, data: str) -> dict[str, Any]:
    """What is kept with a run. `data`: the hash of its training prompts."""
    functions = (
        [config.reward.function] if isinstance(config.reward.function, str) else list(config.reward.function)
    )
    return {
        "choices": {choice.name: choice.value for choice in choices(config)},
        "data": data,
        "reward functions": {name: fingerprint(name) for name in [*functions, *config.reward.shadow]},
        "versions": {"python": platform.python_version()}
        | {name: version for name in VERSIONED if (version := _version(name))},
    }


def keep(found: dict[str, Any], path: Path) -> list[str]:
    """Write the manifest. Where the run had another one before, a line for each choice that has changed
    since.

    Versions may change without a word: they are kept, the newest.
    """
    before = json.loads(path.read_text()) if path.is_file() else found
    write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    now = found["choices"] | {"data": found["data"]} | found["reward functions"]
    then = before["choices"] | {"data": before["data"]} | before["reward functions"]
    return [
        f"{name} was {_shown(then[name])} and is {_shown(now[name])} from here on"
        for name in now
        if then.get(name, now[name]) != now[name]
    ]


def fingerprint(function: str) -> str:
    """Which source a reward function comes from: a hash of all of dapo/reward for our own, of its file for
    others; a URL has none.
    """
    module = function.partition(":")[0]
    spec = importlib.util.find_spec(module) if not function.startswith(("http://", "https://")) else None
    if spec is None or spec.origin is None:
        return "unknown"
    origin = Path(spec.origin)
    files = sorted(origin.parent.glob("*.py")) if module.startswith("dapo.reward") else [origin]
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | list) or value is None else str(value)
