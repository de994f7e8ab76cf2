"""benchmarks/crash_test.py in small: ten kills, and the ranks forked from one process, so that torch and
Megatron are imported once.

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
        found = crash_test.crash(Path(directory), 10, 0, "tensor", crash_test.Forked)
    Path(sys.argv[1]).write_text(json.dumps(found | {"kills": [asdict(kill) for kill in found["kills"]]}))
