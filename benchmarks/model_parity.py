"""Each architecture with other layers, in twelve layouts, against transformers' own: the largest gaps.

python benchmarks/model_parity.py

float32, tiny random models; what is compared: tests/distributed/parity.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import ROOT, heading, save, table

sys.path.insert(0, str(ROOT))
from tests.distributed.cases import ALL_LAYOUTS, NEW


def measure() -> dict[str, dict[str, Any]]:
    """Return what parity.py measured, by name of the case."""
    found = {}
    for world in (1, 2, 4):
        pattern = "|".join(f"^{case.name}$" for case in ALL_LAYOUTS if case.world == world)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.json"
            module = ["-m", "tests.distributed.forked", str(world), "tests.distributed.parity"]
            subprocess.run([sys.executable, *module, str(out), pattern], check=True, cwd=ROOT)
            found |= {result["name"]: result for result in json.loads(out.read_text())}
    return found


def main() -> None:
    found, rows = measure(), []
    for model in NEW:
        results = [found[case.name] for case in ALL_LAYOUTS if case.model == model]
        norms = [abs(a - b) / b for result in results for a, b in result["grad_norms"]]
        gaps = (
            max(result["logprobs"] for result in results), max(result["gradients"] for result in results),
            max(result["worst gradient"][0] for result in results), max(norms),
            max(result["params"] for result in results),
        )  # fmt: skip
        is_exact = all(result["round_trip"] and result["ratio"] == 0.0 for result in results)
        rows.append([model, len(results), *(f"{gap:.1e}" for gap in gaps), "yes" if is_exact else "no"])
    text = heading("Architectures with other layers against transformers' own")
    text += (
        "\nThe largest of all layouts: difference of a log-prob; "
        "norm of the gradients' difference, relative; "
        "difference of a parameter's gradient, relative to its largest value; difference of three updates' "
        "gradient norms, relative; difference of a parameter after them (learning rate 1e-3). Exact: weights "
        "that came through the policy are the same to the bit, and the first minibatch's ratios are 1.\n\n"
    )
    header = [
        "model_type",
        "layouts",
        "log-probs",
        "gradients",
        "worst gradient",
        "norms",
        "parameters",
        "exact",
    ]
    text += table(header, rows)
    text += "\nLayouts:\n\n"
    text += "\n".join(
        f"- {case.name.replace(case.model + '-', '')}"
        for case in ALL_LAYOUTS
        if case.model == next(iter(NEW))
    )
    save("model_parity.md", text + "\n")


if __name__ == "__main__":
    main()
