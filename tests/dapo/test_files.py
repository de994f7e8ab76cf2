"""Directories that appear whole or not at all, and know when they are damaged."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dapo import files
from dapo.config import ConfigError
from dapo.types import StorageError


def make(directory: Path) -> Path:
    """Five files of different sizes, and a manifest."""
    (directory / "below").mkdir(parents=True)
    for i in range(5):
        (directory / "below" / f"{i}").write_bytes(bytes(range(50 * i, 50 * i + 20 + i)))
    files.write_manifest(directory, {}, {"step": 7})
    return directory


def test_of_a_file_whose_parts_have_checksums_the_size_is_compared(tmp_path: Path) -> None:
    (tmp_path / "parts").write_bytes(b"12345")
    files.write_manifest(tmp_path, {"parts": (5, None)}, {"step": 7})
    assert files.damage(tmp_path) is None
    (tmp_path / "parts").write_bytes(b"12355")
    assert files.damage(tmp_path) is None
    (tmp_path / "parts").write_bytes(b"1234")
    assert files.damage(tmp_path) == "parts has 4 of 5 bytes"


def test_the_parts_together_verify_every_file_once(tmp_path: Path) -> None:
    directory = make(tmp_path / "d")
    assert files.damage(directory) is None
    for i in range(5):
        path = directory / "below" / f"{i}"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b"!")
        found = [files.damage(directory, part, 3) for part in range(3)]
        assert sum(said is not None for said in found) == 1
        assert files.damage(directory) == f"below/{i} is not what was written: its checksum differs"
        path.write_bytes(whole)
    for i in (0, 4, 2):
        (directory / "below" / f"{i}").unlink()
    assert files.damage(directory) == "below/4 is missing", "of several, the largest is named"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {"below/1": 21}}'])
def test_a_manifest_that_lists_no_checksums_is_damage(tmp_path: Path, text: str) -> None:
    directory = make(tmp_path / "d")
    (directory / files.MANIFEST).write_text(text)
    assert files.damage(directory).startswith("manifest.json: ")


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "above" / "target"
    with files.made_whole(target, 10) as partial:
        (partial / "file").write_text("new")
        assert not target.exists() and partial.name.startswith(".")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "above",
        "above/target",
        "above/target/file",
    ]


def test_what_existed_is_replaced_only_if_it_may_be_and_only_by_a_whole_one(tmp_path: Path) -> None:
    make(tmp_path / "target")
    with (
        pytest.raises(ConfigError, match="exists and is not overwritten"),
        files.made_whole(tmp_path / "target", 10),
    ):
        pytest.fail("what is written would be in vain")
    with (
        pytest.raises(ZeroDivisionError),
        files.made_whole(tmp_path / "target", 10, may_replace=True) as partial,
    ):
        (partial / "file").write_text("new")
        raise ZeroDivisionError
    assert files.damage(tmp_path / "target") is None
    with files.made_whole(tmp_path / "target", 10, may_replace=True) as partial:
        (partial / "file").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "file"]


def test_a_disk_that_is_too_small_is_an_error_with_both_numbers(tmp_path: Path) -> None:
    said = r"target cannot be written, \d+\.\d GiB free there: 1048576\.00 GiB are needed"
    with pytest.raises(StorageError, match=said), files.made_whole(tmp_path / "target", 2**50):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_disk_may_be_filled_to_its_last_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    files.require_space(tmp_path, 2**30)
    with pytest.raises(OSError, match=r"^1\.00 GiB are needed$"):
        files.require_space(tmp_path, 2**30 + 1)


def test_a_file_that_the_disk_begins_early_with_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "EARLY", 1000)
    begun: list[tuple[int, int]] = []
    advise = os.posix_fadvise
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, at, size, how: begun.append((at, size)) or advise(fd, at, size, how)
    )
    data = np.random.default_rng(0).bytes(10_000)
    file = files.ChunkFile(tmp_path / "file")
    for start in range(0, len(data), 300):
        file.write(data[start : start + 300])
    file.close()
    assert (tmp_path / "file").read_bytes() == data
    assert file.tell() == 10_000
    assert begun == [(start, 1200) for start in range(0, 9600, 1200)]  # end to end, each once


def test_a_small_file_that_cannot_be_rewritten_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_text(tmp_path / "file", "old")
    seen = []

    def killed(self: Path, target: Path) -> None:
        seen.append((tmp_path / "file").read_text())
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", killed)
        files.write_text(tmp_path / "file", "new and longer")
    assert seen == ["old"] and (tmp_path / "file").read_text() == "old"
    files.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_a_long_block_is_written_in_pieces_at_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "EARLY", 8)
    with open(tmp_path / "file", "wb", buffering=0) as file:
        files.write_at(file, memoryview(b"0123456789abcdefghij"), 4)
        files.write_at(file, memoryview(b"head"), 0)
    assert (tmp_path / "file").read_bytes() == b"head0123456789abcdefghij"


def test_two_processes_do_not_write_to_one_target(tmp_path):
    target = tmp_path / "model"
    with files.made_whole(target, 10) as partial:
        (partial / "file").write_text("first")
        with (
            pytest.raises(ConfigError, match="is being written by another process"),
            files.made_whole(target, 10),
        ):
            pass
        assert (partial / "file").read_text() == "first"
    assert (target / "file").read_text() == "first"


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "model"
    with (
        pytest.raises(ConfigError, match="exists and is not overwritten"),
        files.made_whole(target, 10) as partial,
    ):
        (partial / "file").write_text("mine")
        target.mkdir()
        (target / "file").write_text("theirs")
    assert (target / "file").read_text() == "theirs"
    assert not partial.exists()


def test_what_a_killed_process_left_is_removed(tmp_path):
    target = tmp_path / "model"
    files.hidden(target).mkdir()
    (files.hidden(target) / "old").write_text("half")
    with files.made_whole(target, 10) as partial:
        (partial / "file").write_text("new")
    assert [path.name for path in target.iterdir()] == ["file"]


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    (tmp_path / "data").write_bytes(b"12345")
    sum = files.sum_of(tmp_path / "data")

    def broken(path):
        raise OSError(5, "Input/output error")

    assert files.file_damage(tmp_path, "data", sum) is None
    monkeypatch.setattr(files, "sum_of", broken)
    assert files.file_damage(tmp_path, "data", sum) == "data cannot be read: Input/output error"


def test_a_manifest_knows_when_it_is_damaged_itself(tmp_path: Path) -> None:
    """A digit is changed at every place that has one: in a size, a checksum, the step."""
    path = make(tmp_path / "d") / files.MANIFEST
    whole = path.read_text()
    places = [i for i, character in enumerate(whole) if character.isdigit()]
    assert len(places) > 30
    for i in places:
        path.write_text(whole[:i] + str((int(whole[i]) + 1) % 10) + whole[i + 1 :])
        assert files.damage(path.parent) is not None, whole[i - 20 : i + 5]
    path.write_text(whole)
    assert files.damage(path.parent) is None


def test_a_manifest_whose_checksum_is_called_otherwise_is_damaged(tmp_path: Path) -> None:
    """A bit is changed in the key's name and the quotes around it."""
    path = make(tmp_path / "d") / files.MANIFEST
    whole = path.read_bytes()
    start = whole.index(b'"checksum"')
    for i in range(start, start + len(b'"checksum"')):
        for bit in range(8):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :])
            assert files.damage(path.parent) is not None, (i - start, bit)


