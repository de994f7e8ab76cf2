"""A run on pretended GPUs mixes no devices, in any layout, as run.py found. Planted faults are found."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dapo.engine.broadcast import Broadcast, _Group
from dapo.types import EngineError
from tests.distributed.launch import measured
from tests.pretend_cuda.cases import CASES, FAULTS
from tests.pretend_cuda.gpu import Work
from tests.pretend_cuda.report import Finding, is_found


def result_of(name: str) -> dict[str, Any]:
    return measured("tests.pretend_cuda.run", 2)[name]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_a_run_on_gpus_mixes_no_devices(name: str) -> None:
    result = result_of(name)
    assert result["findings"] == []
    assert min(result["operations"]) > 1000, "on each rank"
    assert result["updates"] and result["saved"], "nothing was tested"
    assert result["mismatch"] < 0.1, "the engine samples with what servers received"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    found = [Finding(*finding[:3]) for finding in result_of("faults")["findings"]]
    assert is_found(found, *FAULTS[fault])


def test_a_broadcast_over_nccl_ends_well_or_with_its_error() -> None:
    transport = Broadcast(1000, 5.0, torch.device("cuda"))
    transport.peers = [SimpleNamespace(server=SimpleNamespace(url="http://server"))]  # type: ignore[list-item]
    good, bad = (_Group("group", None, Future()) for _ in range(2))
    good.work.set_result(Work())  # type: ignore[union-attr, arg-type]
    bad.work.set_result(Work("remote process exited\nat line 7"))  # type: ignore[union-attr, arg-type]
    transport._finish(good)
    assert good.work is None, "it would keep the bucket's memory"
    with pytest.raises(EngineError, match=r"weights to http://server: remote process exited$"):
        transport._finish(bad)
