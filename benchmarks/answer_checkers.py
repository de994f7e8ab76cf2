"""Agreement of answer checkers with two sets of cases that were labelled by hand.

The sets are benchmarks/answer_cases.jsonl and tests/dapo/reward/answer_cases.py. The checkers are ours, and
math-verify alone and verl's where they are installed.

python benchmarks/answer_checkers.py
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from record import heading, save, table

sys.path.insert(0, str(Path(__file__).parents[1]))
from dapo.reward import is_correct
from tests.dapo.reward import answer_cases

Checker = Callable[[str, str], bool]


class Case(NamedTuple):
    response: str
    answer: str
    is_right: bool
    kind: str


def by_kind() -> list[Case]:
    """Load the cases whose labels were written before the checker was."""
    lines = (Path(__file__).parent / "answer_cases.jsonl").read_text().splitlines()
    return [Case(**json.loads(line)) for line in lines]


def by_form() -> list[Case]:
    """Load the cases that grew with the checker."""
    return [Case(case.response, case.gold, case.is_right, case.form) for case in answer_cases.CASES]


def math_verify_alone() -> Checker | None:
    """Check as math-verify's README does: both sides through `parse`, the ground truth as a formula."""
    if importlib.util.find_spec("math_verify") is None:
        return None
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return lambda response, gold: math_verify.verify(
        math_verify.parse(f"${gold}$"), math_verify.parse(response)
    )


def verls() -> Checker | None:
    """Load the checker of verl's DAPO recipe, if verl is installed.

    Its file needs only `re`; the package around it needs Ray, so the file is loaded alone.
    """
    package = importlib.util.find_spec("verl")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "utils/reward_score/math_dapo.py"
    spec = importlib.util.spec_from_file_location("math_dapo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda response, gold: bool(module.compute_score(response, gold)["acc"])


def judge(checker: Checker, cases: list[Case]) -> tuple[list[bool], float]:
    """Return, case by case, whether it agrees with the label; and the CPU seconds that took."""
    checker(cases[0].response, r"\frac{1}{2}")  # imports
    start = time.process_time()
    agrees = [checker(case.response, case.answer) is case.is_right for case in cases]
    return agrees, time.process_time() - start


def errors(missed: list[Case]) -> tuple[int, int]:
    """Count right answers refused and wrong ones accepted."""
    refused = sum(case.is_right for case in missed)
    return refused, len(missed) - refused


def report(cases: list[Case], checkers: dict[str, Checker]) -> str:
    rows = []
    kinds = {kind: [kind, count] for kind, count in Counter(case.kind for case in cases).items()}
    num_right = sum(case.is_right for case in cases)
    for name, checker in checkers.items():
        agrees, seconds = judge(checker, cases)
        missed = [case for case, agreed in zip(cases, agrees, strict=True) if not agreed]
        refused, accepted = errors(missed)
        counts = [f"{accepted} of {len(cases) - num_right}", f"{refused} of {num_right}"]
        rows.append([name, f"{sum(agrees) / len(cases):.1%}", *counts, f"{len(cases) / seconds:.0f}"])
        for kind, row in kinds.items():
            refused, accepted = errors([case for case in missed if case.kind == kind])
            row.append(f"{accepted} / {refused}")
    text = f"\n{len(cases)} cases, {num_right} of them right.\n\n"
    text += table(
        ["checker", "agreement", "false acceptances", "false refusals", "answers per CPU second"], rows
    )
    text += "\nFalse acceptances / false refusals by kind:\n\n"
    return text + table(["kind", "cases", *checkers], list(kinds.values()))


def main() -> None:
    checkers: dict[str, Checker] = {"ours": is_correct}
    for package, title, checker in (
        ("math-verify", "math-verify {} alone", math_verify_alone()),
        ("verl", "verl {} math_dapo", verls()),
    ):
        if checker:
            checkers[title.format(importlib.metadata.version(package))] = checker
    text = heading("Answer checkers")
    text += """
The labels are ours. Some are conventions (an integer must be written out; a doubt is no answer; what the
prompt does not ask for, as \\boxed{34} without "Answer:", is none); math-verify's purpose is to find
mathematics anywhere in a text, so many of its false acceptances are answers that it was made to accept.

## benchmarks/answer_cases.jsonl

Labelled from what is mathematically meant, before the checker was run on them; then the checker was mended.
At first it was right about

- 592 of 602 (3 wrong answers accepted, 7 right ones refused; one label was wrong);
- 102 of 109, "written after the code" (1 accepted, 6 refused);
- 111 of 114, "written later still" (none accepted, 3 refused; one label was wrong);
- 101 of 103, "written last" (1 accepted, 1 refused).

The kind "found by comparing every answer with every ground truth" was written to mend what that showed.
"""
    text += report(by_kind(), checkers)
    text += """
## tests/dapo/reward/answer_cases.py

Made with an earlier checker, as regression tests.
"""
    save("answer_checkers.md", text + report(by_form(), checkers))


if __name__ == "__main__":
    main()
