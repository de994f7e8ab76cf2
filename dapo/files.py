"""Directories that appear whole or not at all, and in which later damage is found.

Each is written under a hidden name and renamed when everything is on the disk. manifest.json lists size and
CRC-32 of every file and has a checksum of its own, which reveals damage by disks and copies, not forgery. Of
files whose parts have checksums, which are compared when they are read, it lists the size.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32

from dapo.config import ConfigError
from dapo.types import StorageError, reason

MANIFEST = "manifest.json"
UNSUMMED = {"step", "model", "files"}  # keys of a manifest of version 0.1.0, which has no checksum
SHORT_TMPDIRS = ("/tmp", "/var/tmp", "/dev/shm")
Sum = tuple[int, int | None]  # bytes, CRC-32; None: the file has checksums of its own parts
BLOCK = 2**20
# characters: a path of a socket may have 107, of which multiprocessing adds 33 and SGLang 13
LONGEST_TMPDIR = 107 - 33
EARLY = 64 * 2**20  # bytes of a file that go to the disk together, before the file is complete


class ChunkFile:
    """A file for torch.save's archives, which have checksums of their own."""

    def __init__(self, path: Path):
        self._file = open(path, "wb", buffering=BLOCK)  # noqa: SIM115  # until close
        self.error: OSError | None = None  # torch.save turns a full disk into errors of its own
        self._size = 0
        self._begun = 0  # the disk has begun to write the bytes before this one

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        try:
            self._file.write(view)
            self._begin_writing(self._size + view.nbytes)
        except OSError as error:
            self.error = error
            raise
        self._size += view.nbytes
        return view.nbytes

    def _begin_writing(self, end: int) -> None:
        """Let the disk begin with the bytes up to `end`, if there are EARLY new ones. It does not wait.

        The system itself would begin when gigabytes have to be written, and `close` would wait for the rest.
        """
        if end - self._begun < EARLY or not hasattr(os, "posix_fadvise"):
            return
        self._file.flush()
        # this also frees their memory, once they are on the disk
        os.posix_fadvise(self._file.fileno(), self._begun, end - self._begun, os.POSIX_FADV_DONTNEED)
        self._begun = end

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        pass  # once, at the end

    def close(self) -> None:
        """Close the file. Its bytes are on the disk when this returns."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self.error = error
            raise
        finally:
            self._file.close()


def write_at(file: FileIO, data: memoryview, place: int) -> None:
    """Write all of `data` at byte `place` of an unbuffered file, in any thread; the disk begins early."""
    while data:
        written = os.pwrite(file.fileno(), data[:EARLY], place)
        if written == EARLY and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), place, written, os.POSIX_FADV_DONTNEED)
        data, place = data[written:], place + written


def sum_of(path: Path) -> tuple[int, int]:
    """Read a file, and return its size and CRC-32."""
    size, crc, block = 0, 0, memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(block):
            size, crc = size + read, crc32(block[:read], crc)
    return size, crc


def write_manifest(directory: Path, sums: dict[str, Sum], about: dict[str, Any]) -> None:
    """Write manifest.json last: `about`, and the sums of all files. Files that are not in `sums` are read."""
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    manifest = about | {"files": {name: sums.get(name) or sum_of(directory / name) for name in names}}
    whole = manifest | {"checksum": _checksum(manifest)}
    (directory / MANIFEST).write_text(json.dumps(whole, indent=1))


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read manifest.json. Raise OSError if there is none, ValueError if it is damaged itself.

    Manifests of version 0.1.0 have no checksum, and no other keys than theirs.
    """
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    sums = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(sums, dict) or not all(isinstance(s, list) and len(s) == 2 for s in sums.values()):
        raise ValueError("it does not list files with size and checksum")
    if "checksum" not in manifest and not manifest.keys() <= UNSUMMED:
        raise ValueError("it is not what was written: it has no checksum")
    if (checksum := manifest.pop("checksum", None)) not in (None, _checksum(manifest)):
        raise ValueError(f"it is not what was written: its checksum is not {checksum}")
    return manifest  # type: ignore[no-any-return]


def _checksum(manifest: dict[str, Any]) -> int:
    return crc32(json.dumps(manifest, sort_keys=True).encode())


def damage(directory: Path, part: int = 0, parts: int = 1) -> str | None:
    """Compare the directory's files with its manifest. Return the first difference, or None.

    Only part `part` of `parts` is read: the parts together are all files.
    """
    try:
        sums = read_manifest(directory)["files"]
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    largest_first = sorted(sums, key=lambda name: (-sums[name][0], name))
    found = (file_damage(directory, name, sums[name]) for name in largest_first[part::parts])
    return next(filter(None, found), None)


