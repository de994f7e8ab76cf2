"""Put the parts together as a config says: prompts, reward, engine, held-out sets; for `dapo train` and `dapo
eval`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dapo.config import Config, ConfigError
from dapo.engine.embedded import EmbeddedEngine
from dapo.engine.fleet import make_servers
from dapo.engine.routes import check_routes
from dapo.engine.sglang import SGLangEngine
from dapo.engine.weight_sync import make_sync
from dapo.episodes.assemble import make_episodes, make_setup, turns_of
from dapo.files import run_directory
from dapo.log import check_installed, warn
from dapo.mesh import Mesh, set_gpu_environment
from dapo.model.families import read_shape
from dapo.model.files import fingerprints, stored_weights
from dapo.model.layout import check_layout, check_length
from dapo.model.routing import sampled_routing
from dapo.model.shape import ModelShape, of_text, read_config
from dapo.model.tokenizer import check_vocabulary, decoder_json, differences, load_tokenizer, stop_ids
from dapo.plan import semantics
from dapo.policy.weight_files import hf_tensors, open_weights
from dapo.reward.pool import Decoder, Reward, what_is_read
from dapo.rollout import evaluate
from dapo.rollout.data_files import Summary
from dapo.rollout.prompts import PromptStream, load_prompts, load_stream
from dapo.rollout.render import NONE, ONE_TURN, Turns
from dapo.rollout.rollouts import Rollouts
from dapo.rollout.saving import read_state
from dapo.sampler import Sampler, with_retries
from dapo.types import Engine, Prompt


def enter(config: Config, mesh: Mesh, opened: ExitStack) -> ModelShape:
    """Compare what all ranks read, read the model's sizes, lock the run directory. Collective.

    The data is not compared: only the main rank reads it.

    Raises:
        ConfigError, FailedElsewhere: ranks differ in config or model, or the run cannot work.
    """
    mesh.check_same(config.in_common(), "start all machines with the same config and overrides")
    mesh.check_same(fingerprints(config.policy.model), "copy the same model to all machines")
    return mesh.on_main(_enter, config, opened)


def _enter(config: Config, opened: ExitStack) -> ModelShape:
    for warning in config.warnings():
        warn(warning)
    shape = read_shape(config.policy.model)
    check_layout(shape, config)
    check_length(config)
    open_weights(config.policy.model, shape)
    check_installed(config)
    opened.enter_context(run_directory(config.run.dir))
    return shape


def make_sampler(
    config: Config,
    mesh: Mesh,
    resumed: Path | None = None,
    is_interrupted: Callable[[], bool] = lambda: False,
    on_progress: Callable[[str, float], None] = lambda text, fraction: None,
    names_changes: bool = True,
) -> tuple[Sampler, dict[str, str]]:
    """Make every rank's Sampler. Collective; the parts that sample are on the main rank.

    `resumed`: the checkpoint that the run goes on from; `names_changes`: say which choices differ from those
    of the run's record. Also returns, on the main rank, the files of the
    run's record by name: what became of the data, and what the run's numbers mean.

    Raises:
        ConfigError, FailedElsewhere: the tokenizer, a data file, the reward function or the engine cannot be
        used, or the checkpoint was made with other data. Nothing was written, and no server started.
    """

    def make() -> tuple[Sampler, dict[str, str]]:
        tokenizer = load_tokenizer(config.policy.model)
        check_vocabulary(config.policy.model, tokenizer)
        saved = read_state(resumed)["prompts"] if resumed else {}
        turns = turns_of(config)
        of_run = config.run.seed, config.reward, saved.get("dates", {}), turns
        prompts, summaries = load_stream(config.data, tokenizer, *of_run)
        sets, set_summaries = load_sets(config, tokenizer, prompts.dates, turns)
        if resumed:
            prompts.load_state_dict(saved)
        record = _record(config, prompts.data, summaries + set_summaries, names_changes)
        reward = make_reward(config, tokenizer, is_interrupted)
        evaluate.check_best(config.run.keep_best, sets, reward)
        to_check = prompts.prompts
        rollouts = make_rollouts(
            config, mesh, tokenizer, prompts, to_check, reward, turns, is_interrupted, on_progress
        )
        _check_staleness(config, rollouts)
        return Sampler(config, mesh, rollouts, sets), record

    set_gpu_environment(config)
    return mesh.on_main_only(make) or (Sampler(config, mesh, None, {}), {})


def _check_staleness(config: Config, rollouts: Rollouts) -> None:
    if rollouts.engine.is_colocated and config.rollout.max_staleness:
        rollouts.close()
        raise ConfigError(
            f"rollout.max_staleness={config.rollout.max_staleness}: the servers share the trainer's GPUs and "
            "cannot generate while the policy learns, as each side frees its memory for the other: set 0, or "
            "give the servers GPUs of their own"
        )


def _record(config: Config, data: str, summaries: list[Summary], names_changes: bool) -> dict[str, str]:
    """Print what became of the data, and what has changed since the run's record was written; return the
    new one.

    `data` is the hash of the training prompts.
    """
    _say(config, summaries)
    found, path = semantics.manifest(config, data), config.run.dir / "semantics.json"
    for change in semantics.changes(found, path) if names_changes else ():
        print(f"warning: {change}", file=sys.stderr, flush=True)
    table = [asdict(summary) for summary in summaries]
    return {path.name: semantics.dump(found), "data.json": json.dumps(table, indent=1, default=str)}


def _say(config: Config, summaries: list[Summary]) -> None:
    """Print what became of the data, and which answers the default reward reads."""
    read = "" if config.rollout.environment else what_is_read(config.reward)
    for line in filter(None, [*map(str, summaries), read]):
        print(line, flush=True)


def make_reward(config: Config, tokenizer: Any, is_interrupted: Callable[[], bool] = lambda: False) -> Reward:
    """Make the Reward that the config names, and its processes. Raise ConfigError if it cannot be used."""
    disputes, longest = config.run.dir / "disputes.jsonl", config.rollout.max_response_length
    judges = bool(config.rollout.environment)
    return Reward(config.reward, longest, disputes, is_interrupted, _decoder(tokenizer), judges)


def make_rollouts(
    config: Config,
    mesh: Mesh,
    tokenizer: Any,
    prompts: PromptStream,
    samples: Sequence[Prompt],
    reward: Reward,
    turns: Turns = ONE_TURN,
    is_interrupted: Callable[[], bool] = lambda: False,
    on_progress: Callable[[str, float], None] = lambda text, fraction: None,
) -> Rollouts:
    """Make the main rank's Rollouts, with the engine that the config names. `samples`: prompts to try an
    environment with.
    """

    def engine() -> Engine:
        return make_engine(config, mesh, is_interrupted)

    if config.rollout.has_turns:
        setup = make_setup(config, tokenizer, turns, prompts.dates)
        made: Engine = make_episodes(engine, config, setup, samples, is_interrupted)
    else:
        made = engine()
    return Rollouts(
        config,
        mesh.data,
        engine=made,
        prompts=prompts,
        reward=reward,
        **_own_fields(config.policy.model, tokenizer),
        is_interrupted=is_interrupted,
        on_progress=on_progress,
        routing=sampled_routing(config),
    )


def _own_fields(model: Path, tokenizer: Any) -> dict[str, Any]:
    """Return the fields of Rollouts that belong to the model."""
    return {
        "stop_ids": stop_ids(model, tokenizer),
        "vocab_size": of_text(read_config(model)).get("vocab_size"),
    }


def _decoder(tokenizer: Any) -> Decoder:
    return Decoder(
        lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)), decoder_json(tokenizer)
    )


def make_engine(config: Config, mesh: Mesh, is_interrupted: Callable[[], bool]) -> Engine:
    """Make the engine that engine.kind names.

    Servers are up when it returns, and have released the memory they share with the trainer.

    Raises:
        ConfigError: engine.sglang is not what SGLang understands, or a server does not start.
        Interrupted: the run is to stop while a server starts.
        EngineError: a server does not report what it is, or keeps its memory.
    """
    options = config.engine
    if options.kind == "embedded":
        model, dtype = config.policy.model, getattr(torch, config.policy.dtype)
        return EmbeddedEngine(model, dtype, mesh.device, options.max_concurrent, sampled_routing(config))
    servers = make_servers(config, say=lambda text: print(text, flush=True), is_interrupted=is_interrupted)
    servers.wait()
    if routing := sampled_routing(config):
        try:
            check_routes(servers.workers, routing)
        except ConfigError:
            servers.close()
            raise
    sync = make_sync(
        options.weight_sync,
        lambda: servers.workers,
        bucket_bytes=options.bucket_mib << 20,
        device=mesh.device,
        directory=config.run.dir / "weights",
        model=config.policy.model,
        timeout=options.limits.stop,
        verify=options.verify_weights,
    )
    vocab_size = of_text(read_config(config.policy.model))["vocab_size"]
    limits = options.limits
    engine = SGLangEngine(servers, sync, options.max_concurrent, limits, vocab_size, is_interrupted, routing)
    engine.release_memory()  # the policy needs it, from when it is built
    return engine


def load_sets(
    config: Config, tokenizer: Any, dates: Mapping[str, str] = NONE, turns: Turns = ONE_TURN
) -> tuple[dict[str, list[Prompt]], list[Summary]]:
    """Return the held-out problems of every set, by name, and what became of each file's rows.

    Rows that repeat (30 problems × 32 copies) are 30 problems; the summary says so.
    """
    data = config.eval.data
    paths = data if isinstance(data, dict) else {data.stem: data} if data else {}
    strict = config.data.model_copy(update={"too_long": "error"})
    loaded = {
        name: load_prompts(path, tokenizer, strict, config.reward, dates, turns)
        for name, path in paths.items()
    }
    sets = {name: prompts for name, (prompts, _) in loaded.items()}
    return sets, [summary for _, summary in loaded.values()]


def evaluate_models(config: Config, mesh: Mesh, models: list[Path]) -> None:
    """Evaluate Hugging Face directories on the sets of eval.data; write <run.dir>/eval.json. Only the main
    rank does.

    Each has its own sizes, tokenizer and stop tokens. Each after the first is compared with the first,
    problem by problem.

    Raises:
        ConfigError: no eval.data, or a directory cannot be used, or not by the servers of engine.urls.
        EngineError: the engine failed, or its servers died too often with one model.
    """
    if not config.eval.data:
        raise ConfigError("eval.data is not set: name a file, or {name: file} for several")
    set_gpu_environment(config)
    if not mesh.is_main:
        return
    configs = [_with_model(config, model) for model in models]
    tokenizers = [load_tokenizer(model) for model in models]
    for own, tokenizer in zip(configs, tokenizers, strict=True):
        check_vocabulary(own.policy.model, tokenizer)
        check_length(own)
    turns = turns_of(config)
    loaded = [
        load_sets(own, tokenizer, NONE, turns) for own, tokenizer in zip(configs, tokenizers, strict=True)
    ]
    if config.engine.urls:
        for model in models:
            _check_served(config.policy.model, model)
    _say(config, loaded[0][1])
    results: dict[str, dict[str, evaluate.Scores]] = {}
    rollouts = None
    try:
        for own, tokenizer, (sets, _) in zip(configs, tokenizers, loaded, strict=True):
            model = own.policy.model
            # a chat template belongs to the workers that play with it
            if rollouts and (config.rollout.has_turns or differences(rollouts.config.policy.model, model)):
                rollouts.close()
                rollouts = None
            if rollouts:
                rollouts.reward.decode_with(_decoder(tokenizer))
                rollouts = replace(rollouts, config=own, **_own_fields(model, tokenizer))
            else:
                none = PromptStream([], config.run.seed)
                problems = [prompt for prompts in sets.values() for prompt in prompts]
                reward = make_reward(own, tokenizer)
                rollouts = make_rollouts(own, mesh, tokenizer, none, problems, reward, turns)
            results[str(model)] = _evaluate(rollouts, sets)
            for name, scores in results[str(model)].items():
                print(f"{model}  {name}: {scores}", flush=True)
    finally:
        if rollouts:
            rollouts.close()
    for later, comparisons in evaluate.write(results, config.run.dir / "eval.json").items():
        for name, found in comparisons.items():
            print(f"{later} against {models[0]}  {name}: {found}")


def _with_model(config: Config, model: Path) -> Config:
    return config.model_copy(update={"policy": config.policy.model_copy(update={"model": model})})


def _check_served(served: Path, model: Path) -> None:
    """Raise ConfigError if servers of another model cannot compute this one with its weights."""
    if differ := differences(served, model):
        raise ConfigError(
            f"--model {model} differs from policy.model={served}, which the servers of engine.urls hold, in "
            f"{', '.join(differ)}: evaluate it on servers of its own"
        )


def _evaluate(rollouts: Rollouts, sets: dict[str, list[Prompt]]) -> dict[str, evaluate.Scores]:
    """Load policy.model and evaluate it; if all servers died and some restart, load it and begin again."""
    model = rollouts.config.policy.model
    return with_retries(
        lambda: evaluate.run(rollouts, sets, f"evaluating {model}"),
        lambda: rollouts.load_weights(_weights(model), version=0),
        is_loaded=False,
    )


def _weights(model: Path) -> Iterator[tuple[str, Tensor]]:
    """Return a model's tensors, checked if its architecture is known: an engine may know others too."""
    try:
        shape = read_shape(model)
    except ConfigError:
        return stored_weights(model)
    return hf_tensors(open_weights(model, shape), shape, dtype=None)
