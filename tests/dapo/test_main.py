"""The command's last line, when a run is stopped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dapo.mesh
import dapo.train
from dapo.__main__ import main
from dapo.types import EngineError, Interrupted

CONFIG = Path(__file__).parents[2] / "examples/arithmetic/config.yaml"


@pytest.mark.parametrize(
    ("stop", "is_saved", "status", "line"),
    [
        (Interrupted(), False, 130, "interrupted"),
        (Interrupted(), True, 130, "interrupted; saved in RUN, the same command goes on from there"),
        (EngineError("no server is left"), False, 1, "error: no server is left"),
        (
            EngineError("no server is left"),
            True,
            1,
            "error: no server is left; saved in RUN, the same command goes on from there",
        ),
    ],
)
def test_what_was_not_saved_is_not_said_to_be(
    stop: Interrupted,
    is_saved: bool,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def train(*_: Any) -> None:
        stop.is_saved = is_saved
        raise stop

    monkeypatch.setattr(dapo.mesh, "Mesh", lambda parallel: SimpleNamespace(is_main=True))
    monkeypatch.setattr(dapo.train, "train", train)
    assert main(["train", str(CONFIG), f"run.dir={tmp_path}"]) == status
    assert capsys.readouterr().err == line.replace("RUN", str(tmp_path)) + "\n"
