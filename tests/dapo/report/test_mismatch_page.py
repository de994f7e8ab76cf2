"""What the page shows of the sampler's distance from the trainer: buckets, alarms and their threshold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dapo.__main__ import main
from dapo.report import page
from tests.dapo.report.builders import data_of, make_run
from tests.dapo.report.test_page import in_a_browser, open_page, words


def make_mismatch_run(directory: Path, jump: float = 0.002) -> Path:
    """Thirty steps; the long responses come later, and at step 20 the mismatch jumps."""
    run, rows = make_run(directory, steps=0), []
    for step in range(30):
        size = jump if step >= 20 else 0.002
        rows.append({"step": step, "policy/mismatch": size, "policy/mismatch_threshold": 0.006})
        for place in (0, 64, 1024)[: 2 + (step > 5)]:
            rows[-1] |= {f"policy/mismatch_at_{place}": size, f"policy/mismatch_p99_at_{place}": 9 * size}
        for i, bound in enumerate(("0", "-0.01", "-3")):
            name = f"logprob_{bound}"
            rows[-1] |= {f"policy/mismatch_{name}": size * 10**i, f"policy/mismatch_p99_{name}": size * 20**i}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_alarms_of_the_run_are_on_the_page_and_printed(tmp_path: Path, capsys: Any) -> None:
    runs = [make_mismatch_run(tmp_path / "sick", 0.05), make_mismatch_run(tmp_path / "well")]
    assert main(["report", *map(str, runs)]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"warning: {runs[0]}: step 20: |old − behavior| is 0.05, 25 times what the first 10"
    )
    sick, well = data_of(runs[0] / "report.html")["runs"]
    assert sick["warnings"] == [line.removeprefix("warning: ")] and well["warnings"] == []


@in_a_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_line_for_each_bucket_is_drawn_and_the_threshold_where_it_is_in_sight(
    tmp_path: Path, width: int
) -> None:
    runs = [make_mismatch_run(tmp_path / "sick", 0.05), make_mismatch_run(tmp_path / "well")]
    for run in runs:
        page.write([run], None, 0)
    script = "$('more').open = true; build();"
    script += "document.body.dataset.width = document.documentElement.scrollWidth + ' ' + innerWidth;"
    dom, complaints = open_page(runs[0] / "report.html", script=script, width=width)
    assert complaints == []
    content, window = map(int, re.search(r'data-width="(\d+) (\d+)"', dom).groups())  # type: ignore[union-attr]
    assert content <= window
    shown = words(dom, "mismatch")
    assert "mean by place in the response (|Δ log p|)from 0: 0.05from 64: 0.05from 1024: 0.05" in shown
    assert "tail by log-prob (|Δ log p|)≤ 0: 0.05≤ -0.01: 1≤ -3: 20" in shown
    assert "mismatch_at" not in words(dom, "others") and "alarm above 0.006" in words(dom, "curves")
    panels = dom.split('id="mismatch"')[1].split('class="panel card"')[1:5]
    assert [panel.split("</svg></svg>")[0].count('class="curve"') for panel in panels] == [3, 3, 3, 3]
    colors = re.findall(r'class="curve" d="[^"]*" style="stroke: ?([^"]*)"', panels[0])
    assert len(set(colors)) == 3
    [limit] = re.findall(r'class="curve limit" d="M[\d.]+ ([-\d.]+)L', dom)
    assert 8 < float(limit) < 170
    dom, _ = open_page(runs[1] / "report.html", width=width)
    [limit] = re.findall(r'class="curve limit" d="M[\d.]+ ([-\d.]+)L', dom)
    assert float(limit) < 0, "the curve keeps its scale"


@in_a_browser
def test_a_run_without_buckets_has_no_part_for_them(tmp_path: Path) -> None:
    page.write([make_run(tmp_path / "run")], tmp_path / "page.html", 0)
    dom, complaints = open_page(tmp_path / "page.html")
    assert complaints == [] and re.search(r'<section id="apart" hidden', dom)
