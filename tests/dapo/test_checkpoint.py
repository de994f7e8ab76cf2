"""Which checkpoints are kept."""

import pytest

from dapo.checkpoint import superseded


@pytest.mark.parametrize(
    ("steps", "saved", "keep", "keep_every", "gone"),
    [
        ([10, 20, 30], 30, 2, None, [10]),
        ([10, 20, 30, 40, 50], 50, 1, 20, [30, 10]),
        ([5], 5, 1, None, []),
        ([40, 30, 23, 20], 23, 2, 20, []),  # 40 and 30 were damaged: the run went on from 20
        ([40, 30, 23, 20], 23, 1, None, [20]),
        ([40, 30, 20], 30, 1, None, [20]),
    ],
)
def test_what_was_just_saved_stays_and_newer_ones_count_for_nothing(steps, saved, keep, keep_every, gone):
    assert superseded(steps, saved, keep, keep_every) == gone
