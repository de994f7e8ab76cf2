"""Megatron's Gated DeltaNet, and its norm. With it flash-linear-attention is imported, where it is."""

from __future__ import annotations

from typing import Any

from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dapo.policy.layers import RMSNorm


class DeltaNet(GatedDeltaNet):  # type: ignore[misc]
    """Megatron's module, whose decay is computed in float32: in 16 bits it would be off by up to 0.4 %."""

    def _compute_g_and_beta(
        self, A_log_local_cp: Tensor, dt_bias_local_cp: Tensor, alpha: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        return super()._compute_g_and_beta(  # type: ignore[no-any-return]
            A_log_local_cp.float(), dt_bias_local_cp, alpha, beta
        )


class DeltaNorm(RMSNorm):
    """The norm of a DeltaNet's output, which is not zero-centred where the other norms are."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(config, hidden_size, eps)
        self.is_zero_centred = False
