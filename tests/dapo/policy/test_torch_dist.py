"""Checkpoints whose pickles would run code when they are read."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from dapo.config import ConfigError
from dapo.policy.chunks import Reader, read_metadata
from dapo.policy.megatron import Policy
from dapo.policy.torch_dist import ONLY_DATA
from tests.dapo.policy.test_megatron import config, shared  # noqa: F401  # fixtures


class Hostile:
    """A pickle of it makes a directory when it is read."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.fixture(scope="module")
def saved(shared: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    directory = tmp_path_factory.mktemp("checkpoint") / "policy"
    directory.mkdir()
    saving = shared.save(directory)
    saving.start(in_background=False)
    saving.finish()
    return directory


def replace_metadata(checkpoint: Path, hostile: Hostile) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(hostile))


def hide_in_metadata(checkpoint: Path, hostile: Hostile) -> None:
    metadata = read_metadata(checkpoint)
    metadata.planner_data = hostile
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def replace_common(checkpoint: Path, hostile: Hostile) -> None:
    torch.save({"num_updates": hostile}, checkpoint / "common.pt")


def replace_object(checkpoint: Path, hostile: Hostile) -> None:
    """Let an object among the tensors, which torch reads with any class in it, lie in another file."""
    metadata = read_metadata(checkpoint)
    assert isinstance(metadata, Metadata) and metadata.storage_data
    objects = [
        index
        for index in metadata.storage_data
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
    ]
    content = io.BytesIO()
    torch.save([hostile], content)
    (checkpoint / "other.distcp").write_bytes(content.getvalue())
    for index in objects:
        metadata.storage_data[index] = _StorageInfo("other.distcp", 0, len(content.getvalue()))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("damage", [replace_metadata, hide_in_metadata, replace_common, replace_object])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    damage: Callable[[Path, Hostile], None],
    shared: Policy,  # noqa: F811
    saved: Path,
    tmp_path: Path,
) -> None:
    checkpoint, trap = shutil.copytree(saved, tmp_path / "policy"), tmp_path / "trap"
    damage(checkpoint, Hostile(trap))
    with pytest.raises(
        ConfigError, match=r"policy(/.metadata)? names posix.mkdir, which no checkpoint needs"
    ) as error:
        shared.load(checkpoint)
    assert "\n" not in str(error.value) and "only your own checkpoints" in str(error.value)
    assert not trap.exists()
    assert ONLY_DATA not in os.environ, "what is read elsewhere is read as before"


@pytest.mark.parametrize("damage", [replace_metadata, hide_in_metadata])
def test_code_in_the_description_of_tensors_is_refused_by_the_tools_reader_too(
    damage: Callable[[Path, Hostile], None], saved: Path, tmp_path: Path
) -> None:
    checkpoint, trap = shutil.copytree(saved, tmp_path / "policy"), tmp_path / "trap"
    damage(checkpoint, Hostile(trap))
    with pytest.raises(ConfigError, match=r"names posix.mkdir"):
        Reader(checkpoint)
    assert not trap.exists()


def test_a_checkpoint_of_ours_loads(shared: Policy, saved: Path) -> None:  # noqa: F811
    shared.load(saved)
    assert Reader(saved).sizes


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        b"not a pickle",
        pickle.dumps({"files": 3}),
        pickle.dumps(torch.Size([2])),
        b"\x80\x04h\x05.",
    ],
)
def test_a_description_that_is_none_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_metadata(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