def test_a_manifest_of_version_0_1_0_has_no_checksum_and_is_read(tmp_path: Path) -> None:
    path = make(tmp_path / "d") / files.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    path.write_text(json.dumps(manifest))
    assert files.damage(path.parent) is None
    assert files.read_manifest(path.parent)["step"] == 7


HOLD = """
import sys
from pathlib import Path
from dapo.files import run_directory
with run_directory(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_directory_belongs_to_one_process_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        said = f"in use by process {holder.pid} on {socket.gethostname()}: wait for it, end it, or choose"
        with pytest.raises(ConfigError, match=said), files.run_directory(run):
            pass
        assert (run / "lock").exists()
        holder.kill()
    assert (run / "lock").read_text().split()[1] == str(holder.pid), "the killed one's name is left"
    with files.run_directory(run):
        assert (run / "lock").read_text().split()[1] == str(os.getpid())


def test_a_run_that_is_refused_leaves_none_of_the_directories_it_made(tmp_path: Path) -> None:
    for mine in (None, "other", "c/other"):
        with pytest.raises(ZeroDivisionError), files.run_directory(tmp_path / "a/b/c/run"):
            if mine:
                (tmp_path / "a/b" / mine).mkdir(parents=True)
            raise ZeroDivisionError
        left = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
        kept = Path("a/b", mine) if mine else Path()
        assert left == {kept, *kept.parents} - {Path()}
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
    (tmp_path / "a/b").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), files.run_directory(tmp_path / "a/b/c/run"):
        raise ZeroDivisionError
    assert (tmp_path / "a/b").is_dir() and not (tmp_path / "a/b/c").exists()


def test_a_run_that_is_refused_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.run_directory(tmp_path / "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with files.run_directory(tmp_path / "mine"):
        pass
    with files.run_directory(tmp_path / "run"):
        (tmp_path / "run/file").touch()
    assert (tmp_path / "mine").exists() and (tmp_path / "run/file").exists()


def test_a_file_system_without_locks_is_named_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.run_directory(tmp_path / "run"):
        pass
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "is not locked" in line and "No locks available" in line


@pytest.mark.parametrize(
    "make_it", [lambda path: path.write_text("x"), lambda path: path.symlink_to("/nowhere/x")]
)
def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path: Path, make_it) -> None:
    make_it(tmp_path / "run")
    with (
        pytest.raises(ConfigError, match=r"run.dir=.* cannot be written: "),
        files.run_directory(tmp_path / "run"),
    ):
        pass


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere")
    for name, target in (("link", tmp_path / "elsewhere"), ("broken", tmp_path / "nowhere")):
        (tmp_path / name).symlink_to(target)
        files.remove(tmp_path / name)
    files.remove(tmp_path / "not there")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    assert files.damage(tmp_path / "elsewhere") is None
    files.remove(tmp_path / "elsewhere")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_replaces_a_link_of_its_name(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere")
    (tmp_path / "target").symlink_to(tmp_path / "elsewhere")
    with files.made_whole(tmp_path / "target", 10, may_replace=True) as partial:
        (partial / "file").write_text("new")
    assert not (tmp_path / "target").is_symlink() and (tmp_path / "target/file").read_text() == "new"
    assert files.damage(tmp_path / "elsewhere") is None


def test_a_file_that_has_to_be_kept_and_cannot_be_is_one_line(tmp_path: Path) -> None:
    said = r"file cannot be written, \d+\.\d GiB free there: No space left on device$"
    with pytest.raises(StorageError, match=said), files.writing(tmp_path / "below" / "file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


USES_SOCKETS = """
import multiprocessing, os, tempfile
from multiprocessing import forkserver
from dapo.files import shorten_tmpdir
shorten_tmpdir(is_printing=True)
forkserver.ensure_running()  # as the reward's workers are started
with multiprocessing.get_context("fork").Manager():  # as a reward function may use it
    print(tempfile.gettempdir(), os.environ["TMPDIR"])
