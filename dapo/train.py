"""DAPO (arXiv:2503.14476), Algorithm 1. Every rank runs this same program; the main rank also samples.

torchrun --nproc-per-node 2 -m dapo train examples/arithmetic/config.yaml
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from dapo import clock, evaluate
from dapo.checkpoint import Checkpoints
from dapo.config import Config, ConfigError
from dapo.data import PromptStream, load_prompts
from dapo.engine.embedded import EmbeddedEngine
from dapo.mesh import Mesh
from dapo.metrics import Log, SilentLog, mean
from dapo.policy.megatron import Policy
from dapo.policy.model import read_shape
from dapo.reward.pool import Reward
from dapo.rollout import Rollouts, RolloutsElsewhere
from dapo.types import Interrupted, Prompt


def train(config: Config, mesh: Mesh) -> None:
    """Run Algorithm 1 from the newest checkpoint to config.run.steps. Interrupted, it saves and raises Interrupted."""
    is_interrupted = Interruption()
    mesh.on_main(_prepare, config)
    rollouts, problems = make_rollouts(config, mesh, is_interrupted)
    policy = Policy(config, mesh)  # π_θ
    checkpoints = Checkpoints(config.run, mesh)
    step = checkpoints.load(policy, rollouts)
    log = make_log(config, rollouts, start=step)
    try:
        for step in range(step, config.run.steps):  # noqa: B020  # 1
            rollouts.load_weights(policy.weights(), version=step)  # 3: π_θold ← π_θ
            scores = mesh.on_main(evaluate.maybe, step, rollouts, problems, config)
            batch = mesh.scatter(rollouts.next_batch, step)  # 2, 4–9: the main rank collects; each rank receives its own share
            mismatch = policy.set_old_logprobs(batch)  # log π_θold, in the trainer's numerics and the updates' own packing
            updates = [policy.update(minibatch) for minibatch in batch.minibatches]  # 10–11: Eq. 8
            log(step, scores | batch.metrics | mismatch | mean(updates))
            checkpoints.maybe_save(step + 1, policy, rollouts)
        step = config.run.steps
        rollouts.load_weights(policy.weights(), version=step)
        log(step, mesh.on_main(evaluate.maybe, step, rollouts, problems, config))
        policy.save_hf(config.run.dir / "hf")
    except Interrupted:
        checkpoints.save(step, policy, rollouts)
        raise
    finally:
        log.close()
        rollouts.close()


def make_rollouts(
    config: Config, mesh: Mesh, is_interrupted: Callable[[], bool] = lambda: False
) -> tuple[Rollouts | RolloutsElsewhere, list[Prompt]]:
    """The sampler's side, and the held-out problems: on the main rank. Elsewhere what takes part in the weight sync, and no problems.

    Raises:
        ConfigError, FailedElsewhere: the tokenizer, a data file or the reward function cannot be used.
    """
    made = mesh.on_main_only(_make_rollouts, config, mesh, is_interrupted)
    return made if made else (RolloutsElsewhere(), [])


def _make_rollouts(config: Config, mesh: Mesh, is_interrupted: Callable[[], bool]) -> tuple[Rollouts, list[Prompt]]:
    tokenizer = load_tokenizer(config.policy.model)
    data = config.data
    prompts = load_prompts(data.train, tokenizer, data.max_prompt_length, data.too_long)
    problems = load_prompts(config.eval.data, tokenizer, data.max_prompt_length, "error") if config.eval.data else []
    rollouts = Rollouts(
        config,
        mesh.data,
        engine=EmbeddedEngine(config.policy.model, getattr(torch, config.policy.dtype), mesh.device, config.engine.max_concurrent),
        prompts=PromptStream(prompts, config.run.seed),
        reward=Reward(config.reward, config.rollout.max_response_length),
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
        stop_ids=stop_ids(config.policy.model, tokenizer),
    )
    rollouts.is_interrupted = is_interrupted
    return rollouts, problems


def load_tokenizer(model: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"policy.model={model}: no usable tokenizer there: {' '.join(str(error).split())}") from error


def stop_ids(model: Path, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a response, for every engine alike: the tokenizer's EOS and those of generation_config.json.

    Raises:
        ConfigError: there are none; no response would ever end.
    """
    ids = {tokenizer.eos_token_id}
    if (model / "generation_config.json").is_file():
        more = transformers.GenerationConfig.from_pretrained(model).eos_token_id
        ids |= set(more) if isinstance(more, list) else {more}
    ids.discard(None)
    if not ids:
        raise ConfigError(f"policy.model={model}: neither the tokenizer nor generation_config.json names an EOS token")
    return tuple(sorted(ids))


def make_log(config: Config, rollouts: Rollouts | RolloutsElsewhere, start: int) -> Log | SilentLog:
    if isinstance(rollouts, RolloutsElsewhere):
        return SilentLog()
    log = Log(config, start)
    rollouts.on_progress = log.console.progress
    clock.listen(log.console.progress)
    if start:
        log.console.say(f"going on from step {start} of {config.run.steps} in {config.run.dir}")
    return log


class Interruption:
    """Ctrl-C or SIGTERM, caught on every rank: called, it says whether one has come. A second Ctrl-C, two seconds on, ends the process."""

    def __init__(self) -> None:
        self.since: float | None = None
        signal.signal(signal.SIGINT, self._note)
        signal.signal(signal.SIGTERM, self._note)

    def __call__(self) -> bool:
        return self.since is not None

    def _note(self, number: int, frame: Any) -> None:
        if self.since is not None and number == signal.SIGINT and time.monotonic() - self.since > 2:
            raise KeyboardInterrupt
        self.since = self.since or time.monotonic()


def _prepare(config: Config) -> None:
    """Refuse a model that will not do, before anything is built; make the run directory and keep the resolved config in it."""
    read_shape(config.policy.model)
    try:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        (config.run.dir / "config.yaml").write_text(config.dump())
    except OSError as error:
        raise ConfigError(f"run.dir={config.run.dir} cannot be written: {error.strerror}") from error
