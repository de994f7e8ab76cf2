"""Docstrings are sentences, private words stay out, files stay short, README's reading list is true."""

from __future__ import annotations

import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("dapo", "kernels", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Words that had meanings of their own here. The field's word, or the plainest, stands in their place:
# meet → receive, check; settle → finish; heed → check; outlive → keep alive; told → reported; guests →
# external servers; beat, pulse → heartbeat, progress; give up → cancel; turned away → rejected; spell →
# format.
PRIVATE = re.compile(
    r"\b(meets?|met|settle[sd]?|heed(s|ed)?|outlive[sd]?|told|tells?|guests?|beats?|pulses?|gives? up"
    r"|given up|give_up|turned away|turned_away|spell(s|ed|ing|ings)?|spelt)\b",
    re.IGNORECASE,
)
# A docstring that begins so has no verb of its own
FRAGMENT = re.compile(
    r"(What|Which|Whether|Of|How|As|By|Where|Who|Whose|Why|The same|And|Or|Those|That|Raises|Than|To|In|From"
    r"|With|For|On|At|Beyond|After|Before|Below|Above|Under|Behind|Beside|None|Nothing|Everything|Whoever|Whatever)\b"
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def words_of(path: Path) -> list[tuple[int, str]]:
    """(line, text) of a source's names, comments and strings; of a document's lines, but for code in them."""
    if path.suffix != ".py":
        return list(enumerate(path.read_text().splitlines(), start=1))
    with path.open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    return [(token.start[0], token.string) for token in tokens if token.string != "tell"]  # a file's method


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_private_words_do_not_come_back(path: Path) -> None:
    assert not [(line, found[0]) for line, text in words_of(path) if (found := PRIVATE.search(text))]


@pytest.mark.parametrize(
    "text", ["as we are told", "def give_up():", "Settle the matter", "the guests", "a PULSE"]
)
def test_a_private_word_is_found_wherever_it_stands(text: str) -> None:
    assert PRIVATE.search(text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_sentences(path: Path) -> None:
    docstrings = [
        ast.get_docstring(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, DOCUMENTED)
    ]
    assert not [text.splitlines()[0] for text in docstrings if text and FRAGMENT.match(text)]


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_fits_the_eye(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= (650 if path in TESTS else 450)


OTHERS_PACKAGE = re.compile(r"pip install .*\bdapo(\[|$|[\s\"'`:;,])", re.MULTILINE)


def test_nobody_is_sent_to_the_package_index_for_another_projects_dapo() -> None:
    """This distribution is dapo-rl."""
    assert OTHERS_PACKAGE.search("run pip install dapo") and OTHERS_PACKAGE.search(
        "pip install -U 'dapo[gpu]'"
    )
    assert not OTHERS_PACKAGE.search("pip install dapo-rl")
    folders = [path for folder in ("dapo", "docs", "examples") for path in (ROOT / folder).rglob("*")]
    endings = {".py", ".md", ".sh", ".sbatch", ".html", ".yaml"}
    texts = [ROOT / "README.md", *(path for path in folders if path.suffix in endings)]
    assert len(texts) > 100
    assert [path for path in texts if OTHERS_PACKAGE.search(path.read_text())] == []


def test_the_loop_fits_a_screen() -> None:
    tree = ast.parse((ROOT / "dapo/train.py").read_text())
    [train] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert train.end_lineno and train.end_lineno - train.lineno + 1 <= 42


def test_the_evenings_reading_is_an_evening() -> None:
    """README lists it: `path` (lines), in order, at most 2,000 lines in all."""
    listed = re.findall(r"^\d+\. `([\w/.]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert listed[0] == "dapo/train.py" and len(listed) >= 5
    assert sum(len((ROOT / path).read_text().splitlines()) for path in listed) <= 2000