def file_damage(directory: Path, name: str, sum: Sum) -> str | None:
    """Compare one file of the directory with its sum. Return the difference, or None."""
    path, (size, crc) = directory / name, sum
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
        is_whole = crc is None or sum_of(path)[1] == crc
        return None if is_whole else f"{name} is not what was written: its checksum differs"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def shorten_tmpdir(is_printing: bool) -> None:
    """Use another TMPDIR, in child processes too, if paths of sockets in this one would be too long."""
    try:
        directory = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ConfigError(f"TMPDIR: {error.strerror}") from None
    length = len(os.fsencode(directory))
    if length <= LONGEST_TMPDIR:
        return
    said = f"TMPDIR={directory} has {length} characters, which leaves too few for sockets in it"
    for short in SHORT_TMPDIRS:
        if os.access(short, os.W_OK | os.X_OK):
            break
    else:
        raise ConfigError(f"{said}: set one of at most {LONGEST_TMPDIR}")
    if is_printing:
        print(f"warning: {said}: {short} is used", file=sys.stderr, flush=True)
    os.environ["TMPDIR"] = tempfile.tempdir = short


def require_space(directory: Path, num_bytes: int) -> None:
    """Raise OSError if the disk below `directory` has no room for that many bytes."""
    if shutil.disk_usage(directory).free < num_bytes:
        raise OSError(f"{num_bytes / 2**30:.2f} GiB are needed")


def free_gib(directory: Path) -> float:
    """GiB free on the disk of `directory`, which need not exist yet."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free / 2**30


def write_text(path: Path, text: str) -> None:
    """Write a small file, or replace it. A process that is killed meanwhile leaves the old or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise StorageError if the block cannot write `path`, which the run has to keep."""
    try:
        yield
    except OSError as error:
        free = f"{free_gib(path.parent):.1f} GiB free there"
        raise StorageError(f"{path} cannot be written, {free}: {error.strerror or reason(error)}") from error


def remove(path: Path) -> None:
    """Remove a file, a directory with all that is in it, or a link, but not what the link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def run_directory(directory: Path) -> Iterator[None]:
    """Make run.dir and hold it for this process: its file `lock` is locked until the block or process ends.

    The lock is flock's: the system drops it with its holder, so a file that a killed process left locks
    nothing. NFS passes it on to other machines, and so does Lustre unless it is mounted with `localflock`;
    where a file system has no such locks, a warning says so.

    Raises:
        ConfigError: another process holds it; or the directory cannot be written.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]  # the innermost first
    path = directory / "lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"run.dir={directory} cannot be written: {error.strerror}") from error
    try:
        _lock(descriptor, directory)
        try:
            yield
        finally:
            with suppress(OSError):
                if made and list(directory.iterdir()) == [path]:  # what was refused leaves no trace
                    path.unlink()
                    for each in made:
                        each.rmdir()  # raises OSError if it is not empty
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    """Lock an open file, and write into it who holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink == 0:  # its holder was refused, and has removed it
            raise BlockingIOError
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        remedy = "wait for it, end it, or choose another run.dir"
        raise ConfigError(f"run.dir={directory} is in use by {holder}: {remedy}") from error
    except OSError as error:
        unlocked = f"warning: run.dir={directory} is not locked, its file system has no locks"
        print(f"{unlocked} ({error.strerror}): start no other run in it", file=sys.stderr, flush=True)
    else:
        with suppress(OSError):  # a full disk: the lock holds without its holder's name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


@contextmanager
def made_whole(target: Path, num_bytes: int, may_replace: bool = False) -> Iterator[Path]:
    """Make a hidden directory to write into; after the block rename it to `target`, after an error remove it.

    Nothing is left of what was not finished.

    Raises:
        ConfigError: `target` exists and may not be replaced, or another process is writing it.
        StorageError: the disk has no room for `num_bytes`, or fails.
    """
    _refuse_existing(target, may_replace)
    partial = hidden(target)
    with writing(target):
        try:
            with _locked(partial):
                try:
                    for leftover in partial.iterdir():  # of a process that was killed
                        remove(leftover)
                    require_space(partial, num_bytes)
                    yield partial
                    _refuse_existing(target, may_replace)  # another process may have made it
                    publish(partial, target)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        except BlockingIOError as error:
            remedy = "wait for it, or name another directory"
            raise ConfigError(f"{target} is being written by another process: {remedy}") from error


def _refuse_existing(target: Path, may_replace: bool) -> None:
    if target.exists() and not may_replace:
        raise ConfigError(f"{target} exists and is not overwritten: name another directory, or remove it")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Make and lock the directory, at most until the process ends. Raise BlockingIOError if it is locked."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def hidden(target: Path) -> Path:
    """Path of a directory while it is written."""
    return target.with_name(f".{target.name}.partial")


def publish(partial: Path, target: Path) -> None:
    """Sync everything to the disk, then rename it to `target`, which is replaced if it exists."""
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    remove(target)
    os.rename(partial, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
