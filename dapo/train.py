"""DAPO (arXiv:2503.14476), Algorithm 1. Every rank runs this same program; the main rank also samples.

torchrun --nproc-per-node 2 -m dapo train examples/arithmetic/config.yaml
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from dapo import clock, evaluate, semantics
from dapo.checkpoint import Checkpoints
from dapo.config import Config, ConfigError
from dapo.data import PromptStream, Summary, digest, load_prompts, load_stream
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
    rollouts, sets = make_rollouts(config, mesh, is_interrupted)
    policy = Policy(config, mesh)  # π_θ
    checkpoints = Checkpoints(config.run, mesh)
    step = checkpoints.load(policy, rollouts)
    log = make_log(config, rollouts, start=step)
    try:
        for step in range(step, config.run.steps):  # noqa: B020  # 1
            sync(policy, rollouts, mesh, version=step)  # 3: π_θold ← π_θ
            scores = mesh.on_main(evaluate.maybe, step, rollouts, sets, config)
            batch = mesh.scatter(rollouts.next_batch, step)  # 2, 4–9: the main rank collects; each rank receives its own share
            mismatch = policy.set_old_logprobs(batch)  # log π_θold, in the trainer's numerics and the updates' own packing
            updates = [policy.update(minibatch) for minibatch in batch.minibatches]  # 10–11: Eq. 8
            log(step, scores | batch.metrics | mismatch | mean(updates))
            checkpoints.maybe_save(step + 1, policy, rollouts)
        step = config.run.steps
        sync(policy, rollouts, mesh, version=step)
        log(step, mesh.on_main(evaluate.maybe, step, rollouts, sets, config))
        policy.save_hf(config.run.dir / "hf")
    except Interrupted:
        checkpoints.save(step, policy, rollouts)
        raise
    finally:
        log.close()
        rollouts.close()


def sync(policy: Policy, rollouts: Rollouts | RolloutsElsewhere, mesh: Mesh, version: int) -> None:
    """The engine's weights become the policy's. Every rank drains them to the end, whatever becomes of the engine.

    Raises, on every rank:
        EngineError: the engine refused, and no rank has entered a collective; or it failed on the way, and all have left the last one.
    """
    mesh.on_main(rollouts.prepare_weights, version)
    weights = policy.weights()

    def load() -> None:
        try:
            rollouts.load_weights(weights, version)
        finally:
            for _ in weights:
                pass

    mesh.together(load)


def make_rollouts(
    config: Config, mesh: Mesh, is_interrupted: Callable[[], bool] = lambda: False
) -> tuple[Rollouts | RolloutsElsewhere, dict[str, list[Prompt]]]:
    """The sampler's side, and the held-out sets: on the main rank. Elsewhere what takes part in the weight sync, and no sets.

    Raises:
        ConfigError, FailedElsewhere: the tokenizer, a data file or the reward function cannot be used.
    """
    made = mesh.on_main_only(_make_rollouts, config, mesh, is_interrupted)
    return made if made else (RolloutsElsewhere(), {})


def _make_rollouts(config: Config, mesh: Mesh, is_interrupted: Callable[[], bool]) -> tuple[Rollouts, dict[str, list[Prompt]]]:
    tokenizer = load_tokenizer(config.policy.model)
    prompts, summaries = load_stream(config.data, tokenizer, config.run.seed)
    sets, more = load_sets(config, tokenizer)
    for summary in summaries + more:
        print(summary, flush=True)
    found = semantics.manifest(config, digest(prompts.prompts))
    for change in semantics.keep(found, config.run.dir / "semantics.json"):
        print(f"warning: {change}", file=sys.stderr, flush=True)
    (config.run.dir / "data.json").write_text(json.dumps([asdict(s) for s in summaries + more], indent=1, default=str))
    rollouts = build_rollouts(config, mesh, tokenizer, prompts)
    rollouts.is_interrupted = is_interrupted
    return rollouts, sets


def build_rollouts(config: Config, mesh: Mesh, tokenizer: Any, prompts: PromptStream) -> Rollouts:
    return Rollouts(
        config,
        mesh.data,
        engine=EmbeddedEngine(config.policy.model, getattr(torch, config.policy.dtype), mesh.device, config.engine.max_concurrent),
        prompts=prompts,
        reward=Reward(config.reward, config.rollout.max_response_length, config.run.dir / "disputes.jsonl"),
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
        stop_ids=stop_ids(config.policy.model, tokenizer),
    )


def load_sets(config: Config, tokenizer: Any) -> tuple[dict[str, list[Prompt]], list[Summary]]:
    """The held-out problems of every set, by name. Rows that repeat (30 problems × 32 copies) are 30 problems; the summary says so."""
    data = config.eval.data
    paths = data if isinstance(data, dict) else {data.stem: data} if data else {}
    options = config.data.model_copy(update={"too_long": "error"})
    loaded = {name: load_prompts(path, tokenizer, options) for name, path in paths.items()}
    return {name: prompts for name, (prompts, _) in loaded.items()}, [summary for _, summary in loaded.values()]


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


def evaluate_models(config: Config, mesh: Mesh, models: list[Path]) -> None:
    """Evaluate Hugging Face directories on the sets of eval.data; each later one is compared with the first, problem by problem.

    Results go to <run.dir>/eval.json.

    Raises:
        ConfigError: no eval.data, or a directory cannot be used.
    """
    tokenizer = load_tokenizer(config.policy.model)
    sets, summaries = load_sets(config, tokenizer)
    if not sets:
        raise ConfigError("eval.data is not set: name a file, or {name: file} for several")
    rollouts = build_rollouts(config, mesh, tokenizer, PromptStream([], config.run.seed))
    results = {}
    for summary in summaries:
        print(summary)
    for model in models:
        rollouts.load_weights(evaluate.stored_weights(model), version=0)
        results[str(model)] = evaluate.run(rollouts, sets, config, f"evaluating {model}")
        for name, scores in results[str(model)].items():
            print(f"{model}  {name}: {scores}", flush=True)
    for later, comparisons in evaluate.write(results, config.run.dir / "eval.json").items():
        for name, c in comparisons.items():
            print(f"{later} against {models[0]}  {name}: {c['difference']:+.3f} ± {c['half_width']:.3f}, p = {c['p_value']:.2g}")
    rollouts.close()


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
    for warning in config.warnings():
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    try:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        (config.run.dir / "config.yaml").write_text(config.dump())
    except OSError as error:
        raise ConfigError(f"run.dir={config.run.dir} cannot be written: {error.strerror}") from error
