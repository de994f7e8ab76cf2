r"""The check of an answer where the last \boxed{…} counts: reward.answer_format=boxed."""

from functools import partial

from dapo.reward import answer
from dapo.reward.answer import is_same, refusal_of

__all__ = ["answer_of", "is_correct", "is_same", "refusal_of"]

answer_of = partial(answer.answer_of, answer_format="boxed")
is_correct = partial(answer.is_correct, answer_format="boxed")
