"""How a flat range of a tensor is cut into boxes."""

import itertools

import pytest
import torch

from dapo.policy.optimizer_state import boxes


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 6), (5, 1), (2, 3, 4)])
def test_boxes_hold_a_flat_range_end_to_end(shape):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start, end in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        cut = [
            whole[tuple(slice(i, i + n) for i, n in zip(*box, strict=True))]
            for box in boxes(start, end, shape)
        ]
        assert torch.cat([part.flatten() for part in cut] + [whole.new_empty(0)]).tolist() == list(
            range(start, end)
        )
        assert len(cut) <= 2 * len(shape) - 1


def test_a_matrix_is_cut_into_the_rest_of_a_row_whole_rows_and_the_beginning_of_a_row():
    assert list(boxes(2, 14, (5, 3))) == [((0, 2), (1, 1)), ((1, 0), (3, 3)), ((4, 0), (1, 2))]
    assert list(boxes(4, 5, (3, 3))) == [((1, 1), (1, 1))]
    assert list(boxes(5, 3, (3, 3))) == []
