"""benchmarks/crash_test.py in small: ten kills, five of a run that samples ahead, and the ranks forked from
one process, so that torch and Megatron are imported once.

python -m tests.distributed.crashes OUT.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.distributed.launch import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import crash_test

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        exact = crash_test.crash(Path(directory), 10, 0, "tensor", crash_test.Forked)
    with tempfile.TemporaryDirectory() as directory:
        ahead = crash_test.crash_ahead(Path(directory), 5, 0, "data", crash_test.Forked, max_staleness=2)
    ages = [*ahead.pop("groups")[-1].ages]
    for found in (exact, ahead):
        found["kills"] = [asdict(kill) for kill in found["kills"]]
    Path(sys.argv[1]).write_text(json.dumps({"exact": exact, "ahead": ahead | {"ages": ages}}))
