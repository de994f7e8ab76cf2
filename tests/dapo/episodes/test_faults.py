"""Whatever an environment does, each request is answered, or its group is lost with the reason."""

import pytest

from dapo.episodes import workers as workers_module
from dapo.types import Sample
from dapo.watch.worker import descendants
from tests.dapo.episodes.stage import Stage

INNOCENT = {"steps": ["ok", "wait 0.05", "done"]}
# what an environment does → what its lost group says
FAULTS = {
    "sleep": "step did not answer in rollout.turn_seconds=0.5",
    "loop": "step did not answer in rollout.turn_seconds=0.5",
    "raise": r"step raised ValueError: no such move \(.*obedient.py:\d+\)",
    "stop": r"step raised StopIteration.*obedient.py",
    "system": r"step raised SystemExit: 3 \(.*obedient.py",
    "keyboard": r"step raised KeyboardInterrupt.*obedient.py",
    "turn None": "step returned NoneType; expected a Turn",
    "turn 'text'": "step returned str; expected a Turn",
    "turn Turn()": "step returned no messages, and is not done",
    "turn Turn(is_done=True, reward=float('nan'))": "step returned a reward of nan; expected a finite number",
    "turn Turn(is_done=True, reward=10**400)": "step returned a reward of 1000",
    "turn Turn(is_done=True, reward=True)": "step returned a reward of True",
    "turn Turn(is_done=True, reward='1')": "step returned a reward of '1'",
    "turn Turn(is_done=True, is_correct=0.5)": "step returned is_correct=0.5; expected True, False or None",
    "turn Turn('hello')": "step returned str; expected a list",
    "message {'content': 'x'}": "step returned a message with role None",
    "message {'role': 'teacher', 'content': 'x'}": "step returned a message with role 'teacher'; known: user",
    "message {'role': 'user'}": r"step returned \{'role': 'user'\}; expected",
    "message {'role': 'user', 'content': None}": "step returned .*both text",
    "message {'role': 'user', 'content': 'x', 'at': {1}}": "step returned .*JSON",
    "message {'role': 'developer', 'content': 'x'}": "template cannot continue .* a developer message: no dev",
}
RESETS = {
    "raise": r"reset raised ValueError: no such row \(.*obedient.py:\d+\)",
    "none": "reset returned NoneType; expected a list",
    "empty": "reset returned no messages",
    "long": "reset returned first messages of .* tokens, beyond data.max_prompt_length=500",
    "much": "reset returned first messages of 10000000 characters",
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(workers_module, "SILENT", 1.0)


@pytest.fixture(scope="module")
def stage():
    with Stage() as made:
        made.play([INNOCENT])  # the worker is there
        yield made


@pytest.fixture(scope="module")
def played(stage) -> dict[str, Sample]:
    """Two samples of each kind of fault, side by side in one process, and innocent ones among them."""
    kinds = [{"steps": ["ok", what]} for what in FAULTS] + [{"reset": what, "steps": []} for what in RESETS]
    [pid] = worker_pids(stage)
    found = stage.play([each for kind in kinds for each in (kind, INNOCENT)])
    assert worker_pids(stage) == [pid], "nothing of this needs another process"
    return found


def worker_pids(stage) -> list[int]:
    return [pid for each in stage.workers.workers for pid in descendants(each.process.guardian.pid)]


@pytest.mark.parametrize(
    "number", range(len(FAULTS) + len(RESETS)), ids=[*FAULTS, *(f"reset: {k}" for k in RESETS)]
)
def test_a_faulty_environment_loses_its_group_and_no_other(played, number):
    lost, innocent = played[f"{2 * number}.0"], played[f"{2 * number + 1}.0"]
    assert lost.is_lost
    assert matches([*FAULTS.values(), *RESETS.values()][number], lost.text)
    assert "\n" not in lost.text
    assert_is_innocent(innocent)


def matches(pattern: str, text: str) -> bool:
    import re

    assert re.search(pattern, text), text
    return True


def assert_is_innocent(sample: Sample) -> None:
    assert sample.finish_reason == "stop" and sample.reward == 1.5 and sample.is_correct
    assert sample.episode.num_turns == 3
