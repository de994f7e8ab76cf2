"""Accuracy on held-out problems: k samples each, mean@k (the paper's avg@32)."""

from __future__ import annotations

from dapo import config
from dapo.clock import timed
from dapo.rollout import Rollouts
from dapo.types import Prompt, Sampling

FIRST_GROUP = 1 << 60  # the ids of evaluation's groups: the same seeds at every evaluation, apart from training's


@timed("eval")
def maybe(step: int, rollouts: Rollouts, prompts: list[Prompt], options: config.Config) -> dict[str, float]:
    """Evaluate the weights the engine holds, if it is time to (every `eval.every` steps, and after the last); main rank only."""
    if not prompts or (step % options.eval.every and step != options.run.steps):
        return {}
    sampling = Sampling(options.eval.temperature, options.rollout.max_response_length, rollouts.stop_ids, options.eval.top_p)
    groups = rollouts.sample(prompts, options.eval.samples, sampling, FIRST_GROUP, f"evaluating step {step}")
    samples = [sample for group in groups for sample in group.samples]
    return {
        "eval/accuracy": sum(sample.is_correct for sample in samples) / len(samples),
        "eval/length": sum(sample.length for sample in samples) / len(samples),
        "eval/truncated": sum(sample.is_truncated for sample in samples) / len(samples),
    }
