"""The documentation is true: links lead somewhere, examples run, and error lines are those of the source."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dapo.config import Config, plain_yaml, reference
from dapo.episodes import Reply, Turn
from tools import site_files

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
ERROR = re.compile(r"^ {4}((?:error|warning|stalled): .*)$", re.MULTILINE)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: str) -> list[str]:
    """The Python in a page's fences."""
    return BLOCK.findall((ROOT / "docs" / page).read_text())


# --- links ---


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_links_to_what_is_there(page: Path) -> None:
    for link in site_files.links_of(page.read_text()):
        assert (ROOT / site_files.target(ROOT, name_of(page), link)).is_file(), link


def test_every_page_is_in_the_menu_and_no_other() -> None:
    listed = re.findall(r"(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["theme"]["font"] is False, (
        "it loads from elsewhere"
    )


def test_a_file_outside_of_docs_becomes_a_page(tmp_path: Path) -> None:
    for name, text in {
        "docs/a.md": "[code](../src/x.py) [b](b.md) [web](https://x.y) [it](#a)\n```\n[no](../no.md)\n```\n",
        "docs/b.md": "![curves](../pictures/c.png)\n",
        "src/x.py": "x = 1\n",
        "more/README.md": "[a](../docs/a.md) [other](other.md)\n",
        "more/other.md": "# Other\n",
        "pictures/c.png": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert site_files.outside(tmp_path) == ["src/x.py", "pictures/c.png"]
    text = site_files.relinked(tmp_path, "docs/a.md", (tmp_path / "docs/a.md").read_text())
    assert text.startswith("[code](repository/src/x.py.md) [b](b.md) [web](https://x.y) [it](#a)\n")
    assert "[no](../no.md)" in text, "code is left alone"
    assert "````python\nx = 1\n" in site_files.shown(tmp_path, "src/x.py")
    (tmp_path / "docs/b.md").write_text("[more](../more)\n")
    assert site_files.outside(tmp_path) == ["src/x.py", "more/README.md", "more/other.md"]
    assert site_files.shown(tmp_path, "more/README.md") == "[a](../../a.md) [other](other.md)\n"


# --- options ---

SECTIONS = "|".join(Config.model_fields)
OPTION = re.compile(rf"`((?:{SECTIONS})\.[a-z_]+)((?:\.[a-z_-]+)*)(?:=([^`]*))?`")
FILES = re.compile(r"\.(json|yaml|md)$")


def options_in(page: Path) -> list[tuple[str, str, str]]:
    """Options that a page names: option, further key, value. Of other trainers' tables, the first column."""
    text = page.read_text()
    if page.name == "coming_from.md":
        text = re.sub(r"^(\| [^|]*\|).*$", r"\1", text, flags=re.MULTILINE)
        text = re.sub(r"^`(loss_fn|beta)`?.*$", "", text, flags=re.MULTILINE)
    return [found for found in OPTION.findall(text) if not FILES.search(found[0])]


@pytest.mark.parametrize("page", [page for page in PAGES if options_in(page)], ids=lambda page: page.name)
def test_an_option_that_a_page_names_exists_and_takes_the_value(page: Path) -> None:
    known = {option.name for option in reference.options()}
    for option, key, value in options_in(page):
        takes_any = option in known and option in ("engine.sglang", "policy.megatron")
        assert option + key in known or takes_any, option + key
        if value and not re.search("…|[A-Z]{4}", value):
            values = plain_yaml.load((ROOT / "examples/arithmetic/config.yaml").read_text())
            plain_yaml.override(values, f"{option}{key}={value}")
            Config.model_validate(values)


def test_options_are_found_where_they_are_named() -> None:
    assert len(options_in(ROOT / "docs/coming_from.md")) > 100
    assert ("data.on_error", "", "skip") in options_in(ROOT / "docs/your_run.md")


# --- error lines ---


@functools.cache
def constants() -> frozenset[str]:
    """All texts between the variables of all strings in dapo/, an f-string's parts one by one. Names are left
    out, of which any line could be made.
    """
    found = set()
    for path in (ROOT / "dapo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return frozenset(text for text in found if text.isupper() or not re.fullmatch(r"[\w.-]*\w[\w.-]*", text))


def parts_of(line: str, known: frozenset[str]) -> list[str] | None:
    """Split what stands between the … of a line into whole texts of `known`; None if that is impossible."""
    found: list[str] = []
    for fragment in filter(None, line.split("…")):
        ways: list[list[str] | None] = [[]] + [None] * len(fragment)  # to reach each place, the longest first
        for end in range(1, len(fragment) + 1):
            for start in range(end):
                if (before := ways[start]) is not None and fragment[start:end] in known:
                    ways[end] = [*before, fragment[start:end]]
                    break
        if ways[-1] is None:
            return None
        found += ways[-1]
    return found


LINES = ERROR.findall((ROOT / "docs/troubleshooting.md").read_text())


def test_the_likeliest_errors_are_explained() -> None:
    assert len(LINES) >= 25 and len(set(LINES)) == len(LINES)


@pytest.mark.parametrize("line", LINES)
def test_an_error_line_is_what_the_source_prints(line: str) -> None:
    parts = parts_of(line, constants())
    assert parts, "no message in dapo/ has these words any more"
    longest = max(parts, key=len)
    others = frozenset(text for text in constants() if text.strip() != longest.strip())
    assert parts_of(line, others) is None, f"it would not be noticed if {longest!r} changed"


def test_a_changed_message_is_noticed() -> None:
    known = frozenset({"error: ", "world size ", " is not a multiple of "})
    assert parts_of("error: world size … is not a multiple of …", known)
    assert not parts_of("error: world size … is no multiple of …", known)
    assert not parts_of("error: world … is not a multiple of …", known), "whole texts only"


# --- examples ---


def run_python(*arguments: str, cwd: Path, **variables: str) -> str:
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_the_kernels_alone_need_torch_alone(tmp_path: Path) -> None:
    [example] = blocks("kernels.md")
    assert len(example.splitlines()) <= 30
    found = "import sys; print(*{'dapo', 'megatron', 'transformers'} & set(sys.modules))"
    (tmp_path / "example.py").write_text(f"{example}\n{found}\n")
    *shown, others = run_python("example.py", cwd=tmp_path, PYTHONPATH=str(ROOT / "kernels")).splitlines()
    assert others == "", "modules that the example has imported"
    losses = [float(line.split()[-1]) for line in shown]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2], shown


def test_the_python_page_trains_a_step_with_its_own_reward(tmp_path: Path) -> None:
    [script, *_] = blocks("python.md")
    (tmp_path / "my_run.py").write_text(script)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    printed = run_python("my_run.py", cwd=tmp_path)
    said = re.findall(r"^after step (\d+): \d+% of the samples were correct$", printed, re.MULTILINE)
    assert said == ["0"]
    [row, *_] = map(json.loads, (tmp_path / "runs/python/metrics.jsonl").read_text().splitlines())
    assert row["step"] == 0 and row["groups/asked"] > 0
    assert (tmp_path / "runs/python/hf/config.json").is_file()
    found = run_python("-c", "import my_run, sys; print('torch' in sys.modules)", cwd=tmp_path)
    assert found == "False\n", "a reward's worker imports the page's script"


def test_a_closure_is_a_reward_without_workers(tmp_path: Path) -> None:
    [script, closure] = blocks("python.md")
    lines = script.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def "))
    end = next(i for i, line in enumerate(lines) if line.startswith("if __name__"))
    script = "\n".join([*lines[:start], closure, *lines[end:]])
    script = script.replace("run.tracker=my_run:EachStep", "reward.workers=0")
    (tmp_path / "my_run.py").write_text(script.replace("my_run:short_and_right", "__main__:short"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run_python("my_run.py", cwd=tmp_path)
    assert (tmp_path / "runs/python/hf/config.json").is_file()


def test_the_game_of_the_environments_page_is_won_by_halving_and_lost_by_silence() -> None:
    _, game, *adapters = blocks("environments.md")
    names: dict[str, Any] = {}
    exec(compile(game, "environments.md", "exec"), names)
    for adapter in adapters:
        compile(adapter, "environments.md", "exec")
    for seed in range(20):
        environment = names["GuessTheNumber"]()
        [task] = environment.reset({"highest": 20}, seed)
        assert "1 to 20" in task["content"] and environment.reset({"highest": 20}, seed) == [task]
        low, high = 1, 20
        for _ in range(5):
            guess = (low + high) // 2
            turn = environment.step(Reply(f"Guess: 99, no, Guess: {guess}"))
            if turn.is_done:
                break
            low, high = (guess + 1, high) if "higher" in turn.messages[0]["content"] else (low, guess - 1)
        assert turn == Turn(is_done=True, reward=1.0, is_correct=True), guess
    environment.reset({"highest": 20}, 0)
    silent = [environment.step(Reply("")) for _ in range(5)]
    assert [turn.is_done for turn in silent] == [False] * 4 + [True] and silent[-1].is_correct is False
    environment.reset({"highest": 20}, 0)
    assert environment.step(Reply("Guess: 0", is_truncated=True)).reward == -1.0
