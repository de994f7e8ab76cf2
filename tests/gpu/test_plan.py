"""The plan's memory is compared with the peak of a GPU's allocator. make gpu-check"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]


@pytest.mark.parametrize("number", range(3))
def test_the_planned_peak_is_max_memory_allocated(number: int, tmp_path: Path) -> None:
    import plan_accuracy  # benchmarks/ is on the path of `make gpu-check`

    for row in plan_accuracy.measured(number, tmp_path):
        assert row["planned"] == pytest.approx(row["measured"], rel=0.15), row
