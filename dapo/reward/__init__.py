"""The rule-based reward: Eq. 7 (is it right?) plus Eq. 13 (was it too long?)."""

from dapo.reward.answer import is_correct
from dapo.reward.overlong import soft_overlong_penalty

__all__ = ["is_correct", "soft_overlong_penalty"]
