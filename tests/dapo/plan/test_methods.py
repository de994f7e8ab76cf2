from __future__ import annotations

from pathlib import Path

from dapo.plan import methods
from tests.conftest import make_config


def test_the_defaults_are_the_released_code(tmp_path: Path) -> None:
    assert methods.name(make_config(tmp_path)) == "DAPO as released (arXiv:2503.14476)"


def test_a_combination_of_no_paper_is_named_after_the_nearest(tmp_path: Path) -> None:
    made = make_config(tmp_path, "objective.kind=cispo", "objective.advantage=no_std")
    nearest = "CISPO (arXiv:2506.13585), but objective.advantage = no_std: a combination of no paper"
    assert methods.name(made) == nearest
    constants = make_config(tmp_path, "optim.lr=1.0e-5", "objective.clip_high=0.3", "objective.dual_clip=9")
    assert methods.name(constants) == "DAPO as released (arXiv:2503.14476)", (
        "constants do not tell methods apart"
    )


def test_no_two_methods_are_alike() -> None:
    assert len(set(methods.METHODS.values())) == len(methods.METHODS)
