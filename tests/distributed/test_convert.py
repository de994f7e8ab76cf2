"""Checkpoints move between formats and layouts to the bit: what convert.py found."""

from __future__ import annotations

import pytest

from tests.distributed.launch import forked, measured

FLOAT32 = ["qwen2-tied", "qwen2", "qwen3", "qwen3-tied", "llama", "llama-tied", "mistral", "qwen3_moe"]
BFLOAT16 = ["qwen2-bfloat16", "qwen3-tied-bfloat16", "qwen3_moe-bfloat16"]


@pytest.mark.parametrize("model", FLOAT32 + BFLOAT16)
def test_hugging_face_to_megatron_and_back_is_the_same_to_the_bit(model: str) -> None:
    result = measured("tests.distributed.convert", 4, forked)[model]
    assert result["status"] == [0, 0]
    assert result["files"] > 1, "one file, so --shard-size was not tested"
    assert result["read_alike"], "Megatron's own reader finds other weights than ours"
    assert not result["early"], "it was written before the parameters changed, so the copy was not tested"
    assert result["dtypes"] == ["bfloat16" if model in BFLOAT16 else "float32"]
    assert result["back"]
    assert result["damage"] is None, "the sums taken while writing are not those of the files"
    assert result["left"] == []
