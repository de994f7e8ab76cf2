"""The main rank's side, put together from a config: prompts, reward, engine, held-out sets; and `dapo eval`,
which needs nothing else.
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
from dapo.files import write_text
from dapo.mesh import Mesh
from dapo.model.files import stored_weights
from dapo.model.tokenizer import load_tokenizer, stop_ids
from dapo.plan import semantics
from dapo.reward.pool import Reward
from dapo.rollout import evaluate
from dapo.rollout.prompts import PromptStream, Summary, digest, load_prompts, load_stream
from dapo.rollout.rollouts import Rollouts, RolloutsElsewhere
from dapo.types import Engine, Prompt


def make_rollouts(
    config: Config, mesh: Mesh, is_interrupted: Callable[[], bool] = lambda: False
) -> tuple[Rollouts | RolloutsElsewhere, dict[str, list[Prompt]]]:
    """The sampler's side, and the held-out sets: on the main rank. Elsewhere what takes part in the weight
    sync, and no sets.

    Raises:
        ConfigError, FailedElsewhere: the tokenizer, a data file or the reward function cannot be used.
    """
    made = mesh.on_main_only(_make_rollouts, config, mesh, is_interrupted)
    return made if made else (RolloutsElsewhere(), {})


def _make_rollouts(
    config: Config, mesh: Mesh, is_interrupted: Callable[[], bool]
) -> tuple[Rollouts, dict[str, list[Prompt]]]:
    tokenizer = load_tokenizer(config.policy.model)
    prompts, summaries = load_stream(config.data, tokenizer, config.run.seed)
    sets, more = load_sets(config, tokenizer)
    for summary in summaries + more:
        print(summary, flush=True)
    found = semantics.manifest(config, digest(prompts.prompts))
    for change in semantics.keep(found, config.run.dir / "semantics.json"):
        print(f"warning: {change}", file=sys.stderr, flush=True)
    write_text(
        config.run.dir / "data.json", json.dumps([asdict(s) for s in summaries + more], indent=1, default=str)
    )
    return build_rollouts(config, mesh, tokenizer, prompts, is_interrupted), sets


def build_rollouts(
    config: Config,
    mesh: Mesh,
    tokenizer: Any,
    prompts: PromptStream,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Rollouts:
    rollouts = Rollouts(
        config,
        mesh.data,
        engine=make_engine(config, mesh, is_interrupted),
        prompts=prompts,
        reward=Reward(config.reward, config.rollout.max_response_length, config.run.dir / "disputes.jsonl"),
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
        stop_ids=stop_ids(config.policy.model, tokenizer),
    )
    rollouts.is_interrupted = is_interrupted
    return rollouts


def make_engine(config: Config, mesh: Mesh, is_interrupted: Callable[[], bool]) -> Engine:
    """The sampler that engine.kind names; servers are up when it returns, and have given up what memory they
    share with the trainer.

    Raises:
        ConfigError: engine.sglang is not what SGLang understands, or a server does not start.
        Interrupted: while waiting for one.
        EngineError: one does not say what it is, or keeps its memory.
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
    engine = SGLangEngine(servers, sync, options.max_concurrent, options.limits, is_interrupted)
    engine.release_memory()  # the policy needs it, from when it is built
    return engine


def load_sets(config: Config, tokenizer: Any) -> tuple[dict[str, list[Prompt]], list[Summary]]:
    """The held-out problems of every set, by name. Rows that repeat (30 problems × 32 copies) are 30
    problems; the summary says so.
    """
    data = config.eval.data
    paths = data if isinstance(data, dict) else {data.stem: data} if data else {}
    options = config.data.model_copy(update={"too_long": "error"})
    loaded = {name: load_prompts(path, tokenizer, options) for name, path in paths.items()}
    return {name: prompts for name, (prompts, _) in loaded.items()}, [
        summary for _, summary in loaded.values()
    ]


def evaluate_models(config: Config, mesh: Mesh, models: list[Path]) -> None:
    """Evaluate Hugging Face directories on the sets of eval.data; each later one is compared with the first,
    problem by problem.

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
        rollouts.load_weights(stored_weights(model), version=0)
        results[str(model)] = evaluate.run(rollouts, sets, config, f"evaluating {model}")
        for name, scores in results[str(model)].items():
            print(f"{model}  {name}: {scores}", flush=True)
    for later, comparisons in evaluate.write(results, config.run.dir / "eval.json").items():
        for name, c in comparisons.items():
            print(
                f"{later} against {models[0]}  {name}: {c['difference']:+.3f} ± {c['half_width']:.3f}, p = "
                f"{c['p_value']:.2g}"
            )
    rollouts.close()
