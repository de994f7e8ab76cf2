"""Qwen3: queries and keys are normalised."""

from dapo.model.families.family import Family

QWEN3 = Family("qwen3", has_qk_norm=True, head_dim=128)
