"""Qwen2 and Qwen2.5: q, k and v have biases."""

from dapo.model.families.family import Family

QWEN2 = Family("qwen2", has_qkv_bias=True)
