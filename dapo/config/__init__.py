"""A run's config: YAML and overrides, typed, checked, written back. sections.py has every option."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dapo.config import plain_yaml
from dapo.config.options import UNSAID, ConfigError, Section
from dapo.config.parallel import Parallel
from dapo.config.sections import (
    DEFAULT_FUNCTION,
    Data,
    Engine,
    Eval,
    Limits,
    Objective,
    Optim,
    Policy,
    Reward,
    Rollout,
    Run,
)

__all__ = [
    "DEFAULT_FUNCTION",
    "UNSAID",
    "Config",
    "ConfigError",
    "Data",
    "Engine",
    "Eval",
    "Limits",
    "Objective",
    "Optim",
    "Parallel",
    "Policy",
    "Reward",
    "Rollout",
    "Run",
    "load",
    "nearest",
]


# options that may differ by machine: paths; ranks compare what the model's files hold
PATHS = {"run.dir", "data.train", "rollout.replay", "policy.model", "engine.python", "eval.data"}


class Config(Section):
    """A run."""

    run: Run
    data: Data
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    objective: Objective = Objective()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    policy: Policy
    engine: Engine = Engine()
    eval: Eval = Eval()

    @property
    def is_corrected(self) -> bool:
        """True if the run may have tokens that objective.importance is for."""
        is_stale = self.rollout.max_staleness > 0 or self.rollout.replay is not None
        return is_stale or self.objective.importance_of == "all"

    @property
    def updates_per_step(self) -> int:
        """Number of updates of a full step; a step with fewer groups makes fewer."""
        return self.rollout.prompts_per_step // self.optim.prompts_per_minibatch

    def check(self) -> None:
        """Raise ConfigError if two options contradict each other."""
        run, rollout, reward, parallel = self.run, self.rollout, self.reward, self.parallel
        minibatch, budget = self.optim.prompts_per_minibatch, self.policy.tokens_per_microbatch
        if run.keep_every and run.keep_every % run.save_every:
            raise ConfigError(
                f"run.keep_every={run.keep_every} is not a multiple of run.save_every={run.save_every}: "
                "nothing is saved then"
            )
        if too_late := [step for step in run.profile.steps if step >= run.steps]:
            raise ConfigError(
                f"run.profile.steps={too_late}: run.steps={run.steps} ends before; the first step is 0"
            )
        if rollout.prompts_per_step % minibatch:
            raise ConfigError(
                f"rollout.prompts_per_step={rollout.prompts_per_step} is not a multiple of "
                f"optim.prompts_per_minibatch={minibatch}: every update takes the same number of groups"
            )
        if rollout.prompts_per_round * rollout.max_rounds < rollout.prompts_per_step:
            raise ConfigError(
                f"rollout.prompts_per_round={rollout.prompts_per_round} × rollout.max_rounds="
                f"{rollout.max_rounds} can never fill rollout.prompts_per_step={rollout.prompts_per_step}: "
                "raise one of them"
            )
        longest = self.data.max_prompt_length + rollout.max_response_length
        multiple = parallel.sequence_multiple
        if -(-longest // multiple) * multiple > budget:
            padded = f", padded to a multiple of 2 × parallel.context={parallel.context}"
            padded = padded if multiple > 1 else ""
            raise ConfigError(
                f"policy.tokens_per_microbatch={budget} cannot hold one sample of data.max_prompt_length="
                f"{self.data.max_prompt_length} + rollout.max_response_length={rollout.max_response_length} "
                f"= {longest} tokens{padded}: raise it"
            )
        for name in [*reward.weights, *reward.shadow, *self.engine.urls]:
            if re.search("[@?#]", name.partition("://")[2]):
                without_user = re.sub("://.*@", "://***@", name, flags=re.DOTALL)  # whatever stands there
                raise ConfigError(
                    f"{without_user}: a URL is saved with the run, so it may hold no user, password or "
                    "query; a key for the server is in the environment: DAPO_REWARD_KEY or DAPO_ENGINE_KEY"
                )
        if self.engine.urls and self.engine.sglang:
            raise ConfigError(
                f"engine.sglang={plain_yaml.shown(self.engine.sglang)} is for servers that the run starts: "
                "give those in engine.urls their arguments where they start"
            )
        for option, value in self.engine.without_servers.items():
            raise ConfigError(
                f"engine.{option}={plain_yaml.shown(value)} is for servers, and "
                f"engine.kind={self.engine.kind} has none: set engine.kind=sglang, or leave it out"
            )
        if run.deterministic and rollout.max_staleness and rollout.replay is None:
            raise ConfigError(
                f"run.deterministic=true with rollout.max_staleness={rollout.max_staleness}: which weights "
                "write a token is a matter of timing then; set 0, or replay a dump (rollout.replay)"
            )
        if rollout.forecast_floor == 0:
            raise ConfigError(
                "rollout.forecast_floor=0: a prompt that is forecast to be no use would never come back, "
                "even if the forecast is wrong; choose one above 0"
            )
        if rollout.first_wave >= rollout.group_size:
            raise ConfigError(
                f"rollout.first_wave={rollout.first_wave} leaves nothing of rollout.group_size="
                f"{rollout.group_size} to save: make it smaller, or 0"
            )
        asked = {"forecast": rollout.forecast != "off", "first_wave": rollout.first_wave > 0}
        if (name := next((name for name in asked if asked[name]), "")) and not rollout.dynamic_sampling:
            raise ConfigError(
                f"rollout.{name}={getattr(rollout, name)} without rollout.dynamic_sampling: every group is "
                f"learnt from, so none can be left out; leave rollout.{name} out"
            )
        if reward.answer_format != "answer_line" and DEFAULT_FUNCTION not in reward.weights:
            raise ConfigError(
                f"reward.answer_format={reward.answer_format} is for {DEFAULT_FUNCTION}, which is not in "
                f"reward.function={', '.join(reward.weights)}: leave it out"
            )
        if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
            raise ConfigError(
                f"parallel.virtual_pipeline={parallel.virtual_pipeline} with parallel.pipeline=1: one stage "
                "has nobody to take turns with; raise parallel.pipeline, or leave it 1"
            )
        if reward.soft_overlong_punishment and reward.overlong_cache >= rollout.max_response_length:
            raise ConfigError(
                f"reward.overlong_cache={reward.overlong_cache} leaves nothing of "
                f"rollout.max_response_length={rollout.max_response_length} unpunished: make it smaller, or "
                "set reward.soft_overlong_punishment=false"
            )

        self._check_turns()
        self._check_objective()

    def _check_turns(self) -> None:
        rollout, reward = self.rollout, self.reward
        if rollout.environment and rollout.tools:
            raise ConfigError(
                f"rollout.tools={plain_yaml.shown(rollout.tools)} with rollout.environment="
                f"{rollout.environment}, whose tools are those that its method tools returns: leave one out"
            )
        unused = {
            "function": reward.weights != {DEFAULT_FUNCTION: 1.0},
            "shadow": bool(reward.shadow),
            "answer_format": reward.answer_format != "answer_line",
        }
        if rollout.environment and (name := next((name for name in unused if unused[name]), "")):
            raise ConfigError(
                f"reward.{name}={plain_yaml.shown(getattr(reward, name))} with rollout.environment="
                f"{rollout.environment}: the environment's rewards are learnt from; leave reward.{name} out"
            )

    def _check_objective(self) -> None:
        objective, kind, importance = self.objective, self.objective.kind, self.objective.importance
        if kind != "dapo" and objective.dual_clip is not None:
            raise ConfigError(
                f"objective.dual_clip={objective.dual_clip} with objective.kind={kind}: it bounds dapo only; "
                "set it to null"
            )
        if kind == "gspo" and self.is_corrected and importance in ("tis", "band"):
            raise ConfigError(
                f"objective.importance={importance} with objective.kind=gspo: it weighs single tokens, and "
                "the ratio is a whole response's; set objective.importance=sequence_mask or none"
            )
        if objective.importance_of == "all" and importance == "none":
            raise ConfigError(
                "objective.importance_of=all with objective.importance=none: no token is corrected; leave it "
                "out, or choose tis, band or sequence_mask"
            )
        low, high = objective.importance_band
        if low >= high:
            raise ConfigError(
                f"objective.importance_band=[{low}, {high}] is empty: the first number has to be smaller"
            )
        if self.policy.logits_dtype == "bfloat16" and self.policy.dtype == "float32":
            raise ConfigError(
                "policy.logits_dtype=bfloat16 with policy.dtype=float32: logits are as exact as the policy; "
                "leave it out"
            )

    def warnings(self) -> list[str]:
        """Describe what is allowed and rarely meant, a line each."""
        found = []
        objective = self.objective
        if objective.kind == "gspo" and max(objective.clip_low, objective.clip_high) > 0.01:
            found.append(
                f"objective.kind=gspo with clip_low={objective.clip_low}, clip_high={objective.clip_high}: "
                "the mean ratio of a whole response hardly leaves 1, so nothing is ever clipped; its authors "
                "take 0.0003 and 0.0004"
            )
        if objective.importance in ("band", "sequence_mask") and not self.is_corrected:
            found.append(
                f"objective.importance={objective.importance} with rollout.max_staleness=0 corrects nothing: "
                "no token is of older weights; for all tokens set objective.importance_of=all"
            )
        is_divided = objective.advantage == "group_std"
        if self.reward.soft_overlong_punishment and not self.rollout.dynamic_sampling and is_divided:
            found.append(
                "reward.soft_overlong_punishment without rollout.dynamic_sampling: in a group all right or "
                "all wrong the length penalty is the only difference, and dividing by its small std (Eq. 9) "
                "makes full-size advantages of it"
            )
        return found

    def changed(self, overrides: list[str]) -> Config:
        """Return this config with overrides applied as `load` does.

        Raises:
            ConfigError: a key or value is not valid, or two options contradict each other.
        """
        return _validated(self.model_dump(mode="json"), overrides, "config")

    def in_common(self) -> dict[str, str]:
        """Return what all ranks of a run must have alike, as JSON: `{"optim.lr": "1e-06", …}`."""
        sections = self.model_dump(mode="json")
        values = {f"{name}.{key}": value for name in sections for key, value in sections[name].items()}
        return {name: json.dumps(value) for name, value in values.items() if name not in PATHS}

    def dump(self) -> str:
        """Return the resolved config as YAML, which `load` reads back to an equal Config."""
        return plain_yaml.dump(self.model_dump(mode="json"))


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config, then apply overrides in order: `load("run.yaml", ["optim.lr=2e-6"])`. One without
    "=" is another YAML file, whose options are overrides: `["grpo.yaml"]`.

    Raises:
        ConfigError: the file cannot be read, or a key or value is not valid; the message names it and the
            nearest key.
    """
    return _validated(_read(path), overrides or [], f"config {path}")


