"""Answer checkers against the labelled set of tests/dapo/reward/answer_cases.py: ours, math-verify alone, and
verl's, where it is installed.

python benchmarks/answer_checkers.py
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import math_verify
from record import heading, save, table

sys.path.insert(0, str(Path(__file__).parents[1]))
from dapo.reward import is_correct
from tests.dapo.reward.answer_cases import CASES

Checker = Callable[[str, str], bool]


def math_verify_alone(response: str, gold: str) -> bool:
    """As its README has it: both sides through `parse`, the gold answer as a formula."""
    return math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(response))


def verls() -> Checker | None:
    """The checker of verl's DAPO recipe. Its file needs only `re`; the package around it needs Ray, so the
    file is loaded alone.
    """
    package = importlib.util.find_spec("verl")
    if package is None or package.origin is None:
        return None
    spec = importlib.util.spec_from_file_location(
        "math_dapo", Path(package.origin).parent / "utils/reward_score/math_dapo.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda response, gold: bool(module.compute_score(response, gold)["acc"])


def judge(checker: Checker) -> tuple[list[bool], float]:
    """Whether it agrees with the label, case by case, and the seconds."""
    checker(CASES[0].response, r"\frac{1}{2}")  # imports
    start = time.perf_counter()
    return [checker(case.response, case.gold) is case.is_right for case in CASES], time.perf_counter() - start


def main() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    checkers: dict[str, Checker] = {
        "ours": is_correct,
        f"math-verify {importlib.metadata.version('math-verify')} alone": math_verify_alone,
    }
    peer = verls()
    if peer:
        checkers[f"verl {importlib.metadata.version('verl')} math_dapo"] = peer
    rows, forms = (
        [],
        {
            form: [form, sum(case.form == form for case in CASES)]
            for form in dict.fromkeys(case.form for case in CASES)
        },
    )
    rights = sum(case.is_right for case in CASES)
    for name, checker in checkers.items():
        agrees, seconds = judge(checker)
        missed = [case for case, agreed in zip(CASES, agrees, strict=True) if not agreed]
        negatives = sum(case.is_right for case in missed)
        positives = len(missed) - negatives
        rows.append([name, f"{sum(agrees) / len(CASES):.1%}", f"{negatives} of {rights}", f"{positives} of {len(CASES) - rights}",
                     f"{len(CASES) / seconds:.0f}"])  # fmt: skip
        for form, row in forms.items():
            row.append(
                f"{sum(c.is_right for c in missed if c.form == form)} / "
                f"{sum(not c.is_right for c in missed if c.form == form)}"
            )
    text = heading("Answer checkers")
    text += f"\n{len(CASES)} hand-made cases, {rights} of them right. The labels are ours and were made with this checker: that it agrees "
    text += "with all of them is a regression test, not a measurement. Some labels are conventions (an integer must be written out; a "
    text += 'doubt is no answer; what the prompt does not ask for, as \\boxed{34} without "Answer:", is none); math-verify\'s purpose is to '
    text += "find mathematics anywhere in a text, so many of its false positives are answers that it was made to accept.\n"
    text += "" if peer else "\nverl is not installed: not measured.\n"
    text += "\n" + table(["checker", "agreement", "false negatives", "false positives", "answers/s"], rows)
    text += "\nFalse negatives / false positives by form:\n\n" + table(
        ["form", "cases", *checkers], list(forms.values())
    )
    save("answer_checkers.md", text)


if __name__ == "__main__":
    main()