"""


@pytest.mark.parametrize(("length", "is_kept"), [(files.LONGEST_TMPDIR, True), (75, False), (140, False)])
def test_sockets_can_be_made_however_long_the_name_of_tmpdir_is(
    tmp_path: Path, length: int, is_kept: bool
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        directory = Path(short + "/" + "x" * (length - len(short) - 1))
        directory.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", USES_SOCKETS],
            env=os.environ | {"TMPDIR": str(directory)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    used = directory if is_kept else "/tmp"
    assert done.stdout.split() == [str(used)] * 2
    too_long = f"warning: TMPDIR={directory} has {length} characters, which leaves too few for sockets in it"
    assert done.stderr == ("" if is_kept else f"{too_long}: /tmp is used\n")


def test_a_tmpdir_that_is_too_long_is_refused_where_there_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SHORT_TMPDIRS", (str(tmp_path / "absent"),))
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 139)
    with pytest.raises(ConfigError, match=r"^TMPDIR=/x+ has 140 characters, .*: set one of at most 74$"):
        files.shorten_tmpdir(is_printing=False)


def test_no_file_stays_open(tmp_path):
    """A run writes thousands of them."""
    before = os.listdir("/proc/self/fd")
    for number in range(3):
        with (
            files.run_directory(tmp_path / "run"),
            files.made_whole(tmp_path / f"new{number}", 10) as partial,
        ):
            (partial / "a").write_text("some")
            file = files.ChunkFile(partial / "b")
            file.write(b"more")
            file.close()
        files.sum_of(tmp_path / f"new{number}/b")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_no_folder_for_temporary_files_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def gettempdir() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(files.tempfile, "gettempdir", gettempdir)
    with pytest.raises(ConfigError, match=r"^TMPDIR: No usable temporary directory"):
        files.shorten_tmpdir(is_printing=True)


def test_the_lock_of_a_run_can_be_read_by_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with files.run_directory(tmp_path / "run"):
            [lock] = [path for path in (tmp_path / "run").iterdir() if path.is_file()]
            assert lock.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)
