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


def test_what_makes_no_other_method_of_a_kind(tmp_path: Path) -> None:
    minimax = "CISPO (arXiv:2506.13585)"
    for high in (0.28, 0.9, 3.0):
        made = make_config(
            tmp_path, "objective.kind=cispo", "objective.clip_low=1.0", f"objective.clip_high={high}"
        )
        assert methods.name(made) == minimax
    gspo = make_config(tmp_path, "objective.kind=gspo")
    assert methods.name(gspo).startswith(
        "GSPO (arXiv:2507.18071), but objective.normaliser = token_mean and "
    )


def test_a_correction_that_is_not_the_usual_one_is_named(tmp_path: Path) -> None:
    every = ["objective.importance_of=all", "objective.importance=band"]
    released = "DAPO as released (arXiv:2503.14476)"
    name = f"{released}, but objective.importance = band of all: a combination of no paper"
    assert methods.name(make_config(tmp_path, *every)) == name
    inert = make_config(tmp_path, "objective.importance=band")
    assert methods.name(inert) == released
