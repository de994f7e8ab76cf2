r"""The check of an answer where the last "Answer:" line or \boxed{…} counts: reward.answer_format=either."""

from functools import partial

from dapo.reward import answer
from dapo.reward.answer import is_same, refusal_of

__all__ = ["answer_of", "is_correct", "is_same", "refusal_of"]

answer_of = partial(answer.answer_of, answer_format="either")
is_correct = partial(answer.is_correct, answer_format="either")
