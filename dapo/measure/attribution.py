"""Says which cause explains how much of the mismatch between engine and policy, by one change at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROUNDING = 1e-5  # a mean mismatch below it has no cause worth a search: float32 on both sides has 1e-6
MISSING = 10  # tokens that are expected and missing: by chance one time in twenty thousand
SMALL = 0.1  # a share below it is no cause


@dataclass(frozen=True)
class Change:
    """One change, after which the same tokens were compared anew."""

    cause: str
    what: str  # was changed
    mean: float | None  # of |old − behavior| with the change; None: it could not be made
    remedy: str

    def share(self, before: float) -> float | None:
        """Return the share of the mismatch `before` that the change takes away."""
        return None if self.mean is None or not before else 1 - self.mean / before


@dataclass(frozen=True)
class Attribution:
    """The mismatch of a fixed set of responses, and each change."""

    mean: float  # of |old − behavior|
    largest: float
    num_responses: int
    num_tokens: int
    changes: Sequence[Change]
    support: float  # probability of all likelier tokens, the most of any token that was drawn
    num_missing: float  # tokens from beyond it that so many draws from the whole distribution have

    @property
    def main_cause(self) -> Change | None:
        """The change that takes most away; None if none takes away much, or there is nothing to explain."""
        if self.mean < ROUNDING:
            return None
        shares = {change.cause: change.share(self.mean) or 0.0 for change in self.changes}
        found = max(self.changes, key=lambda change: shares[change.cause])
        return found if shares[found.cause] >= SMALL else None

    def describe(self) -> list[str]:
        """Return the table and what it says, as lines."""
        widths = [max(len(getattr(c, name)) for c in self.changes) for name in ("cause", "what")]
        head = "as it was sampled"
        lines = [
            f"{self.num_responses} responses, {self.num_tokens:,} tokens; the largest |old − behavior| is "
            f"{self.largest:.3g}",
            "",
            f"{'cause':<{widths[0]}}  {'one change':<{widths[1]}}  {'mean':>9}  {'share':>6}",
            f"{'':<{widths[0]}}  {head:<{widths[1]}}  {self.mean:9.2e}",
        ]
        for change in self.changes:
            share, mean = change.share(self.mean), "–"
            shown = "–" if share is None else "worse" if share < -0.005 else f"{abs(share):.0%}"
            if change.mean is not None:
                mean = f"{change.mean:.2e}"
            row = f"{change.cause:<{widths[0]}}  {change.what:<{widths[1]}}  {mean:>9}  {shown:>6}"
            lines.append(row)
        if self.num_missing >= MISSING:
            tail = f"the unlikeliest tokens, with {1 - self.support:.2g} of the probability, were never drawn"
            expected = f"where {self.num_missing:.0f} of them are expected"
            why = "the engine samples with top_p or top_k, and the ratio takes the whole distribution"
            lines += ["", f"{tail}, {expected}: {why}"]
        return [*lines, "", self._verdict()]

    def _verdict(self) -> str:
        if self.mean < ROUNDING:
            return f"nothing to explain: a mean below {ROUNDING:g} is float32's rounding"
        if cause := self.main_cause:
            return f"largest: {cause.cause}, {cause.share(self.mean):.0%} of the mismatch: {cause.remedy}"
        return "no cause stands out: what is left is rounding of the two programs' kernels"
