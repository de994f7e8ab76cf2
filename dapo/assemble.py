"""Put the parts together as a config says: prompts, reward, engine, held-out sets; for `dapo train` and `dapo
eval`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dapo.config import Config, ConfigError
from dapo.engine.embedded import EmbeddedEngine
from dapo.engine.fleet import make_servers
from dapo.engine.sglang import SGLangEngine
from dapo.engine.weight_sync import make_sync
from dapo.mesh import Mesh
from dapo.model.files import stored_weights
from dapo.model.layout import check_length
from dapo.model.shape import read_config
from dapo.model.tokenizer import check_vocabulary, load_tokenizer, stop_ids
from dapo.plan import semantics
from dapo.reward.pool import Reward
from dapo.rollout import evaluate
from dapo.rollout.data_files import Summary
from dapo.rollout.prompts import PromptStream, load_prompts, load_stream
from dapo.rollout.rollouts import Rollouts, read_state
from dapo.sampler import Sampler, with_retries
from dapo.types import Engine, Prompt


def make_sampler(
    config: Config,
    mesh: Mesh,
    resumed: Path | None = None,
    is_interrupted: Callable[[], bool] = lambda: False,
    on_progress: Callable[[str], None] = lambda text: None,
) -> tuple[Sampler, dict[str, str]]:
    """Make every rank's Sampler. Collective; the parts that sample are on the main rank.

    `resumed`: the checkpoint that the run goes on from. Also returns, on the main rank, the files of the
    run's record by name: what became of the data, and what the run's numbers mean.

    Raises:
        ConfigError, FailedElsewhere: the tokenizer, a data file, the reward function or the engine cannot be
        used, or the checkpoint was made with other data. Nothing was written, and no server started.
    """

    def make() -> tuple[Sampler, dict[str, str]]:
        tokenizer = load_tokenizer(config.policy.model)
        check_vocabulary(config.policy.model, tokenizer)
        prompts, summaries = load_stream(config.data, tokenizer, config.run.seed, config.reward)
        sets, set_summaries = load_sets(config, tokenizer)
        if resumed:
            prompts.load_state_dict(read_state(resumed)["prompts"])
        record = _record(config, prompts.data, summaries + set_summaries)
        rollouts = make_rollouts(config, mesh, tokenizer, prompts, is_interrupted, on_progress)
        return Sampler(config, mesh, rollouts, sets), record

    return mesh.on_main_only(make) or (Sampler(config, mesh, None, {}), {})


def _record(config: Config, data: str, summaries: list[Summary]) -> dict[str, str]:
    """Print what became of the data, and what has changed since the run's record was written; return the
    new one.

    `data` is the hash of the training prompts.
    """
    for summary in summaries:
        print(summary, flush=True)
    found, path = semantics.manifest(config, data), config.run.dir / "semantics.json"
    for change in semantics.changes(found, path):
        print(f"warning: {change}", file=sys.stderr, flush=True)
    table = [asdict(summary) for summary in summaries]
    return {path.name: semantics.dump(found), "data.json": json.dumps(table, indent=1, default=str)}


def make_rollouts(
    config: Config,
    mesh: Mesh,
    tokenizer: Any,
    prompts: PromptStream,
    is_interrupted: Callable[[], bool] = lambda: False,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Rollouts:
    """Make the main rank's Rollouts, with the engine and the reward that the config names."""
    reward = Reward(  # first: an engine takes long to start
        config.reward,
        config.rollout.max_response_length,
        config.run.dir / "disputes.jsonl",
        is_interrupted,
    )
    return Rollouts(
        config,
        mesh.data,
        engine=make_engine(config, mesh, is_interrupted),
        prompts=prompts,
        reward=reward,
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
        stop_ids=stop_ids(config.policy.model, tokenizer),
        is_interrupted=is_interrupted,
        on_progress=on_progress,
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
        return EmbeddedEngine(
            config.policy.model, getattr(torch, config.policy.dtype), mesh.device, options.max_concurrent
        )
    servers = make_servers(config, say=lambda text: print(text, flush=True), is_interrupted=is_interrupted)
    servers.wait()
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
    vocab_size = read_config(config.policy.model)["vocab_size"]
    engine = SGLangEngine(servers, sync, options.max_concurrent, options.limits, vocab_size, is_interrupted)
    engine.release_memory()  # the policy needs it, from when it is built
    return engine


def load_sets(config: Config, tokenizer: Any) -> tuple[dict[str, list[Prompt]], list[Summary]]:
    """Return the held-out problems of every set, by name, and what became of each file's rows.

    Rows that repeat (30 problems × 32 copies) are 30 problems; the summary says so.
    """
    data = config.eval.data
    paths = data if isinstance(data, dict) else {data.stem: data} if data else {}
    strict = config.data.model_copy(update={"too_long": "error"})
    loaded = {name: load_prompts(path, tokenizer, strict, config.reward) for name, path in paths.items()}
    sets = {name: prompts for name, (prompts, _) in loaded.items()}
    return sets, [summary for _, summary in loaded.values()]


def evaluate_models(config: Config, mesh: Mesh, models: list[Path]) -> None:
    """Evaluate Hugging Face directories on the sets of eval.data; write <run.dir>/eval.json.

    Each model after the first is compared with the first, problem by problem.

    Raises:
        ConfigError: no eval.data, or a directory cannot be used.
    """
    tokenizer = load_tokenizer(config.policy.model)
    check_vocabulary(config.policy.model, tokenizer)
    check_length(config)
    sets, summaries = load_sets(config, tokenizer)
    if not sets:
        raise ConfigError("eval.data is not set: name a file, or {name: file} for several")
    rollouts = make_rollouts(config, mesh, tokenizer, PromptStream([], config.run.seed))
    results = {}
    for summary in summaries:
        print(summary)
    for model in models:

        def load(model: Path = model) -> None:
            rollouts.load_weights(stored_weights(model), version=0)

        def run(model: Path = model) -> dict[str, evaluate.Scores]:
            return evaluate.run(rollouts, sets, f"evaluating {model}")

        results[str(model)] = with_retries(run, load, is_loaded=False)
        for name, scores in results[str(model)].items():
            print(f"{model}  {name}: {scores}", flush=True)
    for later, comparisons in evaluate.write(results, config.run.dir / "eval.json").items():
        for name, found in comparisons.items():
            difference = f"{found['difference']:+.3f} ± {found['half_width']:.3f}, p = {found['p_value']:.2g}"
            print(f"{later} against {models[0]}  {name}: {difference}")
    rollouts.close()
