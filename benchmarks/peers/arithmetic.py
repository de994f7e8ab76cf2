"""The arithmetic example: its task as a file, and the held-out accuracy of saved weights, by dapo's own code.

python -m peers.arithmetic task SEED STEPS EVERY FOLDER [options of a trainer]
python -m peers.arithmetic accuracy SEED FOLDER
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples/arithmetic/config.yaml"


def make(seed: int, overrides: list[str], directory: str) -> tuple[Any, Any, Any, Any]:
    """Return config, mesh, rollouts and held-out sets of the example's run."""
    import torch

    from dapo import config as configs
    from dapo.assemble import make_sampler
    from dapo.mesh import Mesh

    torch.set_num_threads(1)
    options = [f"run.seed={seed}", f"run.dir={directory}", "reward.workers=0", *overrides]
    config = configs.load(CONFIG, options)
    mesh = Mesh(config.parallel)
    sampler, _ = make_sampler(config, mesh)
    return config, mesh, sampler.rollouts, sampler.sets


def accuracy(rollouts: Any, sets: Any, weights: Any) -> float:
    """Return the held-out accuracy, mean@4, of these weights."""
    from dapo.rollout import evaluate

    rollouts.load_weights(weights, version=0)
    [scores] = evaluate.run(rollouts, sets, "held-out").values()
    return float(scores.mean)


def task(seed: str, steps: str, every: str, folder: str, *options: str) -> dict[str, Any]:
    import transformers

    config, _, rollouts, _ = make(int(seed), [], f"{folder}/unused")
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.policy.model)
    stream, rollout, optim = rollouts.prompts, config.rollout, config.optim
    count = max(len(stream.prompts), rollout.prompts_per_step * int(steps))
    prompts = [stream.prompts[visit.index] for visit in stream.take(count)]
    return {
        "seed": int(seed),
        "steps": int(steps),
        "every": int(every),
        "folder": folder,
        "model": str(ROOT / config.policy.model),
        "prompts": [tokenizer.decode(prompt.tokens) for prompt in prompts],
        "answers": [prompt.answer for prompt in prompts],
        "prompts_per_step": rollout.prompts_per_step,
        "prompts_per_minibatch": optim.prompts_per_minibatch,
        "group_size": rollout.group_size,
        "max_tokens": rollout.max_response_length,
        "overlong_cache": config.reward.overlong_cache,
        "stop_ids": list(rollouts.stop_ids),
        "learning_rate": optim.lr,
        "weight_decay": optim.weight_decay,
        "clip_grad": optim.clip_grad,
        "options": list(options),
    }


def accuracies(seed: str, folder: str) -> list[float]:
    """Return the accuracy of each file of weights, in the order of steps."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as directory:
        _, _, rollouts, sets = make(int(seed), [], directory)
        files = sorted(Path(folder).glob("*.safetensors"))
        return [accuracy(rollouts, sets, load_file(path).items()) for path in files]


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    print(json.dumps(task(*arguments) if what == "task" else accuracies(*arguments)))
