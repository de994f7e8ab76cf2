"""What the page shows of predictive sampling: the record's calibration, and what was saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dapo.__main__ import main
from dapo.report import page, serve
from dapo.rollout import record
from dapo.rollout.forecast import Forecast, Rules
from tests.dapo.report.builders import data_of, make_row, make_run
from tests.dapo.report.test_page import in_a_browser, open_page, words

# tenth of the forecast → groups, expected mixed, found mixed
TENTHS = {1: (100.0, 15.0, 20.0), 6: (25.0, 15.0, 10.0)}


def make_forecast_run(directory: Path, is_on: bool = True) -> Path:
    """Three steps; the record is written whether or not the forecast is used."""
    run = make_run(directory)
    if is_on:
        more = [{"forecast/samples_saved": s, "groups/skipped": 4, "groups/stopped": 2} for s in (-5, 20, 30)]
        rows = [make_row(step) | each for step, each in enumerate(more)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = Forecast(10, Rules(8))
    known.asked[3] = 1
    for tenth, cells in TENTHS.items():
        known.of_mixed[tenth] = cells
    record.write(run / record.NAME, known, "digest")
    return run


def test_a_run_s_calibration_is_in_the_page(tmp_path: Path) -> None:
    runs = [make_forecast_run(tmp_path / "a"), make_run(tmp_path / "b")]
    page.write(runs, tmp_path / "page.html", 0)
    with_record, without = data_of(tmp_path / "page.html")["runs"]
    expected = [list(TENTHS.get(tenth, (0, 0, 0))) for tenth in range(10)]
    assert with_record["calibration"] == expected and without["calibration"] is None
    assert with_record["warnings"] == []


def change_its_metadata(path: Path) -> None:
    table = pq.read_table(path)
    metadata = table.schema.metadata
    metadata[record.ABOUT] = metadata[record.ABOUT].replace(b"of_mixed", b"of_fixed")
    pq.write_table(table.replace_schema_metadata(metadata), path)


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"PAR1 no more"), change_its_metadata],
    ids=["empty", "torn", "changed"],
)
def test_of_a_damaged_record_the_page_says_so_and_shows_the_rest(
    tmp_path: Path, capsys: Any, damage: Callable[[Path], object]
) -> None:
    run = make_forecast_run(tmp_path / "run")
    path = run / record.NAME
    damage(path)
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"warning: the page shows no calibration: {path} is damaged")
    data = data_of(run / "report.html")["runs"][0]
    assert data["calibration"] is None and data["columns"]["step"] == [0, 1, 2]
    assert len(data["warnings"]) == 1


def test_a_number_that_is_none_is_not_written_as_one(tmp_path: Path) -> None:
    run = make_forecast_run(tmp_path / "run")
    known = Forecast(10, Rules(8))
    known.of_mixed[0] = np.nan
    record.write(run / record.NAME, known, "digest")
    page.write([run], None, 0)
    assert data_of(run / "report.html")["runs"][0]["calibration"][0] == [None, None, None]


def test_a_served_page_is_made_again_when_the_record_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = serve.state([run])
    make_forecast_run(tmp_path / "run", is_on=False)
    (run / "metrics.jsonl").touch()
    assert serve.state([run]).split()[2] != before.split()[2] == "-"


def dots(dom: str) -> list[list[float]]:
    """x, y and radius of each dot of the calibration."""
    panel = dom.split('class="panel card calibration"')[1].split("</svg>")[0]
    found = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', panel)
    return [[float(value) for value in each] for each in found]


@in_a_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_calibration_and_savings_are_drawn(tmp_path: Path, width: int) -> None:
    runs = [make_forecast_run(tmp_path / "a"), make_forecast_run(tmp_path / "b", is_on=False)]
    page.write(runs, tmp_path / "page.html", 0)
    script = "document.body.dataset.width = document.documentElement.scrollWidth + ' ' + innerWidth;"
    dom, complaints = open_page(tmp_path / "page.html", "smooth=0.9", script, width)
    assert complaints == []
    content, window = map(int, re.search(r'data-width="(\d+) (\d+)"', dom).groups())  # type: ignore[union-attr]
    assert content <= window
    first, second, *others = dots(dom)
    assert others == [first, second], "of the other run: the same record"
    across = [float(x) for x in re.findall(r'x2="([\d.]+)"', dom.split("panel card calibration")[1])[:1]]
    span = across[0] - 50
    assert first == pytest.approx([50 + 0.15 * span, 170 - 0.2 * 158, 9], abs=0.2)
    assert second == pytest.approx([50 + 0.6 * span, 170 - 0.4 * 158, 5.5], abs=0.2), "a quarter of the area"
    shown = words(dom, "forecast")
    assert "mean distance 0.08" in shown, "10 of 125 groups"
    assert "saved so far (samples)45" in shown, "−5 + 20 + 30, however smooth the curves are"
    assert "prompts passed over (prompts)4" in shown and "groups stopped early (groups)2" in shown
    assert "saved by the forecast" not in words(dom, "curves")


@in_a_browser
def test_a_run_that_has_no_record_has_no_part_for_it(tmp_path: Path) -> None:
    for name, run in {
        "with": make_forecast_run(tmp_path / "a", is_on=False),
        "without": make_run(tmp_path / "b"),
    }.items():
        page.write([run], tmp_path / f"{name}.html", 0)
        dom, complaints = open_page(tmp_path / f"{name}.html")
        assert complaints == []
        is_hidden = bool(re.search(r'<section id="predictive" hidden', dom))
        assert is_hidden == (name == "without")
        assert words(dom, "forecast").count("saved") == 0
