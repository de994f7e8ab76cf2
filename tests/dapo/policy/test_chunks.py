"""Boxes of tensors read from a checkpoint's files, in which every damage is found; and their writing."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dapo.files import ChunkFile
from dapo.policy import chunks, torch_dist
from dapo.policy.chunks import Box, Damaged, Reader, Writer
from dapo.policy.megatron import Policy
from tests.dapo.policy.test_megatron import (  # noqa: F401  # fixtures
    MIXED,
    config,
    make_groups,
    placed,
    policy,
    shared,
    state_of,
)

LAYERS, ROWS, COLUMNS = 3, 5, 4


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of a tensor by layer, and of one that is whole."""
    torch.manual_seed(0)
    tensors = {"layers": torch.randn(LAYERS, ROWS, COLUMNS), "whole": torch.randn(ROWS).bfloat16()}
    writer = Writer(tmp_path, 2**20)
    for layer in range(LAYERS):
        writer.write("layers", tensors["layers"][layer], (layer,), (LAYERS,))
    writer.write("whole", tensors["whole"])
    writer.close()
    return tmp_path, tensors


def test_any_box_is_read_whichever_chunks_it_is_in(written: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, tensors = written
    rng = np.random.default_rng(0)
    boxes, wanted = [], []
    for _ in range(50):
        begins = [int(rng.integers(n)) for n in (LAYERS, ROWS, COLUMNS)]
        ends = [int(rng.integers(b, n)) + 1 for b, n in zip(begins, (LAYERS, ROWS, COLUMNS), strict=True)]
        part = tensors["layers"][tuple(slice(b, e) for b, e in zip(begins, ends, strict=True))]
        boxes.append(Box("layers", tuple(begins), torch.full(part.shape, torch.nan)))
        wanted.append(part)
    # without its first dimension; and in memory with gaps
    boxes += [Box("layers", (1, 0, 0), torch.empty(ROWS, COLUMNS)), Box("whole", (1,), torch.empty(6)[::2])]
    wanted += [tensors["layers"][1], tensors["whole"][1:4].float()]
    Reader(directory).fill(boxes)
    assert all(torch.equal(box.out, part) for box, part in zip(boxes, wanted, strict=True))


def test_what_lies_beyond_the_saved_tensor_stays(written: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, tensors = written
    padded = torch.full((ROWS + 2,), 7.0)
    Reader(directory).fill([Box("whole", (0,), padded)])
    assert torch.equal(padded, torch.cat([tensors["whole"].float(), torch.tensor([7.0, 7.0])]))
    Reader(directory).fill([Box("whole", (ROWS,), padded)])
    assert torch.equal(padded[:ROWS], tensors["whole"].float()), "a box that lies there as a whole is none"


def test_a_box_of_which_a_part_was_never_written_is_damage(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 2**20)
    writer.write("layers", torch.ones(2), (1,), (2,))
    writer.close()
    with pytest.raises(Damaged, match=r"it has not all of layers$"):
        Reader(tmp_path).fill([Box("layers", (0, 0), torch.empty(2, 2))])


def test_a_chunk_is_mapped_once_for_all_boxes(
    written: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[Any] = []
    chunk = Reader._chunk
    monkeypatch.setattr(Reader, "_chunk", lambda *args: mapped.append(args[2].offsets) or chunk(*args))
    boxes = [Box("layers", (0, row, 0), torch.empty(LAYERS, 1, COLUMNS)) for row in range(ROWS)]
    Reader(written[0]).fill(boxes)
    assert len(mapped) == len(set(mapped)) == LAYERS


def test_each_bit_counts_or_changes_nothing(written: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """A bit of a name, a date or a gap in an archive may change nothing; no other is overlooked."""
    directory, tensors = written
    [path] = directory.glob("*.distcp")
    whole, wanted = path.read_bytes(), tensors["whole"]
    where = Reader(directory)._metadata.storage_data[chunks.MetadataIndex("whole", torch.Size([0]))]
    found = 0
    for place in range(where.offset, where.offset + where.length):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            assert torch.equal(Reader(directory).read("whole"), wanted), place
        except Damaged as error:
            found += 1
            assert "\n" not in str(error) and f"{path} is not what was written" in str(error)
    assert found > wanted.nbytes
    for cut in range(0, where.length, 7):
        path.write_bytes(whole[: where.offset + cut])
        with pytest.raises(Damaged):
            Reader(directory).read("whole")


def save(policy: Policy, directory: Path) -> torch_dist.Save:  # noqa: F811
    directory.mkdir()
    return policy.save(directory)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_an_update_changes_does_not_reach_the_files(
    threads: int,
    policy: Policy,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk stands still at the first items until the update is over."""
    monkeypatch.setattr(torch_dist, "num_threads", lambda num_bytes: threads)
    gate, write = threading.Event(), ChunkFile.write
    monkeypatch.setattr(ChunkFile, "write", lambda self, data: gate.wait() and write(self, data))
    batch = placed(policy, make_groups(MIXED))
    policy.score(batch)
    policy.update(batch.minibatches[0])
    before = state_of(policy)
    saving = save(policy, tmp_path / "policy")
    saving.start(in_background=True)
    policy.update(batch.minibatches[0])
    assert not saving.is_written()
    assert not any(map(torch.equal, before, state_of(policy))), "the update changed nothing"
    gate.set()
    sums = saving.finish()
    assert len(sums) == len(list((tmp_path / "policy").glob("*.distcp"))) == threads
    assert all(size == os.path.getsize(tmp_path / name) for name, (size, _) in sums.items())
    policy.load(tmp_path / "policy")
    assert all(map(torch.equal, before, state_of(policy)))


def test_memory_that_is_given_back_is_copied_first(
    shared: Policy,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saving = save(shared, tmp_path / "policy")
    detached: list[bool] = []
    monkeypatch.setattr(saving, "detach", lambda: detached.append(True))
    shared.release_memory()
    shared.release_memory()
    assert detached == [True], "once: then it has its own copy"
    shared.memory.resume()


def test_a_checkpoint_of_which_one_thread_could_not_write_is_none(
    shared: Policy,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_dist, "num_threads", lambda num_bytes: 3)
    close = ChunkFile.close

    def full(self: ChunkFile) -> None:
        close(self)
        if self._file.name.endswith("_1.distcp"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(ChunkFile, "close", full)
    saving = save(shared, tmp_path / "policy")
    saving.start(in_background=False)
    with pytest.raises(OSError, match="No space left"):
        saving.finish()
    assert not (tmp_path / "policy" / ".metadata").exists()
