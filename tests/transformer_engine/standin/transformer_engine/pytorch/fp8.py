"""Where Megatron looks for them; nothing is in 8 bits here."""

from contextlib import nullcontext as fp8_autocast
from contextlib import nullcontext as fp8_model_init


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


__all__ = ["FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"]
