"""Which models a run exports, with which record; and what run.keep_best may be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dapo import config as configs
from dapo.config import Config, ConfigError, plain_yaml
from dapo.plan import semantics
from dapo.policy import write_weights
from dapo.policy.exports import export
from dapo.policy.megatron import Policy
from dapo.report import curves
from dapo.report.card import card
from dapo.rollout.evaluate import check_best
from dapo.types import StorageError
from tests.dapo.policy.test_megatron import config, params, policy, shared  # noqa: F401  # fixtures

METRIC = "eval/heldout/mean"


@pytest.fixture
def run(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:  # noqa: F811
    """A run of four steps with its record, as it is when its first step begins."""
    of_run = {"dir": tmp_path / "mine", "steps": 4, "keep_best": METRIC, "export_every": 2}
    made = policy.config.model_copy(update={"run": policy.config.run.model_copy(update=of_run)})
    monkeypatch.setattr(policy, "config", made)
    made.run.dir.mkdir()
    text = semantics.dump(semantics.manifest(made, "0123abcd"))
    (made.run.dir / "semantics.json").write_text(text)
    return made


def norm_of(directory: Path) -> float:
    """The value that `step_to` has put into a model."""
    return float(load_file(directory / "model.safetensors")["model.norm.weight"][0])


def step_to(policy: Policy, step: int, value: float | None) -> list[str]:  # noqa: F811
    """Export after `step` steps, whose evaluation gave `value`, and return what was written.

    The final norm is the step.
    """
    params(policy)["decoder.final_layernorm.weight"].data.fill_(step)
    folder = policy.config.run.dir
    before = {path: path.stat().st_ino for path in folder.glob("hf*")}
    scores = {} if value is None else {"eval/accuracy": value, METRIC: value}
    export(step, policy, scores)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "groups/mixed": 0.5} | scores) + "\n")
    return sorted(path.name for path in folder.glob("hf*") if before.get(path) != path.stat().st_ino)


def test_every_k_steps_and_whenever_the_metric_is_larger_than_ever(policy: Policy, run: Config) -> None:  # noqa: F811
    assert step_to(policy, 0, 0.2) == ["hf-best"], "the model before the first step is not exported by itself"
    assert step_to(policy, 1, 0.4) == ["hf-best"]
    assert step_to(policy, 2, 0.4) == ["hf-step-000002"], "equal is not larger"
    assert norm_of(run.run.dir / "hf-best") == 1
    assert step_to(policy, 3, None) == []
    assert step_to(policy, 2, 0.3) == ["hf-step-000002"], "a resume repeats the step"
    assert step_to(policy, 4, 0.5) == ["hf", "hf-best", "hf-step-000004"]
    assert norm_of(run.run.dir / "hf") == norm_of(run.run.dir / "hf-best") == 4
    assert norm_of(run.run.dir / "hf-step-000002") == 2
    assert "more than" not in (run.run.dir / "hf-step-000002/README.md").read_text()
    assert not list(run.run.dir.glob(".*"))


def test_without_the_options_there_is_only_the_end(
    policy: Policy,  # noqa: F811
    run: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = run.run.model_copy(update={"keep_best": None, "export_every": None})
    monkeypatch.setattr(policy, "config", run.model_copy(update={"run": plain}))
    assert [step_to(policy, step, 0.1 * step) for step in range(5)] == [[], [], [], [], ["hf"]]


def test_of_another_metric_the_best_is_looked_for_anew(
    policy: Policy,  # noqa: F811
    run: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step_to(policy, 1, 0.9)
    other = run.run.model_copy(update={"keep_best": "eval/heldout/majority"})
    monkeypatch.setattr(policy, "config", run.model_copy(update={"run": other}))
    export(3, policy, {"eval/heldout/majority": 0.1})
    assert json.loads((run.run.dir / "hf-best/export.json").read_text()) == {
        "step": 3,
        "metrics": {"eval/heldout/majority": 0.1},
    }


@pytest.mark.parametrize("damage", ["", "[]", '{"metrics": {"eval/heldout/mean": "high"}}'])
def test_a_damaged_record_of_the_best_is_replaced_with_a_warning(
    policy: Policy,  # noqa: F811
    run: Config,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    step_to(policy, 1, 0.9)
    (run.run.dir / "hf-best/export.json").write_text(damage)
    assert step_to(policy, 3, 0.1) == ["hf-best"]
    assert re.search(
        r"^warning: .*hf-best/export.json is damaged .*: hf-best is replaced\n", capsys.readouterr().err
    )


def test_a_full_disk_stops_the_run_and_the_best_so_far_stays(
    policy: Policy,  # noqa: F811
    run: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step_to(policy, 1, 0.1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(StorageError, match="hf-best cannot be written"):
        step_to(policy, 3, 0.2)
    assert norm_of(run.run.dir / "hf-best") == 1


def test_the_record_beside_the_model_says_what_it_is(
    policy: Policy,  # noqa: F811
    run: Config,
    tmp_path: Path,
) -> None:
    step_to(policy, 1, 0.25)
    step_to(policy, 2, 0.375)
    folder = run.run.dir / "hf-best"
    text = (folder / "README.md").read_text()
    assert re.match(r"---\nlibrary_name: transformers\n[^#]*---\n\n# mine, step 2\n", text)
    assert f"`{run.policy.model}` after 2 of 4 steps" in text
    assert f"`{METRIC}` is 0.375, more than at any step evaluated before." in text
    assert f"| `{METRIC}` | 0.375 |" in text and "after step 2: 4 samples a problem" in text
    assert f"dapo {semantics.stack.installed('dapo-rl')}" in text and f"torch {torch.__version__}" in text
    assert "hash of the training prompts: 0123abcd" in text
    dumped = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert dumped and plain_yaml.load(dumped[1]) == run.model_dump(mode="json")
    found = json.loads((folder / "export.json").read_text())
    assert found == {"step": 2, "metrics": {"eval/accuracy": 0.375, METRIC: 0.375}}
    write_weights.carry_over(folder, tmp_path, torch.float32)
    assert not (tmp_path / "export.json").exists(), "a model made of this one is another"
    assert "(curves.png)" in text and (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_made_is_left_out(
    policy: Policy,  # noqa: F811
    run: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(curves, "plot", fail)
    assert step_to(policy, 2, None) == ["hf-step-000002"]
    assert "warning: curves.png failed: no font" in capsys.readouterr().err
    text = (run.run.dir / "hf-step-000002/README.md").read_text()
    assert "curves.png" not in text and "## Evaluation" not in text


def test_a_model_of_the_hub_is_named_by_its_commit(config: Config) -> None:  # noqa: F811
    manifest = {"hub": {"policy.model": ["Qwen/Qwen2.5-7B@0123"]}, "versions": {}, "prompts": ""}
    text = card(config, manifest, [{"step": 3}], is_best=False, has_curves=False)
    assert "\nbase_model: Qwen/Qwen2.5-7B\n" in text
    assert "[Qwen/Qwen2.5-7B](https://huggingface.co/Qwen/Qwen2.5-7B/tree/0123) after 3 of" in text


FINDS: Any = SimpleNamespace(answer_of=str)
FINDS_NONE: Any = SimpleNamespace(answer_of=None)


def test_only_a_metric_that_evaluation_will_have_can_be_kept_by() -> None:
    check_best(None, [], FINDS)
    for metric in ("eval/accuracy", "eval/aime/mean", "eval/aime/majority", "eval/b/pass"):
        check_best(metric, ["aime", "b"], FINDS)
    for metric in ("eval/aime/mean@32", "eval/aime/truncated", "aime/mean"):
        with pytest.raises(ConfigError) as error:
            check_best(metric, ["aime"], FINDS)
        said = "expected one of eval/accuracy, eval/aime/mean, eval/aime/majority, eval/aime/pass"
        assert str(error.value) == f"run.keep_best={metric}: {said}"
    with pytest.raises(ConfigError, match=r"accuracy, eval/aime/mean, eval/aime/pass$"):
        check_best("eval/aime/majority", ["aime"], FINDS_NONE)
    with pytest.raises(ConfigError, match=r"nothing is evaluated: set eval\.data$"):
        check_best("eval/accuracy", [], FINDS)


@pytest.mark.parametrize("value", ["0", "-5", "2.5", "often"])
def test_steps_between_exports_are_a_positive_number(value: str) -> None:
    with pytest.raises(ConfigError, match=rf"run.export_every='?{value}'?: input should be "):
        configs.load("examples/arithmetic/config.yaml", [f"run.export_every={value}"])
