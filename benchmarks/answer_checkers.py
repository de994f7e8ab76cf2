"""Agreement of answer checkers with the labels of tests/dapo/reward/answer_cases.py.

The checkers are ours, math-verify alone, and verl's where it is installed.

python benchmarks/answer_checkers.py
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import math_verify
from record import heading, save, table

sys.path.insert(0, str(Path(__file__).parents[1]))
from dapo.reward import is_correct
from tests.dapo.reward.answer_cases import CASES, Case

Checker = Callable[[str, str], bool]


def math_verify_alone(response: str, gold: str) -> bool:
    """Check as its README does: both sides through `parse`, the gold answer as a formula."""
    return math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(response))


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


def judge(checker: Checker) -> tuple[list[bool], float]:
    """Return, case by case, whether it agrees with the label; and the seconds that took."""
    checker(CASES[0].response, r"\frac{1}{2}")  # imports
    start = time.perf_counter()
    agrees = [checker(case.response, case.gold) is case.is_right for case in CASES]
    return agrees, time.perf_counter() - start


def errors(missed: list[Case]) -> tuple[int, int]:
    """Count false negatives and false positives."""
    negatives = sum(case.is_right for case in missed)
    return negatives, len(missed) - negatives


def main() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    checkers: dict[str, Checker] = {
        "ours": is_correct,
        f"math-verify {importlib.metadata.version('math-verify')} alone": math_verify_alone,
    }
    peer = verls()
    if peer:
        checkers[f"verl {importlib.metadata.version('verl')} math_dapo"] = peer
    rows = []
    forms = {form: [form, count] for form, count in Counter(case.form for case in CASES).items()}
    num_right = sum(case.is_right for case in CASES)
    for name, checker in checkers.items():
        agrees, seconds = judge(checker)
        missed = [case for case, agreed in zip(CASES, agrees, strict=True) if not agreed]
        negatives, positives = errors(missed)
        counts = [f"{negatives} of {num_right}", f"{positives} of {len(CASES) - num_right}"]
        rows.append([name, f"{sum(agrees) / len(CASES):.1%}", *counts, f"{len(CASES) / seconds:.0f}"])
        for form, row in forms.items():
            negatives, positives = errors([case for case in missed if case.form == form])
            row.append(f"{negatives} / {positives}")
    text = heading("Answer checkers")
    text += f"""
{len(CASES)} hand-made cases, {num_right} of them right. The labels are ours and were made with this checker:
that it agrees with all of them is a regression test, not a measurement. Some labels are conventions (an
integer must be written out; a doubt is no answer; what the prompt does not ask for, as \\boxed{{34}} without
"Answer:", is none); math-verify's purpose is to find mathematics anywhere in a text, so many of its false
positives are answers that it was made to accept.
"""
    if not peer:
        text += "\nverl is not installed: not measured.\n"
    text += "\n" + table(["checker", "agreement", "false negatives", "false positives", "answers/s"], rows)
    text += "\nFalse negatives / false positives by form:\n\n"
    save("answer_checkers.md", text + table(["form", "cases", *checkers], list(forms.values())))


if __name__ == "__main__":
    main()
