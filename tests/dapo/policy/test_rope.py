"""Stretched rotary embeddings: config.json's fields and the frequencies, against Hugging Face's."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dapo.config import ConfigError
from dapo.learn.batch import shard
from dapo.model.families import read_shape
from dapo.model.rope import Yarn
from dapo.policy.rope import PackedRotary, describe_pack, inverse_frequencies, rotate, softmax_scale
from tests.dapo.policy.test_layers import microbatch_of

SIZES = {
    "model_type": "qwen2", "vocab_size": 100, "hidden_size": 256, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def write_model(directory: Path, **fields: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(SIZES | fields))
    return directory


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.5},
        LLAMA3,  # Llama 3.1's
        LLAMA3 | {"factor": 32, "low_freq_factor": 0.3, "original_max_position_embeddings": 77},
        YARN,  # Qwen2.5's and Qwen3's
        YARN | {"beta_fast": 16, "beta_slow": 0.5, "truncate": False},
        YARN | {"attention_factor": 0.8},
        YARN | {"mscale": 0.707, "mscale_all_dim": 1.3},
        YARN | {"mscale": 0.707},  # has no effect alone
        YARN | {"factor": 1.0},
        # no pair turns once: the ends of the ramp change places
        YARN | {"original_max_position_embeddings": 5},
        YARN | {"beta_fast": 1.0, "mscale": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000])
def test_frequencies_and_attention_factor_are_hugging_faces(
    scaling: dict[str, Any], theta: float, tmp_path: Path
) -> None:
    shape = read_shape(write_model(tmp_path, rope_parameters=scaling | {"rope_theta": theta}))
    hf = transformers.AutoConfig.from_pretrained(tmp_path)
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](hf, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(shape), frequencies, rtol=3e-7, atol=0)
    assert (softmax_scale(shape) or 1 / math.sqrt(128)) == pytest.approx(factor**2 / math.sqrt(128), rel=1e-7)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": YARN | {"rope_theta": 1e6}},
        {"rope_parameters": YARN | {"rope_theta": 1e6}, "rope_theta": 1e6},
        {"rope_parameters": YARN | {"rope_theta": 1e6}, "rope_scaling": YARN | {"rope_theta": 1e6}},
        {"rope_parameters": None, "rope_scaling": YARN, "rope_theta": 1e6},
        {
            "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768},
            "rope_theta": 1e6,
        },  # Qwen2.5's README
        {"rope_scaling": YARN | {"type": "yarn"}, "rope_theta": 1000000},
        {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": 1}, "rope_theta": 1e6},
    ],
)
def test_old_and_new_spellings_mean_the_same(fields: dict[str, Any], tmp_path: Path) -> None:
    shape = read_shape(write_model(tmp_path, **fields))
    assert shape.rope_theta == 1e6
    assert shape.rope_scaling == Yarn(factor=4.0, original_max_position_embeddings=32768)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": None},
        {"rope_scaling": None},
        {"rope_parameters": {}},
        {"rope_scaling": {"rope_type": "default"}},
    ],
)
def test_none_of_it_is_a_plain_embedding(fields: dict[str, Any], tmp_path: Path) -> None:
    shape = read_shape(write_model(tmp_path, rope_theta=5e5, **fields))
    assert (shape.rope_theta, shape.rope_scaling, softmax_scale(shape)) == (5e5, None, None)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}},
         "'dynamic' is not supported; supported: default, linear, llama3, yarn"),
        ({"rope_parameters": {"rope_type": "longrope"}},
         "rope_parameters: rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
         "rope_type 'mrope' is not supported"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_type default has no field 'factor'"),
        ({"rope_scaling": YARN | {"low_freq_factor": 1.0}},
         "rope_type yarn has no field 'low_freq_factor'; known: factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}},
         "rope_type default has no field 'partial_rotary_factor'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
         "rope_type default has no field 'full_attention'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
         "rope_type yarn wants the field 'original_max_position_embeddings'"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "rope_type llama3 wants the field 'factor'"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor=0.5; expected a number of at least 1"),
        ({"rope_scaling": YARN | {"beta_fast": "32"}}, "beta_fast='32'; expected a number above 0"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate=1; expected true or false"),
        ({"rope_scaling": YARN | {"truncate": None}}, "truncate=None; expected true or false"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
         "low_freq_factor=1.0 is not below high_freq_factor"),
        ({"rope_theta": True}, "rope_theta=True; expected a number above 0"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn'; expected a rope_type and its fields"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
         "rope_theta=10000.0, but 1000000.0 in rope_parameters"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6}},
         "but rope_parameters={'rope_theta': 1000000.0}: remove"),
    ],
    ids=str,
)  # fmt: skip
def test_a_rope_that_is_not_understood_is_refused_by_name(
    fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_shape(write_model(tmp_path, **fields))


@pytest.mark.parametrize("context", [1, 2, 3])
@pytest.mark.parametrize("chunks", [[1], [2, 5, 1, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pack_is_rotated_at_once_as_megatron_rotates_sequence_after_sequence(
    context: int, chunks: list[int], dtype: torch.dtype, tmp_path: Path
) -> None:
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    torch.manual_seed(0)
    frequencies = inverse_frequencies(read_shape(write_model(tmp_path, rope_theta=1e4)))
    cu_seqlens = np.cumsum([0, *(2 * context * n for n in chunks)]).astype(np.int32)
    everything = microbatch_of(np.arange(cu_seqlens[-1]), cu_seqlens)
    whole = torch.cat([torch.arange(length) for length in np.diff(cu_seqlens)])
    config: Any = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False)
    for rank in range(context):
        positions = whole[torch.from_numpy(shard(everything, rank, context).tokens)]
        group: Any = SimpleNamespace(size=lambda: context, rank=lambda rank=rank: rank)
        query = torch.randn(len(positions), 3, 2 * len(frequencies), dtype=dtype)
        cu, longest = torch.from_numpy(cu_seqlens), int(np.diff(cu_seqlens).max())
        angles = torch.outer(torch.arange(longest).float(), frequencies).repeat(1, 2)[:, None, None]
        expected = apply_rotary_pos_emb(query, angles, config, cu_seqlens=cu, cp_group=group)
        pack = describe_pack(cu, longest, positions)
        assert (pack.qkv_format, pack.max_seqlen_q) == ("thd", longest) and pack.cu_seqlens_q is cu
        rotary = PackedRotary(frequencies, dtype)
        given = rotary.get_rotary_seq_len(None, None, None, None, pack)
        assert rotary(given, packed_seq=True, cp_group=None) is None, "Megatron has nothing to rotate by"
        found = rotate(query, pack)
        assert found.dtype == dtype and torch.equal(found, expected)
