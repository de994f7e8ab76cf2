"""tensor_parallel.py measures errors on 1, 2 and 4 gloo processes; they must be small."""

import pytest

from tests.distributed.launch import measured

KINDS = ("dapo", "cispo", "gspo")
CASES = [
    f"{kind} {split} {by}" for kind in KINDS for split in ("logits", "context") for by in ("triton", "torch")
]
CASES += [
    f"{kind} linear {by}{parallel} {chunk}"
    for kind in KINDS
    for by in ("triton", "torch")
    for parallel in ("", " sequence")
    for chunk in (1, 936, None)
    if (by, parallel, chunk) != ("triton", "", 1)
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_equal_the_whole_and_all_ranks_agree_to_the_bit(world, case):
    result = measured("tests.kernels.tensor_parallel", world)[case]
    assert result["error"] < 1e-5
    assert result["is_same"]


def test_a_vocabulary_larger_than_the_group_holds_is_refused():
    message = measured("tests.kernels.tensor_parallel", 2)["refusal"]["message"]
    assert (
        message == "valid_vocab is 105, but weight holds 52 columns and tp_group 2 ranks; expected 1 to 104"
    )