def _read(path: str | Path) -> dict[str, Any]:
    try:
        values = plain_yaml.load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path}: not UTF-8 text: {error}") from error
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from error
    except plain_yaml.NotYAML as error:
        raise ConfigError(f"config {path}: {error}") from error
    values = {} if values is None else values  # an empty file
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: expected sections (run:, data:, …), got {type(values).__name__}")
    return values


def _validated(values: dict[str, Any], overrides: list[str], what: str) -> Config:
    try:
        for override in overrides:
            if "=" not in override and override.endswith((".yaml", ".yml")):
                values = _merged(values, _read(override))
                what = f"{what} with {override}"
            else:
                plain_yaml.override(values, override)
        config = Config.model_validate(values)
    except plain_yaml.NotYAML as error:
        raise ConfigError(str(error)) from error
    except ValidationError as error:
        wrong = [_explain(e, values) for e in error.errors()]
        # of a list with a wrong item, another kind of a union says that it is no path
        said = [text for key, text in wrong if not any(other.startswith(f"{key}.") for other, _ in wrong)]
        raise ConfigError(f"{what}: {'; '.join(dict.fromkeys(said))}") from None
    config.check()
    return config


def _merged(values: dict[str, Any], others: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """Return `values` with the options of `others` set, each as an override sets it. Those of other programs
    (policy.megatron, engine.sglang) are set one by one.
    """
    both = dict(values)
    for name, other in others.items():
        own = both.get(name)
        is_section = depth == 0 or name in ("megatron", "sglang")
        if isinstance(own, dict) and isinstance(other, dict) and is_section:
            both[name] = _merged(own, other, depth + 1)
        else:
            both[name] = other
    return both


def nearest(word: str, known: list[str]) -> str:
    """Return a hint for a misspelt name: `nearest("lrr", ["lr", "seed"])` → "did you mean lr?"."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"


def _explain(error: Any, values: Any) -> tuple[str, str]:
    """Return the key that an error of pydantic is about, and what to say of it."""
    model: Any = Config
    key, last = ".".join(map(str, error["loc"])), error["loc"][-1]
    if error["type"] == "extra_forbidden":
        for part in error["loc"][:-1]:
            model = model.model_fields[part].annotation
        return key, f"unknown key {key}: {nearest(last, list(model.model_fields))}"
    if error["type"] == "missing":
        return key, f"missing key {key}"
    path = []
    for part in error["loc"]:  # pydantic names a union's kinds in it, which are no keys
        if isinstance(values, dict) and str(part) in map(str, values):
            values = next(value for key, value in values.items() if str(key) == str(part))
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            continue
        path.append(str(part))
    wrong = error["msg"].lower().removeprefix("value error, ")
    key = ".".join(path)
    return key, f"{key}={plain_yaml.shown(error['input'])}: {wrong}"
