"""Models and data by their names on the hub: a small one on this machine answers as the real one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from zlib import crc32

import pytest
import yaml

from dapo import config
from dapo.config import ConfigError
from dapo.model import hub
from tests.conftest import make_config

ROOT = Path(__file__).parents[3]
ARITHMETIC = ROOT / "examples/arithmetic"
COMMIT = "0123456789" * 4
MODEL = {path.name: path.read_bytes() for path in (ARITHMETIC / "base").iterdir()}
DATA = {
    "data/train.jsonl": (ARITHMETIC / "data/train.jsonl").read_bytes(),
    "data/heldout.jsonl": (ARITHMETIC / "data/heldout.jsonl").read_bytes(),
    "README.md": b"about",
}
REPOS = {"models/org/tiny": MODEL | {"pytorch_model.bin": b"a pickle"}, "datasets/org/sums": DATA}


class Hub(BaseHTTPRequestHandler):
    """The few answers that snapshot_download asks for."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        api, _, path = self.path.partition("?")[0].lstrip("/").partition("/")
        if "/resolve/" in self.path:
            repo, _, rest = self.path.lstrip("/").partition("/resolve/")
            repo = repo if repo.startswith("datasets/") else f"models/{repo}"
            content = REPOS[repo][rest.partition("/")[2]]
            self.answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{crc32(content):08x}"'})
        elif api == "api" and (repo := "/".join(path.split("/")[:3])) in REPOS:
            files = REPOS[repo]
            listed: Any = {
                "id": repo.partition("/")[2],
                "sha": COMMIT,
                "siblings": [{"rfilename": f} for f in files],
            }
            if "/tree/" in path:
                listed = [{"type": "file", "oid": "0", "size": len(files[f]), "path": f} for f in files]
            self.answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables of a process that asks the small hub, and keeps what it gets in a cache of its own."""
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    server.shutdown()
    server.server_close()


def dapo(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dapo", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def write_config(folder: Path, model: str, train: str, heldout: str) -> Path:
    values = yaml.safe_load((ARITHMETIC / "config.yaml").read_text())
    values["run"] |= {"dir": str(folder / "run"), "steps": 1}
    values["data"]["train"], values["policy"]["model"] = train, model
    values["eval"] |= {"data": heldout, "samples": 1, "every": 9}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_run_of_names_fetches_once_records_the_commits_and_goes_on_offline(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    path = write_config(tmp_path, "org/tiny@main", "org/sums", "org/sums:data/heldout.jsonl")
    done = dapo(environment, "train", str(path), "--nproc", "2", "parallel.tensor=2")
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "run/semantics.json").read_text())["hub"]
    assert record == {
        "policy.model": [f"org/tiny@{COMMIT}"],
        "data.train": [f"org/sums@{COMMIT}"],
        "eval.data": [f"org/sums@{COMMIT}"],
    }
    fetched = [asked for asked in Hub.asked if "/resolve/" in asked]
    assert len([asked for asked in fetched if asked.endswith("model.safetensors")]) in (1, 2), "HEAD and GET"
    assert not [asked for asked in fetched if asked.endswith(".bin")], "a pickle is not wanted"
    assert len([asked for asked in Hub.asked if asked.startswith("/api/models/org/tiny/revision")]) == 1, (
        "one asked"
    )

    offline = environment | {"HF_HUB_OFFLINE": "1"}
    Hub.asked.clear()
    done = dapo(offline, "train", str(path), "run.steps=2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not Hub.asked


def test_a_plan_needs_no_weights(tmp_path: Path, environment: dict[str, str]) -> None:
    path = write_config(
        tmp_path, "org/tiny", str(ARITHMETIC / "data/train.jsonl"), "org/sums:data/heldout.jsonl"
    )
    done = dapo(environment, "plan", str(path), "--gpu", "cpu")
    assert done.returncode == 0, done.stderr
    assert not [asked for asked in Hub.asked if "safetensors" in asked and "/resolve/" in asked]


def test_init_looks_at_both_and_writes_the_names(tmp_path: Path, environment: dict[str, str]) -> None:
    done = dapo(
        environment, "init", "org/tiny", "org/sums", "--gpu", "cpu", "--out", str(tmp_path / "new.yaml")
    )
    assert done.returncode == 0, done.stderr
    written = yaml.safe_load((tmp_path / "new.yaml").read_text())
    assert (written["policy"]["model"], written["data"]["train"]) == ("org/tiny", "org/sums")
    assert "4,000 prompts" in done.stdout


@pytest.mark.parametrize("offline", ["0", "1"])
def test_what_is_neither_here_nor_there_is_one_line(
    offline: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    path = write_config(tmp_path, "models/none", str(ARITHMETIC / "data/train.jsonl"), "org/sums")
    done = dapo(environment | {"HF_HUB_OFFLINE": offline}, "train", str(path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: policy.model=models/none: there is no such path, and the hub's model of this name could not"
    )
    assert not (tmp_path / "run").exists()


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every name is this folder."""
    folder = tmp_path / f"datasets--org--sums/snapshots/{COMMIT}"
    (folder / "data").mkdir(parents=True)
    asked: list[Any] = []
    monkeypatch.setattr(hub, "_fetch", lambda *arguments: asked.append(arguments) or folder)
    return folder


def test_local_paths_ask_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Path:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "_fetch", fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    for name in ("org/tiny", "org/train.jsonl"):
        (tmp_path / name).touch()
    found = make_config(tmp_path, "policy.model=org/tiny", "data.train=org/train.jsonl")
    assert hub.overrides(found) == []
    for path in ("/no/such", "a/b/c", "name", "~/x", "org/"):
        assert hub.model(Path(path)) == Path(path)
    assert hub.data_files(Path("data/none.jsonl"), "data.train") == [Path("data/none.jsonl")]


