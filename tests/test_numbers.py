"""A measured number in a document stands beside a link to the file that holds it, and is that file's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributed.cases import CASES
from tests.test_words import DOCUMENTS, ROOT

UNIT = r"(?:s|ms|µs|seconds?|minutes?|hours?|[kMGT]i?B)\b|%"
WORD = r"half an?|one|two|three|four|five|six|seven|eight|nine|ten|a few|hundreds of"
MEASURED = re.compile(
    rf"(?P<number>\d[\d,.]*)(?= ?(?:(?:to|–|-) ?\d[\d,.]* ?)?(?:{UNIT}))"  # 31 to 33 seconds, 40–42 %
    rf"|\b(?:{WORD}) (?:{UNIT})|\b(?:{WORD}) percent"
    r"|(?<![\w.])(?P<times>\d[\d,.]*) times|\b1 / (?P<over>\d[\d.]*)"
    r"|\d combinations|10⁻|\ban? (?:third|quarter|fifth|eighth|tenth)\b"
    r"|(?<![\w.,])(?P<fraction>[01]\.\d+)(?![\d.]*\.\d|\w)"
)
HELD = re.compile(r"benchmarks/results/\w+\.(?:md|png)|tests/[\w/]+\.py|https?://\S+|arXiv:\d")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
WRITTEN = [path for path in DOCUMENTS if path.name not in ("config.md", "metrics.md")]  # those are generated

# (document, words beside the number): why no file holds it
EXCEPTIONS = {
    ("ARCHITECTURE.md", "5 ms (Python's switch interval)"): "Python's own default",
    ("CHANGELOG.md", "asks for its signal ten minutes"): "a setting of a script",
    ("CHANGELOG.md", "torchrun's ranks ten minutes"): "a setting of the scripts",
    ("CHANGELOG.md", "`reward.memory_limit`, 4 GiB"): "an option's value",
    ("CONTRIBUTING.md", "35 to 45 minutes"): "what CI takes on its machines, kept by CI alone",
    ("README.md", "35 to 45 minutes"): "the same",
    ("docs/tests_and_benchmarks.md", "35 to 45 minutes"): "the same",
    ("CONTRIBUTING.md", "in at most 4 minutes, all in at most 9"): "limits in benchmarks/gpu_check.py",
    ("README.md", "in at most nine minutes"): "the same",
    ("docs/tests_and_benchmarks.md", "in at most nine minutes"): "the same",
    ("docs/environments.md", "a wrong answer 0.05"): "a fact of reasoning-gym 0.1.25",
    ("docs/forecast.md", "with a chance of 0.3"): "an example",
    ("docs/forecast.md", "0.25 is what a coin gets"): "arithmetic",
    ("docs/forecast.md", "by 2 % a step"): "a constant of dapo/rollout/forecast.py",
    ("docs/kernels.md", "2400 MiB on a GPU"): "a default of dapo_kernels",
    ("docs/monitors.md", "or above 0.1 (tail: 1)"): "constants of dapo/report/alarm.py",
    ("docs/monitors.md", "likely tokens (0, -0.01)"): "the name of a metric",
    ("docs/monitors.md", "below about 1 %"): "advice",
    ("docs/monitors.md", "a few percent, not growing"): "advice",
    ("docs/monitors.md", "above 1.5"): "advice",
    ("docs/monitors.md", "95 % confidence interval"): "a definition",
    ("docs/scale.md", "It waits ten seconds"): "a constant of dapo/command/restart.py",
    ("docs/scale.md", "ten minutes before the time limit"): "a setting of the scripts",
    ("docs/troubleshooting.md", "to a fifth"): "advice: the paper's 4,096 of 20,480",
    ("examples/custom_reward/README.md", "a group of 0.2 and 0.9"): "an example",
    ("examples/qwen2.5_7b/README.md", "torchrun waits 30 seconds"): "torchrun's own default",
}
# (document, number) beside a link to a file that does not hold it
OTHERS = {
    ("examples/game/README.md", "35"): "a rate of make_base.py beside it",
    ("docs/objectives.md", "0.0003"): "GSPO's paper",
    ("docs/objectives.md", "0.0004"): "GSPO's paper",
    ("examples/recipes/README.md", "0.0003"): "an option's value",
    ("examples/recipes/README.md", "0.0004"): "an option's value",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def passages(text: str) -> list[tuple[str, str]]:
    """Return a document's paragraphs, list items and table rows, each with all that a reader sees beside it:
    of a row and of indented lines also the paragraphs before and after.
    """
    found: list[tuple[str, str]] = []
    blocks = [block for block in re.split(r"\n\s*\n", FENCE.sub("", text)) if block.strip()]
    for place, block in enumerate(blocks):
        if block.startswith(("|", "    ")):
            around = "\n".join([*blocks[max(place - 1, 0) : place], *blocks[place + 1 : place + 2]])
            found += [(row, f"{row}\n{around}") for row in block.splitlines()]
        else:
            items = re.split(r"\n(?=\s*(?:-|\d+\.) )", block)
            found += [(item, item) for item in items]
    return found


def measured_in(passage: str) -> list[re.Match[str]]:
    """Find measurements outside of code and of what links lead to: options' values and names are none."""
    return list(MEASURED.finditer(re.sub(r"`[^`\n]*`|\]\([^)]*\)", " … ", passage)))


def excepted(document: str, passage: str) -> bool:
    return any(name == document and words in passage for name, words in EXCEPTIONS)


