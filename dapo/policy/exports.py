"""Hugging Face directories of a run: hf at its end, hf-step-000050 … and hf-best as its options ask.

Each has a model card, the curves up to its step, and export.json: the step, and its evaluation's metrics. A
step that comes again, after a resume, replaces its own. What the best was so far is read from hf-best.
"""

from __future__ import annotations

import io
import json
import sys

from dapo import config as configs
from dapo.config import Config
from dapo.policy.megatron import Policy
from dapo.policy.weight_files import EXPORT
from dapo.report import curves
from dapo.report.card import card
from dapo.types import reason


def export(step: int, policy: Policy, scores: dict[str, float]) -> None:
    """Write the directories that are due after `step` steps. `scores`: of their evaluation. Collective."""
    run, mesh = policy.config.run, policy.mesh
    is_best = run.keep_best in scores and mesh.on_main(is_larger, run, scores)
    due = {
        f"hf-step-{step:06}": bool(run.export_every and step and step % run.export_every == 0),
        "hf-best": is_best,
        "hf": step == run.steps,
    }
    if any(due.values()):
        beside = mesh.on_main_only(record, policy.config, step, scores, is_best) or {}
        for name in filter(due.get, due):
            policy.save_hf(run.dir / name, beside)


def is_larger(run: configs.Run, scores: dict[str, float]) -> bool:
    """Return True if run.keep_best is larger than that of hf-best, or there is none."""
    path, metric = run.dir / "hf-best" / EXPORT, str(run.keep_best)
    try:
        best = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        return metric not in best or scores[metric] > best[metric]
    except FileNotFoundError:
        return True
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(
            f"warning: {path} is damaged ({reason(error)}): hf-best is replaced", file=sys.stderr, flush=True
        )
        return True


def record(config: Config, step: int, scores: dict[str, float], is_best: bool) -> dict[str, bytes]:
    """Return the files beside the model: its card, its metrics and, if they can be plotted, the curves."""
    folder = config.run.dir
    rows = [row for row in curves.read(folder / "metrics.jsonl") if row["step"] < step]
    rows.append({"step": step} | scores)
    manifest = json.loads((folder / "semantics.json").read_text(encoding="utf-8"))
    found = {EXPORT: json.dumps({"step": step, "metrics": scores}, indent=1).encode()}
    image = io.BytesIO()
    try:
        curves.plot({folder.name: rows}, image)
        found["curves.png"] = image.getvalue()
    except Exception as error:  # noqa: BLE001  # another's code, and a run can do without a picture
        print(f"warning: curves.png failed: {reason(error)}", file=sys.stderr, flush=True)
    text = card(config, manifest, rows, is_best, "curves.png" in found)
    return found | {"README.md": text.encode()}