def test_a_data_set_s_training_files_are_several_files(tmp_path: Path, snapshot: Path) -> None:
    for name in ("data/train-1.parquet", "data/train-0.parquet", "data/test.parquet", "notes.txt"):
        (snapshot / name).touch()
    found = make_config(tmp_path, f"policy.model={tmp_path}", "data.train=org/sums@v1")
    changed = found.changed(hub.overrides(found))
    assert changed.data.train == [snapshot / "data/train-0.parquet", snapshot / "data/train-1.parquet"]
    assert hub.origins(changed) == {"data.train": [f"org/sums@{COMMIT}"] * 2}


TRAINS, TEST = ["en/train/0.jsonl", "fr/train/0.jsonl"], ["en/test-0.jsonl"]
SHARD, WORDS = ["train-00000-of-00002.parquet"], ["constraints.jsonl", "problems.jsonl"]


@pytest.mark.parametrize(
    ("names", "trained_on", "evaluated_on"),
    [
        ([*TRAINS, *TEST], TRAINS, TEST),
        (WORDS, WORDS, WORDS),
        ([*SHARD, "validation.parquet"], SHARD, ["validation.parquet"]),
        (["data/test.parquet"], None, ["data/test.parquet"]),
        (["latest.parquet"], ["latest.parquet"], ["latest.parquet"]),
        (["train.jsonl"], ["train.jsonl"], ["train.jsonl"]),
    ],
    ids=lambda names: "+".join(names or ["none"]),
)
def test_a_split_is_a_word_of_a_file_s_path_and_no_test_is_trained_on(
    names: list[str], trained_on: list[str] | None, evaluated_on: list[str], tmp_path: Path, snapshot: Path
) -> None:
    for name in names:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).touch()

    def found(option: str) -> list[str]:
        return [str(path.relative_to(snapshot)) for path in hub.data_files(Path("org/sums"), option)]

    assert found("eval.data") == evaluated_on
    if trained_on is None:
        with pytest.raises(ConfigError, match=r"it has no training data \(test.parquet\): name a file"):
            found("data.train")
    else:
        assert found("data.train") == trained_on


@pytest.mark.parametrize("name", ["org/sums:../../x.jsonl", "org/sums:*.jsonl", "org/sums:a/../../x.jsonl"])
def test_a_file_of_a_data_set_lies_in_it(name: str, snapshot: Path) -> None:
    with pytest.raises(ConfigError, match="is no file's path in a data set"):
        hub.data_files(Path(name), "data.train")


def test_only_what_is_needed_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def fetch(name: dict[str, str], kind: str, patterns: list[str], what: str) -> Path:
        asked.append((kind, patterns))
        (tmp_path / "train.jsonl").touch()
        return tmp_path

    monkeypatch.setattr(hub, "_fetch", fetch)
    named = make_config(tmp_path, "policy.model=org/tiny", "data.train=org/a", "eval.data=org/b")
    hub.overrides(named, needs=set())
    assert asked == [("model", hub.DESCRIPTION)]
    hub.overrides(named, needs={"weights", "eval"})
    assert asked[1:] == [("model", [*hub.DESCRIPTION, *hub.WEIGHTS]), ("dataset", ["*.parquet", "*.jsonl"])]


def test_lists_weights_and_sets_keep_their_form(tmp_path: Path, snapshot: Path) -> None:
    (snapshot / "data/only.jsonl").touch()
    only, here = snapshot / "data/only.jsonl", tmp_path / "train.jsonl"
    here.touch()
    listed = make_config(tmp_path, f"data.train=[{here}, org/sums]", f"policy.model={tmp_path}")
    assert listed.changed(hub.overrides(listed)).data.train == [here, only]
    mixed = make_config(
        tmp_path,
        f"data.train={{{here}: 1.0, org/sums: 2.5}}",
        "eval.data={sums: org/sums}",
        f"policy.model={tmp_path}",
    )
    changed = mixed.changed(hub.overrides(mixed))
    assert changed.data.train == {here: 1.0, only: 2.5}
    assert changed.eval.data == {"sums": only}


@pytest.mark.parametrize(
    "override", ["data.train={org/sums: 1.0}", "eval.data=org/sums", "eval.data={a: org/sums}"]
)
def test_one_file_has_to_be_named_where_only_one_can_stand(
    override: str, tmp_path: Path, snapshot: Path
) -> None:
    for name in ("data/a.jsonl", "data/b.jsonl"):
        (snapshot / name).touch()
    found = make_config(tmp_path, "data.train=/a.jsonl", override, f"policy.model={tmp_path}")
    with pytest.raises(ConfigError, match=r"org/sums has 2 files \(a.jsonl, b.jsonl\): name one"):
        hub.overrides(found)


def test_a_data_set_without_data_is_refused(tmp_path: Path, snapshot: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"org/sums: it has no training data \(no .parquet or .jsonl file\)"
    ):
        hub.data_files(Path("org/sums"), "data.train")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name@v1.0", ("org/name", "v1.0", None)),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3", None)),
        ("org/name:data/a.parquet", ("org/name", None, "data/a.parquet")),
        ("org/name@main:a.jsonl", ("org/name", "main", "a.jsonl")),
    ],
)
def test_the_parts_of_a_name(name: str, expected: tuple[str | None, ...]) -> None:
    found = hub._parsed(Path(name))
    assert found and (found["repo"], found["revision"], found["file"]) == expected


def test_a_name_survives_as_an_option(tmp_path: Path) -> None:
    assert str(config.Policy(model="Qwen/Qwen2.5-7B@main").model) == "Qwen/Qwen2.5-7B@main"
