"""The model card of what a run exports: README.md as Hugging Face shows it, from the run's own record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dapo.config import Config, plain_yaml


def card(
    config: Config,
    manifest: Mapping[str, Any],
    rows: Sequence[dict[str, Any]],
    is_best: bool,
    has_curves: bool,
) -> str:
    """Return the card of the model after the last row's step.

    `manifest`: semantics.json's (see dapo/plan/semantics.py). `rows`: metrics by step, as in metrics.jsonl.
    `is_best`: run.keep_best is larger than at any step before.
    """
    step, run = rows[-1]["step"], config.run
    name, _, commit = next(iter(manifest["hub"].get("policy.model", ())), "").partition("@")
    about = {"base_model": name} if name else {}
    about |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head = plain_yaml.dump(about | {"tags": ["dapo", "reinforcement-learning"]})
    base = f"[{name}](https://huggingface.co/{name}/tree/{commit})" if name else f"`{config.policy.model}`"
    versions = ", ".join(f"{package} {version}" for package, version in manifest["versions"].items())
    lines = [
        f"---\n{head}---",
        f"# {run.dir.name}, step {step}",
        f"{base} after {step} of {run.steps} steps of reinforcement learning by DAPO "
        "([arXiv:2503.14476](https://arxiv.org/abs/2503.14476)).",
    ]
    if is_best:
        value = rows[-1][str(run.keep_best)]
        lines += [f"`{run.keep_best}` is {value:.4g}, more than at any step evaluated before."]
    if evaluated := [row for row in rows if "eval/accuracy" in row]:
        lines += [f"## Evaluation\n\n{_evaluation(config, evaluated[-1])}"]
    if has_curves:
        lines += ["## Training\n\n![The run's metrics by step](curves.png)"]
    lines += [
        f"## Configuration\n\n{versions}; hash of the training prompts: {manifest['prompts']}.",
        f"```yaml\n{config.dump()}```\n",
    ]
    return "\n\n".join(lines)


def _evaluation(config: Config, row: dict[str, Any]) -> str:
    """Return a table of an evaluation's metrics."""
    settings = config.eval
    how = f"{settings.samples} samples a problem, temperature {settings.temperature}, top-p {settings.top_p}"
    found = [f"| `{name}` | {value:.4g} |" for name, value in row.items() if name.startswith("eval/")]
    return "\n".join(
        [
            f"Held-out problems after step {row['step']}: {how}.\n",
            "| metric | value |",
            "| --- | --- |",
            *found,
        ]
    )
