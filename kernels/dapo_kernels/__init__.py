"""The policy loss of DAPO. `reference` is the mathematics in plain torch; what is faster must agree with it.

`policy_loss` takes logits, `linear_policy_loss` hidden states and the LM head; `linear_logprobs` is the
latter's forward-only half. `Head.loss` and `Head.logprobs` are these two with packed arguments. Triton is
imported at the first call that can use it, so this package needs torch alone.
"""

from dapo_kernels.linear_policy_loss import Head, linear_logprobs, linear_policy_loss
from dapo_kernels.policy_loss import policy_loss
from dapo_kernels.reference import PolicyLoss
from dapo_kernels.rows import Objective, Tokens
from dapo_kernels.sequences import Sequences

__all__ = [
    "Head",
    "Objective",
    "PolicyLoss",
    "Sequences",
    "Tokens",
    "linear_logprobs",
    "linear_policy_loss",
    "policy_loss",
]
