"""The glossary knows every metric that a run logs, and everything that shows metrics knows the glossary."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from dapo.log import Console
from dapo.report import curves, glossary, page
from dapo.report.glossary import Column, parse
from tests.dapo.report.builders import data_of, make_row, make_run

ROOT = Path(__file__).parents[3]
PREFIXES = "|".join({metric.name.partition("/")[0] for metric in glossary.METRICS} - {"step"})


def names_in_the_source() -> set[str]:
    """Keys of dicts that look like metrics, with <x> for what an f-string fills in; and the timed phases."""
    names = set()
    for path in (ROOT / "dapo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict):
                names |= {text_of(key) for key in node.keys}
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                names.add(text_of(node.slice))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("timed", "clock.timed"):
                names.add(f"time/{text_of(node.args[0])}")
    return {name for name in names if re.fullmatch(rf"({PREFIXES})/(<x>[/_])?\w+(<x>)?", name)}


def families_in_the_source() -> set[str]:
    """Names that an f-string ends with a word of the same file: f"policy/{name}" and "loss" → policy/loss."""
    names = set()
    for path in (ROOT / "dapo").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        heads = {text_of(node) for node in nodes if isinstance(node, ast.JoinedStr)}
        words = {
            node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        heads = {head for head in heads if re.fullmatch(rf"({PREFIXES})/(<x>/)?<x>", head)}
        names |= {head.removesuffix("<x>") + word for head in heads for word in words}
    return names


def text_of(node: ast.expr | None) -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "<x>" for part in parts)


def test_names_are_found_in_the_source():
    assert {
        "rollout/reward",
        "eval/<x>/mean",
        "perf/tokens_per_second",
        "time/update",
    } <= names_in_the_source()


def test_every_metric_that_the_program_computes_is_in_the_glossary():
    assert [name for name in names_in_the_source() if not glossary.find(name)] == []


@pytest.mark.parametrize("run", sorted(ROOT.glob("tests/fixtures/*/*/run")), ids=lambda run: run.parent.name)
def test_every_metric_of_a_real_run_is_in_the_glossary(run):
    rows = curves.read(run / "metrics.jsonl")
    assert rows and [name for row in rows for name in row if not glossary.find(name)] == []


def test_the_glossary_describes_no_metric_that_the_program_does_not_compute():
    computed = names_in_the_source() | families_in_the_source() | {"step", "time/<x>"}
    # an evaluation's reward counts are those of a step
    computed |= {name.replace("reward/", "eval/<x>/") for name in computed if name.startswith("reward/")}
    assert [m.name for m in glossary.METRICS if re.sub("<[a-z]+>", "<x>", m.name) not in computed] == []
    assert not {"policy/nothing", "eval/<x>/accuracy", "rollout/loss"} & computed


def test_no_metric_is_described_twice_and_no_place_taken_twice():
    names = [metric.name for metric in glossary.METRICS]
    assert len(set(names)) == len(names)
    assert [column.place for column in glossary.columns().values()] == list(range(1, 12))
    assert [metric.monitor for metric in glossary.monitors()] == list(range(1, 7))


def test_a_name_of_its_own_goes_before_a_pattern():
    assert glossary.find("time/step").curve and not glossary.find("time/weeding").curve
    assert glossary.find("eval/aime/2024/pass").name == "eval/<set>/pass"
    assert glossary.find("eval/pass") is None and glossary.find("xtime/step") is None


def test_columns_keep_their_width():
    assert Column(1, "x", "8.3f").text(1 / 3) == "   0.333" and Column(1, "x", "8.3f").text(None) == " " * 8


def test_every_line_of_the_table_is_read():
    lines = [line for line in glossary.TABLE.read_text().splitlines() if line.startswith("|")]
    assert len(glossary.METRICS) == len(lines) - 2 > 50
    assert glossary.find("policy/mismatch").unit == "|Δ log p|"
    assert all(metric.meaning for metric in glossary.METRICS)


def test_the_guide_quotes_lines_that_exist():
    guide = (ROOT / "docs/add_a_metric.md").read_text()
    quoted = re.findall(r"```\w+\n(.*?)```", guide, re.DOTALL)
    files = [ROOT / "dapo/reward/pool.py", glossary.TABLE]
    for lines, file in zip(quoted, files, strict=True):
        assert str(file.relative_to(ROOT)) in guide and lines in file.read_text()


def test_the_table_is_read_without_torch():
    code = "import sys, dapo.report.glossary; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_metric_that_is_added_to_the_table_is_shown_everywhere(tmp_path, capsys, monkeypatch):
    toy = parse(
        "| `rollout/toys` | toys | Toys \\| a step. | some | none | 15 `toys` `6.2f` | toys | 7 | 0..2.5 |"
    )
    monkeypatch.setattr(glossary, "METRICS", [*glossary.METRICS, toy])
    console = Console()
    console.row(make_row(0) | {"rollout/accuracy": 0.5, "rollout/toys": 2.5}, 40, 0)
    assert capsys.readouterr().out.endswith(" toys=2.50 left=0s\n")

    run = make_run(tmp_path / "run", steps=0)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "rollout/toys": 2.5}) + "\n")
    page.write([run], tmp_path / "page.html", 0)
    described = data_of(tmp_path / "page.html")["metrics"]["rollout/toys"]
    assert described == {
        "curve": "toys",
        "unit": "toys",
        "meaning": "Toys | a step.",
        "healthy": "some",
        "sick": "none",
        "band": [0.0, 2.5],
    }
    assert glossary.monitors()[-1].title == "toys (toys)" and (tmp_path / "page.png").exists()


def test_the_documentation_has_the_metrics_of_this_code() -> None:
    remedy = "dapo metrics --markdown > docs/metrics.md"
    text = glossary.markdown()
    assert (ROOT / "docs/metrics.md").read_text() == text, remedy
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    names = [metric.name for metric in glossary.METRICS if metric.name != "step"]
    assert sorted(row.split("`")[1] for row in rows) == sorted(names)
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}


def test_monitors_are_drawn_over_steps(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    curves.plot({"run": [{"step": 0, "reward/mean": 0.5}]}, tmp_path / "page.png")
    assert {axes.get_xlabel() for axes in drawn[0].axes} == {"step"}
    assert '<option value="step">steps</option>' in (ROOT / "dapo/report/page.html").read_text()
