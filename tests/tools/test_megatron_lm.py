"""Checkpoints of Megatron-LM are read and written by the tools."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo.model.families import read_shape
from dapo.policy import megatron_lm
from dapo.policy.chunks import Reader
from tests.distributed.launch import measured
from tests.tools.test_convert import BASE, changed_base, flip_a_bit, refusal

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import check_checkpoint
import hf_to_megatron
import megatron_to_hf


@pytest.mark.parametrize("model", ["qwen2", "qwen3", "qwen3_moe"])
def test_its_checkpoints_go_both_ways_to_the_bit(model: str) -> None:
    """It is Megatron-core that writes the one and reads the other, and computes with what it has read."""
    result = measured("tests.distributed.megatron_lm", 2)[model]
    assert result["status"] == [0, 0, 0, 0, 0]
    assert result["unequal"] == 0
    assert result["logits"] < 1e-5, "the same tensors, another model"
    assert (result["arguments"], result["iteration"], result["heads"]) == (4, 0, 8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("exported") / "megatron_lm"
    assert hf_to_megatron.main([str(BASE), str(target), "--megatron-lm"]) == 0
    return target


@pytest.fixture
def theirs(exported: Path, tmp_path: Path) -> Path:
    """A checkpoint as Megatron-LM leaves it: without a model's description."""
    shutil.copytree(exported / "release", tmp_path / "theirs/iter_0000007")
    (tmp_path / "theirs" / megatron_lm.TRACKER).write_text("7\n")
    return tmp_path / "theirs"


def set_arguments(checkpoint: Path, **changes: Any) -> None:
    args = argparse.Namespace(**megatron_lm.arguments(read_shape(BASE)) | changes)
    torch.save({"args": args, "iteration": 7}, checkpoint / "common.pt")


def test_a_folder_and_its_newest_iteration_are_the_same_model(theirs: Path, exported: Path) -> None:
    for source in (theirs, theirs / "iter_0000007"):
        assert check_checkpoint.main([str(source), str(BASE), "--model", str(BASE)]) == 0
    assert check_checkpoint.main([str(exported), str(BASE)]) == 0, "what was exported needs no --model"


def test_another_model_is_not_the_same(theirs: Path, tmp_path: Path) -> None:
    other = changed_base(tmp_path / "other", lambda tensors: tensors["model.norm.weight"].add_(1e-3))
    assert check_checkpoint.main([str(theirs), str(other), "--model", str(BASE)]) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 8, "kv_channels": 8}, "num_attention_heads=8 there, 4 here; kv_channels=8"),
        ({"group_query_attention": False, "num_query_groups": 1}, "num_query_groups=4 there, 2 here"),
        ({"rotary_base": 500000}, "rotary_base=500000 there, 10000.0 here"),
        ({"swiglu": False}, "swiglu=False there, True here"),
    ],
)
def test_arguments_that_contradict_the_config_are_refused_by_name(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    set_arguments(theirs / "iter_0000007", **changes)
    line = refusal(megatron_to_hf, theirs, tmp_path / "out", "--model", BASE, capsys=capsys)
    assert "iter_0000007 is a checkpoint of another model" in line and said in line
    assert not (tmp_path / "out").exists()


def test_arguments_of_other_versions_are_not_missed(theirs: Path, tmp_path: Path) -> None:
    args = argparse.Namespace(rotary_base=10000, later=1)
    torch.save({"args": args, "random": torch.ones(3)}, theirs / "iter_0000007/common.pt")
    assert megatron_to_hf.main([str(theirs), str(tmp_path / "out"), "--model", str(BASE)]) == 0
    torch.save({"args": argparse.Namespace()}, theirs / "iter_0000007/common.pt")
    assert megatron_to_hf.main([str(theirs), str(tmp_path / "empty"), "--model", str(BASE)]) == 0
    (theirs / "iter_0000007/common.pt").unlink()
    assert megatron_to_hf.main([str(theirs), str(tmp_path / "none"), "--model", str(BASE)]) == 0


class Odd:
    """No class of Megatron-LM's."""


class Hostile:
    """A pickle of it makes a directory when it is read."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),), {"heads": 3}, iter([1]), iter({"a": 2}.items())


def test_code_among_the_arguments_is_not_run(theirs: Path, tmp_path: Path) -> None:
    """Arguments may be of classes that are not here. What a pickle names is not even imported."""
    set_arguments(theirs / "iter_0000007", hostile=Hostile(tmp_path / "trap"), keys={Odd(): 1})
    reader = Reader(theirs / "iter_0000007")
    assert megatron_lm.read_arguments(reader)["num_layers"] == read_shape(BASE).num_layers
    assert megatron_to_hf.main([str(theirs), str(tmp_path / "out"), "--model", str(BASE)]) == 0
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / megatron_lm.TRACKER).write_text("../../x"), "'../../x' is no iteration"),
        (lambda folder: (folder / megatron_lm.TRACKER).write_text("8"), "iter_0000008: no Megatron checkp"),
        (lambda folder: flip_a_bit(folder / "iter_0000007/__0_0.distcp"), "is not what was written"),
        (lambda folder: (folder / "iter_0000007/common.pt").write_bytes(b"PK"), "what is no tensor cannot"),
        (
            lambda folder: torch.save([], folder / "iter_0000007/common.pt"),
            "what is no tensor cannot be read",
        ),
    ],
)
def test_what_is_damaged_is_one_line(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, said: str
) -> None:
    damage(theirs)
    assert said in refusal(megatron_to_hf, theirs, tmp_path / "out", "--model", BASE, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_whose_model_is_not_known_is_refused(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tool in (megatron_to_hf, hf_to_megatron):
        assert "its model is not known; name it with --model" in refusal(
            tool, theirs, tmp_path / "out", capsys=capsys
        )
