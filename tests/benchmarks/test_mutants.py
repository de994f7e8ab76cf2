"""Faults that are put into the core's sources to see whether its tests notice them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "benchmarks/mutants.py")
    assert spec and spec.loader
    module = sys.modules["mutants"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("code", "becomes"),
    [
        ("x = a < b", {"x = (a <= b)", "x = (a >= b)"}),
        ("x = a == b != c", {"x = (a != b != c)", "x = (a == b == c)"}),
        ("x = a is not b", {"x = (a is b)"}),
        ("x = a and b or c", {"x = ((a and b) and c)", "x = (a or b) or c"}),
        ("x = a + b * c", {"x = (a - b * c)", "x = a + (b / c)"}),
        ("x = 'é' if a else 8", {
            "x = 'é' if a else 9", "x = 'é' if a else 7", "x = 'é' if (not (a)) else 8",
        }),
        ("x = -0.5", {"x = (0.5)", "x = -1.5", "x = -(-0.5)"}),
        ("x = not a", {"x = (a)"}),
        ("x = f(a, b, *c)", {"x = (f(b, a, *c))"}),
        ("f(a)", {"pass"}),
        ("a += b", {"pass", "a -= b"}),
        ("a.b = c", {"pass"}),
        ("def f(a: int = 1) -> int:\n    return a", {
            "def f(a: int = 2) -> int:\n    return a", "def f(a: int = 0) -> int:\n    return a",
            "def f(a: int = 1) -> int:\n    return None",
        }),
        ("while a:\n    break", {"while (not (a)):\n    break", "while a:\n    pass"}),
        ("x = [a for a in b if c]", {"x = [a for a in b if (not (c))]"}),
        ("if a:\n    raise E('b', 1)", {"if (not (a)):\n    raise E('b', 1)", "if a:\n    pass"}),
    ],
)  # fmt: skip
def test_each_kind_of_code_has_its_faults(mutants: ModuleType, code: str, becomes: set[str]) -> None:
    assert {change.apply(code) for change in mutants.changes(code)} == becomes


@pytest.mark.parametrize(
    "code",
    [
        '"""A text."""',
        "x: Literal[1, 2]",
        "def __repr__(self):\n    return a + b",
        "assert a < 1",
        "if TYPE_CHECKING:\n    import a",
        "x = f'{a + 1}'",
        "x = isinstance(a, int | float)",
        "@dataclass(slots=True)\nclass A:\n    '''A text.'''",
        "x = zip(a, strict=True)",
        "def f():\n    return None",
    ],
)
def test_texts_types_and_invariants_are_left_alone(mutants: ModuleType, code: str) -> None:
    assert mutants.changes(code) == []


def test_the_text_of_a_message_is_left_alone_and_its_absence_is_a_fault(mutants: ModuleType) -> None:
    [change] = mutants.changes("print(a + 1, b)")
    assert change.apply("print(a + 1, b)") == "pass"


def test_a_seed_draws_one_mutant_of_each_of_so_many_lines_and_no_equivalent_one(mutants: ModuleType) -> None:
    source = "".join(f"x{i} = a{i} < {i}\n" for i in range(30)) + "def f():\n    0 < 1\n"
    sources = {"a.py": source, "b.py": "x = a and b\n"}
    drawn = [mutants.draw(sources, 12, seed, set()) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    places = [(mutant.path, mutant.line) for mutant in drawn[0]]
    assert len(set(places)) == len(places) == 12

    every = mutants.draw(sources, 99, 3, {("b.py", "x = a and b", "a and b", "(a or b)")})
    assert sorted(mutant.line for mutant in every if mutant.path == "a.py") == [*range(1, 31), 32]
    assert not [mutant for mutant in every if mutant.path == "b.py"]


def test_a_change_of_place_only_is_no_change_of_the_bytecode(mutants: ModuleType) -> None:
    assert mutants.bytecode("def f():\n    return a") == mutants.bytecode("\n\ndef f():\n\n    return (a)")
    assert mutants.bytecode("def f():\n    return a") != mutants.bytecode("def f():\n    return b")
