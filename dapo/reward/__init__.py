"""The rule-based reward: Eq. 7 (is it right?) plus Eq. 13 (was it too long?)."""

from dapo.reward.answer import answer_of, is_correct, is_same, refusal_of
from dapo.reward.overlong import soft_overlong_penalty

__all__ = ["answer_of", "is_correct", "is_same", "refusal_of", "soft_overlong_penalty"]
