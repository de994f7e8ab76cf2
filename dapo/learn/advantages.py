"""Group advantages (Eq. 9)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def group_advantages(rewards: Sequence[float]) -> np.ndarray:
    """(R_i − mean) / (std + 1e-6) within one group (Eq. 9): [G] rewards → [G] float32. Sample standard
    deviation (ddof = 1).

    `group_advantages([1, 1, 1, -1])` → [0.5, 0.5, 0.5, -1.5]; equal rewards → zeros.
    """
    values = np.asarray(rewards, dtype=np.float64)
    advantages: np.ndarray = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    return advantages.astype(np.float32)
