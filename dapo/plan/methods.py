"""Methods by their names: the choices in which one paper's objective differs from another's."""

from __future__ import annotations

from typing import NamedTuple

from dapo.config import Config


class Traits(NamedTuple):
    """Configs with the same traits are of one method, whatever their constants (lr, batch sizes). Of clips
    it matters only whether clip_high > clip_low.
    """

    kind: str
    advantage: str
    normaliser: str
    is_clip_higher: bool | None  # clip_high > clip_low; None: it makes no difference
    dynamic_sampling: bool
    correction: str = "usual"  # none, or truncated importance sampling of older weights' tokens


METHODS = {
    "DAPO (arXiv:2503.14476)": Traits("dapo", "group_std", "group_token_mean", True, True),
    "DAPO as released (arXiv:2503.14476)": Traits("dapo", "group_std", "token_mean", True, True),
    "GRPO (arXiv:2402.03300), without its KL": Traits("dapo", "group_std", "sample_mean", False, False),
    "Dr. GRPO (arXiv:2503.20783)": Traits("dapo", "no_std", "constant", False, False),
    "CISPO (arXiv:2506.13585)": Traits("cispo", "group_std", "token_mean", None, True),
    "ScaleRL's CISPO (arXiv:2510.13786)": Traits(
        "cispo", "batch_std", "group_token_mean", None, True, "tis of all"
    ),
    "GSPO (arXiv:2507.18071)": Traits("gspo", "group_std", "sample_mean", None, False),
}
NAMES = (
    "objective.kind",
    "objective.advantage",
    "objective.normaliser",
    "objective.clip_high > clip_low",
    "rollout.dynamic_sampling",
    "objective.importance",
)


def name(config: Config) -> str:
    """Return the paper whose objective this is: `GSPO (arXiv:2507.18071)`. A combination that none of them
    has is named after the one of its kind that it departs from least.
    """
    objective = config.objective
    correction = f"{objective.importance} of {objective.importance_of}"
    is_usual = not config.is_corrected or objective.importance == "none" or correction == "tis of stale"
    traits = Traits(
        objective.kind, objective.advantage, objective.normaliser,
        objective.clip_high > objective.clip_low, config.rollout.dynamic_sampling,
        "usual" if is_usual else correction,
    )  # fmt: skip

    def departures(method: str) -> list[str]:
        pairs = zip(NAMES, traits, METHODS[method], strict=True)
        return [f"{name} = {str(own).lower()}" for name, own, other in pairs if other not in (own, None)]

    of_kind = [method for method, known in METHODS.items() if known.kind == objective.kind]
    nearest = min(of_kind, key=lambda method: len(departures(method)))
    changed = departures(nearest)
    return f"{nearest}, but {' and '.join(changed)}: a combination of no paper" if changed else nearest
