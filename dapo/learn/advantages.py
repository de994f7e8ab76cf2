"""Advantage estimators. To add one, write its function and name it in ADVANTAGES."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dapo.types import Group


def group_advantages(rewards: Sequence[float]) -> np.ndarray:
    """Return (R_i − mean) / (std + 1e-6) within one group (Eq. 9): [G] rewards → [G] float32.

    The standard deviation has ddof = 1, as torch.std has.
    `group_advantages([1, 1, 1, -1])` → [0.5, 0.5, 0.5, -1.5]; equal rewards → zeros.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if (values == values[0]).all():
        return np.zeros(len(values), np.float32)  # exactly: a rounded mean would leave tiny advantages
    advantages: np.ndarray = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    return advantages.astype(np.float32)


# name → function of one group's rewards, [G] → [G]
ADVANTAGES: dict[str, Callable[[Sequence[float]], np.ndarray]] = {"group": group_advantages}


def set_advantages(groups: Iterable[Group], estimator: str = "group") -> None:
    """Set every sample's advantage from the rewards of its group."""
    for group in groups:
        advantages = ADVANTAGES[estimator]([sample.reward for sample in group.samples])
        for sample, advantage in zip(group.samples, advantages, strict=True):
            sample.advantage = float(advantage)
