"""Advantage estimators. To add one, write its function and name it in ADVANTAGES and in config.Objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dapo.types import Group

Rewards = Sequence[float] | np.ndarray  # of one group, [G]
EPSILON = 1e-6  # is added to standard deviations, which have ddof = 1, as torch.std has


def group_advantages(rewards: Rewards) -> np.ndarray:
    """Return (R_i − mean) / (std + 1e-6) within one group (Eq. 9): [G] rewards → [G] float32.

    The standard deviation has ddof = 1, as torch.std has.
    `group_advantages([1, 1, 1, -1])` → [0.5, 0.5, 0.5, -1.5]; equal rewards → zeros.
    """
    centred = _centred(rewards)
    if not centred.any():
        return centred.astype(np.float32)
    return _float32(centred / (np.asarray(rewards, np.float64).std(ddof=1) + EPSILON))


def group_std(rewards: Sequence[Rewards]) -> list[np.ndarray]:
    """Divide by the group's standard deviation: Eq. 9."""
    return [group_advantages(r) for r in rewards]


def no_std(rewards: Sequence[Rewards]) -> list[np.ndarray]:
    """Divide by nothing: Dr. GRPO (arXiv:2503.20783, section 3.2)."""
    return [_float32(_centred(r)) for r in rewards]


def batch_std(rewards: Sequence[Rewards]) -> list[np.ndarray]:
    """Divide by the standard deviation of all groups' differences from their means: ScaleRL
    (arXiv:2510.13786).
    """
    centred = [_centred(r) for r in rewards]
    std = np.concatenate(centred).std(ddof=1)
    return [_float32(c / (std + EPSILON)) for c in centred]


# name → function of the rewards of all groups of a step, [G] each; it returns their advantages, float32 [G]
ADVANTAGES: dict[str, Callable[[Sequence[Rewards]], list[np.ndarray]]] = {
    "group_std": group_std,
    "no_std": no_std,
    "batch_std": batch_std,
}


def set_advantages(groups: Sequence[Group], estimator: str = "group_std") -> None:
    """Set the advantage of every sample of a step's groups from the rewards."""
    if not groups:
        return
    advantages = ADVANTAGES[estimator]([[sample.reward for sample in group.samples] for group in groups])
    for group, of_group in zip(groups, advantages, strict=True):
        for sample, advantage in zip(group.samples, of_group, strict=True):
            sample.advantage = float(advantage)


def _centred(rewards: Rewards) -> np.ndarray:
    """Return R_i − mean, float64 [G]."""
    values = np.asarray(rewards, dtype=np.float64)
    if (values == values[0]).all():
        return np.zeros(len(values))  # exactly: a rounded mean would leave tiny advantages
    centred: np.ndarray = values - values.mean()
    return centred


def _float32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)
