"""A training run in which rank 1, and no other, raises in the middle of a step."""

from __future__ import annotations

import os
import sys

from dapo.__main__ import end, main
from dapo.policy.megatron import Policy

update = Policy.update


def fail_on_rank_1(self: Policy, minibatch: list) -> dict[str, float]:
    if self.mesh.rank == 1:
        raise ZeroDivisionError("on rank 1")
    return update(self, minibatch)


if __name__ == "__main__":
    Policy.update = fail_on_rank_1  # type: ignore[method-assign]
    assert os.environ["WORLD_SIZE"] == "2"
    end(
        main(
            [
                "train",
                "examples/arithmetic/config.yaml",
                "eval.data=null",
                "reward.workers=0",
                "parallel.tensor=2",
                f"run.dir={sys.argv[1]}",
            ]
        )
    )
