"""Estimates what a step would ask for under each kind of sampling, from a record of prompts.

A stream passes by every prompt of the run equally often, so chances of a step are means over prompts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dapo import config
from dapo.config import ConfigError
from dapo.rollout import record
from dapo.rollout.forecast import PROOF, Forecast, Rules, all_correct


class Cost(NamedTuple):
    """Means over the prompts that come by: samples that are asked for, and the chance of a mixed group."""

    samples: float
    mixed: float

    @property
    def per_used(self) -> float:
        """Samples that are asked for until one group is mixed."""
        return self.samples / max(self.mixed, 1e-9)


def cost(forecast: Forecast) -> Cost:
    """Return what the step after the record's last one would cost by the forecast's own rules.

    Prompts that have left the run do not come by. Left out are surplus groups, the cap rollout.max_rounds,
    and that a step asks for no prompt twice, which matters where it passes by nearly all of them.
    """
    rules = forecast.rules
    odds = forecast.table(np.flatnonzero(~forecast.is_dropped), forecast.num_steps)
    if not len(odds):
        return Cost(0.0, 0.0)
    alpha, beta, _, mixed, ask, after_wrong, after_right = odds.T
    samples = np.full(len(odds), float(rules.group_size))
    for one, other, rest in ((beta, alpha, after_wrong), (alpha, beta, after_right)):
        is_doomed = rest < rules.stop_below  # without a first wave rest is 0, and nothing below changes
        stopped = is_doomed * (1 - PROOF) * all_correct(one, other, rules.wave)
        samples -= stopped * (rules.group_size - rules.wave)
        mixed = mixed - stopped * rest
    return Cost(float(np.mean(ask * samples)), float(np.mean(ask * mixed)))


def describe(path: Path, rollout: config.Rollout) -> list[str]:
    """Return what the record at `path` says, and what it lets expect of the next step, a line each.

    Without rollout.first_wave a quarter of the group is tried as one.

    Raises:
        ConfigError: there is no such file, or it is damaged, or of another group_size.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no record of prompts is there; expected a run's {record.NAME}")
    wave = rollout.first_wave or max(1, rollout.group_size // 4)
    plain = replace(Rules.of(rollout), is_skipping=False, first_wave=0)
    forecast = record.forecast_of(path, plain)
    plainly, said = cost(forecast), []
    for name, is_skipping, first_wave in (
        ("forecast=skip", True, 0),
        (f"first_wave={wave}", False, wave),
        ("both", True, wave),
    ):
        forecast.rules = replace(plain, is_skipping=is_skipping, first_wave=first_wave)
        each = cost(forecast).per_used
        said.append(f"{name} {rollout.prompts_per_step * each:,.0f} ({each:.1f})")
    num_asked, num_dropped = np.count_nonzero(forecast.asked), np.count_nonzero(forecast.is_dropped)
    left = f", {num_dropped:,} have left the run" if num_dropped else ""
    total = rollout.prompts_per_step * plainly.per_used
    most = rollout.prompts_per_round * rollout.max_rounds * rollout.group_size
    cap = f"; rollout.max_rounds allows {most:,}" if total > most else ""
    return [
        f"record    {num_asked:,} of {len(forecast.asked):,} prompts were asked for in "
        f"{forecast.num_steps:,} steps{left}; {plainly.mixed:.0%} of groups are expected to be mixed",
        f"sampling  {rollout.prompts_per_step:,} mixed groups take {total:,.0f} samples "
        f"({plainly.per_used:.1f} each); with {', '.join(said)}{cap}",
    ]
