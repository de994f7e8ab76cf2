"""Which checkpoints are kept, which one a run goes on from, and what a save that fails leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dapo import checkpoint, files
from dapo.checkpoint import CheckpointError, Checkpoints, superseded
from dapo.config import ConfigError
from dapo.model.families import read_shape
from dapo.policy.chunks import Damaged
from dapo.policy.megatron import PolicyError
from dapo.types import StorageError, reason
from tests.conftest import make_config

BASE = Path(__file__).parents[2] / "examples/arithmetic/base"


@pytest.mark.parametrize(
    ("steps", "saved", "keep", "keep_every", "gone"),
    [
        ([10, 20, 30], 30, 2, None, [10]),
        ([10, 20, 30, 40, 50], 50, 1, 20, [30, 10]),
        ([5], 5, 1, None, []),
        ([40, 30, 23, 20], 23, 2, 20, []),  # 40 and 30 were damaged: the run went on from 20
        ([40, 30, 23, 20], 23, 1, None, [20]),
        ([40, 30, 20], 30, 1, None, [20]),
    ],
)
def test_what_was_just_saved_stays_and_newer_ones_count_for_nothing(steps, saved, keep, keep_every, gone):
    assert superseded(steps, saved, keep, keep_every) == gone


class OneRank:
    """The mesh of a single process."""

    is_main, rank, world = True, 0, 1

    def on_main(self, function: Any, *args: Any) -> Any:
        return function(*args)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def sum(self, values: np.ndarray) -> np.ndarray:
        return values

    def max(self, value: float) -> float:
        return value


class FakePolicy:
    """A policy of one file, whose parameters may be broken, and whose disk or memory may be full."""

    def __init__(self) -> None:
        self.shape = read_shape(BASE)
        self.is_finite = True
        self.failure: BaseException | None = None
        self.late_failure: BaseException | None = None

    def check_finite(self) -> None:
        if not self.is_finite:
            raise PolicyError("1 parameters are not finite")

    def save(self, directory: Path) -> Any:
        def start(in_background: bool) -> None:
            (directory / "tensors").write_text("some")
            if self.failure:
                raise self.failure

        def finish() -> dict[str, Any]:
            if self.late_failure:
                raise self.late_failure
            return {"policy/tensors": (4, None)}

        return SimpleNamespace(num_bytes=4, start=start, is_written=lambda: True, finish=finish)

    def load(self, directory: Path) -> None:
        if (directory / "tensors").read_text() == "sore":
            raise Damaged(f"{directory / 'tensors'} is not what was written: the checksum of x differs")
        assert (directory / "tensors").read_text() == "some"
        self.loaded = directory


class FakeSampler:
    def save(self, directory: Path) -> None:
        (directory / "rollouts.json").write_text("{}")

    def load(self, directory: Path) -> None:
        assert (directory / "rollouts.json").exists()
        self.loaded = directory


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Any:
    def check(path: Path, shape: Any) -> None:
        assert path.name.startswith("step-") and shape.vocab_size
        policy.checked = path

    policy = FakePolicy()
    monkeypatch.setattr(checkpoint, "check_checkpoint", check)
    return policy


def checkpoints_of(tmp_path: Path, *options: str) -> Checkpoints:
    config = make_config(tmp_path, "run.save_every=1", "run.steps=100", *options)
    config.run.dir.mkdir(exist_ok=True)
    return Checkpoints(config.run, OneRank())  # type: ignore[arg-type]


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())


def resume(tmp_path: Path, policy: Any, *options: str) -> tuple[Checkpoints, int]:
    found, sampler = checkpoints_of(tmp_path, *options), FakeSampler()
    directory = found.find(policy.shape)
    step = found.load(policy, sampler)
    if directory:
        assert policy.checked == directory, "that it is of this model"
        assert policy.loaded == directory / "policy" and sampler.loaded == directory
    return found, step


def save(checkpoints: Checkpoints, policy: Any, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, policy, FakeSampler())


def test_a_policy_that_is_not_finite_is_not_saved_and_the_checkpoint_before_stays(
    tmp_path: Path, policy: Any
) -> None:
    checkpoints = checkpoints_of(tmp_path, "run.keep_checkpoints=1")
    save(checkpoints, policy, 1)
    policy.is_finite = False
    with pytest.raises(PolicyError, match="not finite"):
        save(checkpoints, policy, 2)
    assert names(tmp_path) == ["step-000001"]
    _, step = resume(tmp_path, policy)
    assert step == 1


def test_a_checkpoint_that_is_still_being_written_is_finished_before_a_broken_policy_is_refused(
    tmp_path: Path, policy: Any
) -> None:
    checkpoints = checkpoints_of(tmp_path)
    checkpoints.save(1, policy, FakeSampler(), wait=False)
    policy.is_finite = False
    with pytest.raises(PolicyError):
        save(checkpoints, policy, 2)
    assert names(tmp_path) == ["step-000001"]


def test_a_checkpoint_that_is_written_meanwhile_has_its_name_before_the_next_one_is_due(
    tmp_path: Path, policy: Any
) -> None:
    checkpoints = checkpoints_of(tmp_path, "run.save_every=5", "run.async_save=true")
    for step, whole in ((5, []), (6, ["step-000005"]), (7, ["step-000005"])):
        checkpoints.maybe_save(step, policy, FakeSampler())
        assert [name for name in names(tmp_path) if name.startswith("step-")] == whole


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (MemoryError(), "MemoryError"),
        (OSError(28, "No space left"), "No space left"),
        (StorageError("carried.parquet cannot be written"), "carried.parquet cannot be written"),
    ],
)
def test_a_save_that_fails_says_why_and_leaves_the_checkpoint_before(
    tmp_path: Path, policy: Any, failure: BaseException, said: str
) -> None:
    checkpoints = checkpoints_of(tmp_path)
    save(checkpoints, policy, 1)
    policy.failure = failure
    expected = rf"step-000002 cannot be written, \d+\.\d GiB free there: .*{said}; those before it are whole"
    with pytest.raises(CheckpointError, match=expected):
        save(checkpoints, policy, 2)
    assert names(tmp_path) == ["step-000001"]


def test_a_step_whose_save_failed_at_its_end_can_be_saved_again(tmp_path: Path, policy: Any) -> None:
    checkpoints = checkpoints_of(tmp_path)
    policy.late_failure = OSError(28, "No space left")
    with pytest.raises(CheckpointError, match="step-000001 cannot be written"):
        save(checkpoints, policy, 1)
    assert names(tmp_path) == []
    policy.late_failure = None
    save(checkpoints, policy, 1)
    assert names(tmp_path) == ["step-000001"]


def test_an_error_without_a_message_is_named_by_its_kind() -> None:
    assert [reason(error) for error in (MemoryError(), TimeoutError(), ValueError("a\n  b"))] == [
        "MemoryError",
        "TimeoutError",
        "a b",
    ]


def test_a_run_goes_back_to_the_step_it_is_sent_to_and_newer_checkpoints_are_set_aside(
    tmp_path: Path, policy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save(checkpoints_of(tmp_path, "run.keep_checkpoints=9"), policy, 10, 20, 30)
    checkpoints, step = resume(tmp_path, policy, "run.resume=10")
    assert step == 10
    assert names(tmp_path) == ["aside-step-000020", "aside-step-000030", "step-000010"]
    save(checkpoints, policy, 15)
    assert resume(tmp_path, policy)[1] == 15, "and not the abandoned step 30"
    save(checkpoints, policy, 20)
    capsys.readouterr()
    resume(tmp_path, policy, "run.resume=15")
    assert names(tmp_path) == ["aside-step-000020", "aside-step-000020-2", "aside-step-000030", "step-000015"]
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: run.resume=15: ")
    assert line.endswith("step-000020 is newer, and is kept as aside-step-000020-2")


def test_nothing_is_set_aside_by_a_run_that_is_refused(tmp_path: Path, policy: Any) -> None:
    save(checkpoints_of(tmp_path), policy, 10, 20)
    found = checkpoints_of(tmp_path, "run.resume=10")
    found.find(policy.shape)
    (tmp_path / "run/checkpoints/step-000010/policy/tensors").write_text("of another data")
    with pytest.raises(AssertionError):
        found.load(policy, FakeSampler())
    assert names(tmp_path) == ["step-000010", "step-000020"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["run.resume=never"], r"run.dir=.*/run already holds a run and run.resume=never: choose another"),
        (["run.resume=15"], r"run.resume=15: no such checkpoint below .*; there are steps 20, 10"),
        (["run.resume=20"], r"run.resume=20: .*step-000020 is damaged \(rollouts.json .*choose another step"),
        (
            ["run.steps=9"],
            r"has done 10 steps, more than run.steps=9: raise it, go back with run.resume=STEP",
        ),
        (["run.resume=10", "run.steps=9"], r"has done 10 steps, more than run.steps=9"),
    ],
)
def test_a_step_that_a_run_cannot_go_on_from_is_refused(
    tmp_path: Path, policy: Any, options: list[str], said: str
) -> None:
    save(checkpoints_of(tmp_path), policy, 10, 20)
    (tmp_path / "run/checkpoints/step-000020/rollouts.json").write_text("{ }")
    with pytest.raises(ConfigError, match=said):
        resume(tmp_path, policy, *options)


def test_a_run_that_is_done_is_found_done(tmp_path: Path, policy: Any) -> None:
    save(checkpoints_of(tmp_path), policy, 10)
    assert resume(tmp_path, policy, "run.steps=10")[1] == 10


@pytest.mark.parametrize("resumes", [True, False])
def test_checkpoints_behind_links_are_read_replaced_and_removed(
    tmp_path: Path, policy: Any, resumes: bool
) -> None:
    save(checkpoints_of(tmp_path), policy, 1)
    elsewhere = tmp_path / "elsewhere"
    shutil.move(tmp_path / "run/checkpoints/step-000001", elsewhere)
    (tmp_path / "run/checkpoints/step-000001").symlink_to(elsewhere)
    checkpoints, step = resume(tmp_path, policy, "run.keep_checkpoints=1")
    assert step == 1
    if not resumes:
        checkpoints.saved = -1
        save(checkpoints, policy, 1)
        assert not (tmp_path / "run/checkpoints/step-000001").is_symlink()
    save(checkpoints, policy, 2)
    assert names(tmp_path) == ["step-000002"]
    assert files.damage(elsewhere) is None, "what the link led to is somebody's"


def test_a_directory_of_checkpoints_that_is_a_link_works(tmp_path: Path, policy: Any) -> None:
    checkpoints = checkpoints_of(tmp_path, "run.keep_checkpoints=1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "elsewhere")
    save(checkpoints, policy, 1, 2)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["step-000002"]
    (tmp_path / "elsewhere").rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=r"checkpoints cannot be written: "):
        resume(tmp_path, policy)


def test_an_old_checkpoint_that_cannot_be_removed_is_only_named(
    tmp_path: Path, policy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = checkpoints_of(tmp_path, "run.keep_checkpoints=1")
    save(checkpoints, policy, 1)
    remove = files.remove

    def busy(path: Path) -> None:
        if path.name == "step-000001":
            raise OSError(16, "Device or resource busy")
        remove(path)

    monkeypatch.setattr(files, "remove", busy)
    save(checkpoints, policy, 2)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "step-000001 cannot be removed: Device or resource busy" in line
    assert json.loads((tmp_path / "run/checkpoints/step-000002/manifest.json").read_text())["step"] == 2


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, policy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save(checkpoints_of(tmp_path), policy, 1, 2)
    (tmp_path / "run/checkpoints/step-000002/rollouts.json").write_text("[]")
    _, step = resume(tmp_path, policy)
    assert step == 1
    warned = capsys.readouterr().err
    assert "step-000002 is damaged (rollouts.json" in warned and "using the one before it" in warned


def test_tensors_that_prove_damaged_when_they_are_read_are_those_of_the_checkpoint_before(
    tmp_path: Path, policy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save(checkpoints_of(tmp_path, "run.keep_checkpoints=3"), policy, 1, 2, 3)
    for step in (2, 3):
        (tmp_path / f"run/checkpoints/step-00000{step}/policy/tensors").write_text("sore")
    found, sampler = checkpoints_of(tmp_path), FakeSampler()
    found.find(policy.shape)
    assert found.newest == 3
    assert found.load(policy, sampler) == 1
    one = tmp_path / "run/checkpoints/step-000001"
    assert policy.loaded == one / "policy" and sampler.loaded == policy.checked == one
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and "tensors is not what was written" in warnings[0]
    assert "step-000002 is damaged" in warnings[1] and "using the one before it" in warnings[1]
    found = checkpoints_of(tmp_path, "run.resume=2")
    found.find(policy.shape)
    with pytest.raises(
        ConfigError, match=r"^run.resume=2: .* is damaged \(.*choose another step, or restore it"
    ):
        found.load(policy, sampler)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]


def test_a_checkpoint_for_which_there_is_no_room_is_not_begun(
    tmp_path: Path, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpoints_of(tmp_path)
    save(checkpoints, policy, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3))  # the policy has 4 bytes
    with pytest.raises(CheckpointError, match="step-000002 cannot be written"):
        save(checkpoints, policy, 2)
    assert names(tmp_path) == ["step-000001"]
