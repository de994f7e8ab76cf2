"""The part of Rollouts that a checkpoint holds: position in the data, open groups, the record of prompts."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dapo.config import Config, ConfigError
from dapo.model.routing import Routing
from dapo.rollout import dump, record
from dapo.rollout.asking import Asking, Question
from dapo.rollout.collector import Collector
from dapo.rollout.forecast import Forecast, Odds
from dapo.rollout.prompts import PromptStream, Visit
from dapo.types import Group


class Resumable:
    """Base of Rollouts: saves and loads everything that the next step depends on."""

    config: Config
    prompts: PromptStream
    forecast: Forecast
    asking: Asking
    dumps: dump.Writer
    collector: Collector | None
    num_empty_steps: int
    mixed_fraction: float
    routing: Routing | None
    # groups that an earlier process asked for and that are not learnt from yet, in request order; without
    # samples if they were unfinished
    carried: list[Group]
    questions: dict[int, Question]  # theirs, by id

    def save(self, directory: Path) -> None:
        """Write everything that the next step depends on into `directory`, when nothing else is being
        written.
        """
        self.dumps.finish()
        with self.at_rest():
            if self.collector:
                self.asking.put_back_ahead()
                self.carried, self.questions = self.collector.open_groups(), self.asking.questions
            state, carried = self.state_dict(), self.carried
        (directory / "rollouts.json").write_text(json.dumps(state))
        dump.write_groups(directory / "carried.parquet", carried)
        if self.collector:
            self.carried = []
        if self.forecast.asked.any():
            record.write(directory / record.NAME, self.forecast, self.prompts.data)
            record.write(self.config.run.dir / record.NAME, self.forecast, self.prompts.data)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote.

        Raises:
            ConfigError: the data has changed under the run.
        """
        self.load_state_dict(read_state(directory), directory / record.NAME)
        whole = {group.id: group for group in dump.read_groups(directory / "carried.parquet")}
        for group in self.carried:
            if found := whole.get(group.id):
                group.samples = found.samples
                if not np.array_equal(found.prompt.tokens, group.prompt.tokens):  # an environment's
                    group.prompt = replace(group.prompt, tokens=found.prompt.tokens)
            if self.routing and any(sample.routes is None for sample in group.samples):
                group.samples = []  # sampled before policy.routing_replay was set: asked for again

    def state_dict(self) -> dict[str, Any]:
        """Return the state but for the samples of carried groups."""
        return {
            "prompts": self.prompts.state_dict(),
            "num_empty_steps": self.num_empty_steps,
            "mixed_share": self.mixed_fraction,
            "carried": [
                [group.id, visit.index, visit.epoch, [*odds]]
                for group in self.carried
                for visit, odds in [self.questions[group.id]]
            ],
        }

    def load_state_dict(self, state: dict[str, Any], record_of_prompts: Path | None = None) -> None:
        """Restore what `state_dict` returned, and the record that was written beside it.

        Raises:
            ConfigError: the data has changed under the run, or the record cannot be used.
        """
        self.prompts.load_state_dict(state["prompts"])
        self.num_empty_steps = state["num_empty_steps"]
        self.mixed_fraction = state["mixed_share"]
        if record_of_prompts and record_of_prompts.exists():  # version 0.1.0 kept none
            self._load_record(record_of_prompts)
        self.carried, self.questions = [], {}
        for id, index, *question in state["carried"]:
            epoch, odds = question or (0, self.forecast.odds(np.array([index]), self.forecast.num_steps)[0])
            self.carried.append(Group(id, self.prompts.prompts[index]))
            self.questions[id] = Question(Visit(index, epoch, id), Odds(*odds))

    def _load_record(self, path: Path) -> None:
        """Read the record of prompts. One that does not fit is left, and a new one begins, if no forecast is
        used: nothing depends on it.
        """
        try:
            record.read(path, self.forecast, self.prompts.data)
        except ConfigError as error:
            if self.forecast.rules.is_used:
                raise
            print(f"warning: {error}; the record of prompts begins anew", file=sys.stderr, flush=True)

    def at_rest(self) -> AbstractContextManager[object]:
        """Return a block in which the collector changes nothing."""
        return self.collector.changed if self.collector else nullcontext()


def read_state(directory: Path) -> dict[str, Any]:
    """Read the `state_dict` that `Rollouts.save` wrote."""
    state: dict[str, Any] = json.loads((directory / "rollouts.json").read_text())
    return state
