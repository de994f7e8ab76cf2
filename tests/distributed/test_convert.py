"""Checkpoints move between formats and layouts to the bit: what convert.py found."""

from __future__ import annotations

import pytest

from tests.distributed.launch import forked, measured

FLOAT32 = ["qwen2-tied", "qwen2", "qwen3", "qwen3-tied", "llama", "llama-tied", "mistral", "qwen3_moe"]
FLOAT32 += ["qwen3_5_text-tied", "qwen3_next", "glm4_moe_lite"]
BFLOAT16 = ["qwen2-bfloat16", "qwen3-tied-bfloat16", "qwen3_moe-bfloat16", "qwen3_5_moe_text-bfloat16"]
BOTH = ["deepseek_v3-bfloat16"]  # a router's bias is float32


@pytest.mark.parametrize("model", FLOAT32 + BFLOAT16 + BOTH)
def test_hugging_face_to_megatron_and_back_is_the_same_to_the_bit(model: str) -> None:
    result = measured("tests.distributed.convert", 4, forked)[model]
    assert result["status"] == [0, 0]
    assert result["files"] > 1, "one file, so --shard-size was not tested"
    assert result["read_alike"], "Megatron's own reader finds other weights than ours"
    assert not result["early"], "it was written before the parameters changed, so the copy was not tested"
    dtypes = (["bfloat16"] if model in BFLOAT16 + BOTH else []) + (
        ["float32"] if model in FLOAT32 + BOTH else []
    )
    assert result["dtypes"] == dtypes
    assert result["back"]
    assert result["damage"] is None, "the sums taken while writing are not those of the files"
    assert result["left"] == []
