"""The arithmetic example by dapo and by TRL's GRPOTrainer (loss_type="dapo"), in CPU seconds.

Both start from the same model, with the same problems, 16 prompts of 8 samples a step, four updates, the same
reward, one thread, and the recipe's optimizer. Held-out accuracy is measured by the same code, outside the
clock. Runs alternate, seed by seed. TRL as fast as it was found to be: sdpa, static cache, fused AdamW.

python benchmarks/beside_trl.py [seeds, default 5] [steps, default 40]
pip install -e ".[trl]" beforehand.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import heading, save, spread, table

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples/arithmetic/config.yaml"
EVERY, GOAL, WARM_UP = 5, 0.85, 3  # steps between evaluations; accuracy to reach; steps that do not count
KINDS = {  # name → overrides of the example's config; TRL has none
    "dapo, equal work": ["rollout.dynamic_sampling=false"],
    "dapo, as configured": [],
    "TRL": None,
}
Run = dict[str, list[float]]  # by step: cpu, tokens, signal; by evaluation: at, accuracy


class Clock:
    """CPU seconds of all threads, without those that are spent inside `paused`."""

    def __init__(self) -> None:
        self.run: Run = {name: [] for name in ("cpu", "tokens", "signal", "at", "accuracy")}
        self._start = time.process_time()

    def step(self, tokens: float, signal: float) -> None:
        """End a step that generated so many tokens, of which so many are in groups with a gradient."""
        self.run["cpu"].append(time.process_time() - self._start)
        self.run["tokens"].append(tokens)
        self.run["signal"].append(signal)
        self._start = time.process_time()

    def paused(self, accuracy: Callable[[], float]) -> None:
        self.run["at"].append(sum(self.run["cpu"]))
        self.run["accuracy"].append(accuracy())
        self._start = time.process_time()


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
    from dapo.rollout import evaluate

    rollouts.load_weights(weights, version=0)
    [scores] = evaluate.run(rollouts, sets, "held-out").values()
    return float(scores.mean)


def ours(seed: int, steps: int, overrides: list[str], directory: str) -> Run:
    from dapo.policy.megatron import Policy

    config, mesh, rollouts, sets = make(seed, overrides, directory)
    policy = Policy(config, mesh)
    clock = Clock()
    for step in range(steps + 1):
        if step % EVERY == 0:
            clock.paused(lambda: accuracy(rollouts, sets, policy.weights()))
        if step == steps:
            break
        rollouts.load_weights(policy.weights(), version=step)
        [share] = rollouts.next_batch(step)
        placed = policy.place(share.batch(config.parallel, 0))
        policy.score(placed)
        for minibatch in placed.minibatches:
            policy.update(minibatch)
        found = share.metrics
        signal = found["rollout/length_kept"] * found["groups/kept"] * config.rollout.group_size
        if not config.rollout.dynamic_sampling:
            signal = sum(
                float((m.advantages != 0).sum()) for minibatch in placed.minibatches for m in minibatch
            )
        clock.step(found["rollout/tokens"], signal)
    return clock.run


def theirs(seed: int, steps: int, directory: str) -> Run:
    import datasets
    import transformers
    import trl

    from dapo.reward.answer import is_correct
    from dapo.reward.overlong import soft_overlong_penalty

    config, _, rollouts, sets = make(seed, [], directory)
    rollout, clock = config.rollout, Clock()
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.policy.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.policy.model, dtype="float32", attn_implementation="sdpa"
    )
    count = rollout.prompts_per_step * steps
    stream = rollouts.prompts  # these are the prompts that our run asks first, too
    prompts = [stream.prompts[visit.index] for visit in stream.take(count)]
    rows = {"prompt": [tokenizer.decode(p.tokens) for p in prompts], "answer": [p.answer for p in prompts]}
    seen = {"tokens": 0.0, "signal": 0.0}

    def reward(
        prompts: Any, completions: Any, completion_ids: Any, answer: Any, **others: Any
    ) -> list[float]:
        ended = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
        marks = [e and is_correct(c, a) for e, c, a in zip(ended, completions, answer, strict=True)]
        lengths = [len(ids) for ids in completion_ids]
        size = rollout.group_size
        for start in range(0, len(marks), size):
            tokens = sum(lengths[start : start + size])
            seen["tokens"] += tokens
            seen["signal"] += tokens * (0 < sum(marks[start : start + size]) < size)
        limits = rollout.max_response_length, config.reward.overlong_cache
        pairs = zip(marks, lengths, strict=True)
        return [(1.0 if mark else -1.0) + soft_overlong_penalty(n, *limits) for mark, n in pairs]

    updates = rollout.prompts_per_step // config.optim.prompts_per_minibatch
    options: dict[str, Any] = dict(
        output_dir=f"{directory}/trl", seed=seed, use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.0, scale_rewards="group",
        num_generations=rollout.group_size, num_iterations=1, steps_per_generation=updates,
        per_device_train_batch_size=config.optim.prompts_per_minibatch * rollout.group_size,
        gradient_accumulation_steps=1, max_steps=updates * steps, shuffle_dataset=False,
        learning_rate=config.optim.lr, lr_scheduler_type="constant", optim="adamw_torch_fused",
        weight_decay=config.optim.weight_decay, max_grad_norm=config.optim.clip_grad,
        temperature=1.0, top_p=1.0, top_k=0, max_completion_length=rollout.max_response_length,
        cache_implementation="static", dataloader_pin_memory=False,
    )  # fmt: skip

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *arguments: Any, **others: Any) -> None:
            clock.paused(lambda: accuracy(rollouts, sets, model.named_parameters()))

        def on_step_end(self, arguments: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step % updates:
                return
            clock.step(seen["tokens"], seen["signal"])
            seen.update(tokens=0.0, signal=0.0)
            if state.global_step // updates % EVERY == 0:
                clock.paused(lambda: accuracy(rollouts, sets, model.named_parameters()))

    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=[reward],
        args=trl.GRPOConfig(**options),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    clock._start = time.process_time()
    trainer.train()
    return clock.run


def worker(kind: str, seed: int, steps: int) -> None:
    overrides = KINDS[kind]
    with tempfile.TemporaryDirectory() as directory:
        found = (
            theirs(seed, steps, directory) if overrides is None else ours(seed, steps, overrides, directory)
        )
    print(json.dumps(found))


def measured(kind: str, seed: int, steps: int) -> Run:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--worker", kind, str(seed), str(steps)]
    environment = os.environ | threads | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
    found: Run = json.loads(out.splitlines()[-1])
    return found


def until(run: Run) -> float:
    """CPU seconds until the held-out accuracy is GOAL, between two evaluations by a straight line."""
    pairs = list(zip(run["at"], run["accuracy"], strict=True))
    for (start, low), (end, high) in itertools.pairwise(pairs):
        if high >= GOAL:
            return start + (end - start) * max(0.0, GOAL - low) / max(high - low, 1e-9)
    return float("inf")


def figures(run: Run) -> dict[str, float]:
    cpu = run["cpu"][WARM_UP:]
    return {
        "CPU s a step": statistics.median(cpu),
        "µs per generated token": 1e6 * sum(cpu) / sum(run["tokens"][WARM_UP:]),
        "µs per token with signal": 1e6 * sum(cpu) / sum(run["signal"][WARM_UP:]),
        f"CPU s until accuracy {GOAL}": until(run),
        "accuracy at the end": run["accuracy"][-1],
    }


def main(seeds: int, steps: int) -> None:
    import transformers
    import trl

    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for seed in range(1, seeds + 1):
        for kind in KINDS:
            found[kind].append(figures(measured(kind, seed, steps)))
    rows = []
    for name in found["TRL"][0]:
        values = {kind: [each[name] for each in of_kind] for kind, of_kind in found.items()}
        cells = [spread(of_kind) for of_kind in values.values()]
        ratios = [
            spread([a / b for a, b in zip(values[kind], values["TRL"], strict=True)], 2)
            for kind in list(KINDS)[:2]
        ]
        rows.append([name, *cells, *ratios])
    text = heading("The arithmetic example beside TRL's GRPOTrainer")
    text += f"""
TRL {trl.__version__}, transformers {transformers.__version__}. {seeds} seeds, {steps} steps of
16 prompts × 8 samples and four updates. Median (min–max) over seeds, without the first {WARM_UP} steps;
ratios are of the same seed. “Equal work” takes 16 groups a step, as TRL does; “as configured” until 16 are
mixed. A token with signal is in a group in which some samples are right and some are not. Accuracy is mean@4
on 200 problems.

"""
    text += table(["", *KINDS, "equal work ÷ TRL", "as configured ÷ TRL"], rows)
    save("beside_trl.md", text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        numbers = [int(argument) for argument in sys.argv[1:]]
        main(*[*numbers, *[5, 40][len(numbers) :]])
