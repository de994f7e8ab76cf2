"""Directories that appear whole or not at all, and tell when they were damaged later.

Each is written under a hidden name and renamed when everything is on the disk. manifest.json lists every
file's size and CRC-32: that finds what disks and copies do to files, and is no help against forgery.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from dapo.config import ConfigError

MANIFEST = "manifest.json"
Sum = tuple[int, int]  # bytes, CRC-32
BLOCK = 2**20
EARLY = 64 * 2**20  # bytes: of a file being written, the disk gets so many at a time


class SummedFile:
    """A file being written that sums up what goes by, so that nothing is read again for its checksum."""

    def __init__(self, path: Path):
        self._file = open(path, "wb", buffering=BLOCK)  # noqa: SIM115  # until close
        self.sum: Sum = (0, 0)
        self.error: OSError | None = None  # torch.save turns a full disk into errors of its own
        self._begun = 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        try:
            self._file.write(view)
            self._begun = begin_writing(self._file, self._begun)
        except OSError as error:
            self.error = error
            raise
        self.sum = self.sum[0] + view.nbytes, zlib.crc32(view, self.sum[1])
        return view.nbytes

    def tell(self) -> int:
        return self.sum[0]

    def flush(self) -> None:
        pass  # once, at the end

    def close(self) -> None:
        """The bytes are on the disk when this returns."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self.error = error
            raise
        finally:
            self._file.close()


def begin_writing(file: BinaryIO, begun: int) -> int:
    """Let the disk begin with what was written behind byte `begun`, once that is EARLY, and do not wait.
    Returns how far it has begun.

    The system itself would begin when gigabytes are due, and let the last of them wait for the end.
    """
    end = file.tell()
    if end - begun < EARLY or not hasattr(os, "posix_fadvise"):
        return begun
    file.flush()
    # also forgets it, once it is written
    os.posix_fadvise(file.fileno(), begun, end - begun, os.POSIX_FADV_DONTNEED)
    return end


def write_at(file: FileIO, data: memoryview, place: int) -> None:
    """Write all of `data` at byte `place` of an unbuffered file, whichever thread calls; the disk begins with
    it early, as above.
    """
    while data:
        written = os.pwrite(file.fileno(), data[:EARLY], place)
        if written == EARLY and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), place, written, os.POSIX_FADV_DONTNEED)
        data, place = data[written:], place + written


def sum_of(path: Path) -> Sum:
    """A file's size and CRC-32."""
    size, crc, block = 0, 0, memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(block):
            size, crc = size + read, zlib.crc32(block[:read], crc)
    return size, crc


def write_manifest(directory: Path, sums: dict[str, Sum], about: dict[str, Any]) -> None:
    """manifest.json, last of all: `about`, and the sums of all files. What is not in `sums` (small files) is
    read for its own.
    """
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    manifest = about | {"files": {name: sums.get(name) or sum_of(directory / name) for name in names}}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises OSError or ValueError: there is none, or it is damaged itself."""
    manifest = json.loads((directory / MANIFEST).read_text())
    sums = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(sums, dict) or not all(
        isinstance(sum, list) and len(sum) == 2 for sum in sums.values()
    ):
        raise ValueError("it does not list files with size and checksum")
    return manifest  # type: ignore[no-any-return]


def damage(directory: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with part `part` of `parts` of the directory's files, None if they are what the manifest
    says. Reads them all.
    """
    try:
        sums = read_manifest(directory)["files"]
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    largest_first = sorted(sums, key=lambda name: (-sums[name][0], name))
    return next(
        filter(None, (file_damage(directory, name, sums[name]) for name in largest_first[part::parts])), None
    )


def file_damage(directory: Path, name: str, sum: Sum) -> str | None:
    """What is wrong with one file of the directory, None if it has this sum."""
    path, (size, crc) = directory / name, sum
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
        return None if sum_of(path)[1] == crc else f"{name} is not what was written: its checksum differs"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def require_space(directory: Path, num_bytes: int) -> None:
    """Raises OSError: the disk below `directory` has no room for that many bytes."""
    if shutil.disk_usage(directory).free < num_bytes:
        raise OSError(f"{num_bytes / 2**30:.2f} GiB are needed")


def free_gib(directory: Path) -> float:
    """Of the disk that `directory` lies on, whether or not it exists already."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free / 2**30


def write_text(path: Path, text: str) -> None:
    """Write a small file, in place of one that may be there: a process that is killed meanwhile leaves the
    old one, or the new one.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


@contextmanager
def made_whole(target: Path, num_bytes: int, may_replace: bool = False) -> Iterator[Path]:
    """A hidden directory to write into, beside `target`, whose name it gets when the block ends well; else it
    is removed.

    Raises:
        ConfigError: `target` exists and may not be replaced, or another process is writing it, or the disk
            has no room for `num_bytes`. Nothing was written.
    """
    _refuse_existing(target, may_replace)
    partial = hidden(target)
    try:
        with _locked(partial):
            try:
                for leftover in partial.iterdir():  # of a process that was killed
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
                require_space(partial, num_bytes)
                yield partial
                _refuse_existing(target, may_replace)  # it may have come meanwhile
                publish(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except BlockingIOError as error:
        raise ConfigError(
            f"{target} is being written by another process: wait for it, or name another directory"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written, {free_gib(target.parent):.1f} GiB free there: {error}"
        ) from error


def _refuse_existing(target: Path, may_replace: bool) -> None:
    if target.exists() and not may_replace:
        raise ConfigError(f"{target} exists and is not overwritten: name another directory, or remove it")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """The directory, made if it is not there, for this process alone; the lock ends with the process. Raises
    BlockingIOError: another's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def hidden(target: Path) -> Path:
    """The name that a directory bears while it is written."""
    return target.with_name(f".{target.name}.partial")


def publish(partial: Path, target: Path) -> None:
    """Put everything on the disk, then give it its name; a `target` that exists is replaced."""
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