def is_in(number: str, texts: list[str]) -> bool:
    """Is a figure of the texts this number, rounded as it is? A fraction may be in percent."""
    wanted = number.rstrip(".,").replace(",", "")
    half = 0.5 * 10.0 ** -len(wanted.partition(".")[2])
    figures = [float(figure.replace(",", "")) for text in texts for figure in NUMBER.findall(text)]
    figures += [100 * figure for figure in figures if figure <= 1]
    return any(abs(figure - float(wanted)) <= half + 1e-9 for figure in figures)


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_a_measured_number_names_the_file_that_holds_it(path: Path) -> None:
    for passage, seen in passages(path.read_text()):
        found = [match[0] for match in measured_in(passage)]
        assert not found or HELD.search(seen) or excepted(name_of(path), passage), (found, passage)


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_a_measured_number_is_in_that_file(path: Path) -> None:
    for passage, seen in passages(path.read_text()):
        results = [(ROOT / name).read_text() for name in re.findall(r"benchmarks/results/\w+\.md", seen)]
        if results and not excepted(name_of(path), passage):
            for match in measured_in(passage):
                number = match["number"] or match["times"] or match["over"] or match["fraction"]
                is_elsewhere = not number or (name_of(path), number) in OTHERS
                assert is_elsewhere or is_in(number, results), (number, passage)


def table_rows(text: str) -> list[tuple[str, dict[str, str]]]:
    """Return each row of a document's tables: its name, and its cells by their header; the first's is ""."""
    found: list[tuple[str, dict[str, str]]] = []
    for block in re.split(r"\n\s*\n", FENCE.sub("", text)):
        if block.startswith("|"):
            header, _, *rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in block.splitlines()]
            names = ["", *header[1:]]
            found += [(row[0], dict(zip(names, row, strict=True))) for row in rows]
    return found


def same_cells(name: str, shown: dict[str, str], rows: list[tuple[str, dict[str, str]]]) -> int | None:
    """Count the cells of a document's row that stand in the file's row of this name, below the same header,
    without what is in brackets or errors if the document leaves it out. None if one differs.
    """
    compared = [
        (cell, held[header])
        for other, held in rows
        if other == name
        for header, cell in shown.items()
        if header and header in held
    ]
    is_same = all(cell in (held, short(held)) or held.startswith(f"{cell} (") for cell, held in compared)
    return len(compared) if is_same else None


def short(cell: str) -> str:
    return re.sub(r" ± [\d.]+(?= \()", "", cell)


def test_a_table_of_the_evidence_is_cell_by_cell_that_of_its_file() -> None:
    path, counts = ROOT / "docs/evidence.md", []
    around = {row.split("|")[1].strip(): text for row, text in passages(path.read_text()) if row[0] == "|"}
    for name, shown in table_rows(path.read_text()):
        names = set(re.findall(r"benchmarks/results/\w+\.md", shown.get("where") or around[name]))
        rows = [row for file in names for row in table_rows((ROOT / file).read_text())]
        same = same_cells(name, shown, rows)
        assert same is not None, (name, shown)
        counts.append(same)
    claims, ladder, techniques, peers = [0] * 7, [3] * 6, [3] * 9, [5] * 4
    assert counts == [*claims, *ladder, *techniques, *peers], "a table's names are others"


def test_a_cell_that_differs_is_found() -> None:
    rows = [("a", {"": "a", "x": "0.5 ± 0.1 (0.3 to 0.7)", "y": "3 (1–4)"})]
    assert same_cells("a", {"": "a", "x": "0.5 (0.3 to 0.7)", "y": "3", "z": "9"}, rows) == 2
    assert same_cells("a", {"": "a", "x": "0.5 (0.3 to 0.8)"}, rows) is None
    assert same_cells("a", {"": "a", "y": "4"}, rows) is None
    assert same_cells("b", {"": "b", "x": "1"}, rows) == 0


def test_an_exception_is_of_a_number_that_is_there() -> None:
    for document, words in EXCEPTIONS:
        text = (ROOT / document).read_text()
        assert any(words in passage and measured_in(passage) for passage, _ in passages(text)), words
    for document, number in OTHERS:
        assert number in (ROOT / document).read_text()


def test_the_combinations_are_counted() -> None:
    said = [re.findall(r"(\d+) combinations", path.read_text()) for path in DOCUMENTS]
    assert {int(number) for numbers in said for number in numbers} == {len(CASES)}
    split = [case for case in CASES if case.model.startswith("qwen3_moe") and case.expert > 1]
    layouts = {(case.world, case.tensor, case.pipeline, case.context, case.expert) for case in split}
    assert len(layouts) == 8 and "eight layouts" in (ROOT / "examples/qwen3_30b_a3b/README.md").read_text()


def test_a_measured_number_without_a_file_is_found() -> None:
    for text in ("31 to 33 seconds", "40–42 % of them", "in two minutes", "2.8 GB", "0.85 of it", "1 / 1.5"):
        assert measured_in(text) and not HELD.search(text), text


def test_a_version_or_an_option_is_no_measurement() -> None:
    assert not measured_in("SGLang 0.5.23, `optim.lr=0.1`, [x](a/0.1.md), three GPUs, step 40")


def test_a_number_is_compared_as_it_is_rounded() -> None:
    assert is_in("40", ["| 0.398 |"]) and is_in("0.40", ["| 0.398 |"]) and not is_in("41", ["| 0.398 |"])
    assert is_in("1,024", ["1024 ranks"]) and not is_in("1.5", ["1.56"])
