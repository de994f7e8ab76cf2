"""What `dapo doctor` says of machines that are stood in for, and what `dapo metrics` says."""

from __future__ import annotations

import resource
import shutil
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dapo.__main__ import main
from dapo.command import doctor
from dapo.plan import stack
from dapo.report import glossary

GOOD = {"torch": "2.14.1", "megatron-core": "0.19.2", "transformers": "5.19.0"}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine on which all is well; the packages that it has."""
    packages = dict(GOOD)
    monkeypatch.setattr(stack, "installed", packages.get)
    monkeypatch.setattr(stack, "engine_fault", lambda is_server=False: None)
    monkeypatch.setattr(stack, "server_fault", lambda has_cuda: None)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    usage = SimpleNamespace(total=8 << 30, free=100 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: "/tmp")
    monkeypatch.setattr(torch.version, "cuda", None)
    for name in doctor.PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return packages


def found(what: str) -> doctor.Finding:
    [finding] = [finding for finding in doctor.examine() if finding.what == what]
    return finding


def test_a_machine_that_is_ready_is_said_to_be(capsys: Any) -> None:
    assert main(["doctor"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "ready"
    assert {line.split()[0] for line in lines} == {"ok", "note"}
    assert [line for line in lines if line.startswith("ok     torch ") and line.endswith(" 2.14.1")]


def test_what_is_wrong_is_named_with_its_remedy_and_counted(machine: dict[str, str], capsys: Any) -> None:
    machine |= {"torch": "2.9.1", "megatron-core": "0.16.1"}
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "2 to mend"
    assert [line.split()[1] for line in lines if line.startswith("wrong")] == ["torch", "megatron-core"]
    assert all("-m pip install" in line for line in lines if line.startswith("wrong"))


def test_an_old_python_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 2))
    assert found("python").state == "wrong" and "3.10.2" in found("python").found


def test_without_torch_nothing_is_asked_of_it(machine: dict[str, str]) -> None:
    del machine["torch"]
    assert found("torch").state == "wrong"
    assert not [finding for finding in doctor.examine() if finding.what == "cuda"]


def test_gpus_are_counted_and_their_absence_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "build without CUDA" in found("cuda").found
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found("cuda").state == "note" and "--gpus all" in found("cuda").found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    properties = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    assert found("cuda") == ("ok", "cuda", "13.0, 8 × NVIDIA H100 of 80 GiB")
    assert found("nccl") == ("ok", "nccl", "2.28.3")


def test_transformer_engine_and_servers(machine: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert (found("transformer-engine").state, found("sglang").state) == ("note", "note")
    machine |= {"transformer-engine": "2.20.2", "sglang": "0.5.23"}
    assert (found("transformer-engine").found, found("sglang").found) == ("2.20.2", "0.5.23")
    monkeypatch.setattr(stack, "engine_fault", lambda is_server=False: "it cannot be imported")
    monkeypatch.setattr(stack, "server_fault", lambda has_cuda: "its pins are others")
    assert (found("transformer-engine").state, found("sglang").state) == ("note", "wrong")
    assert found("transformer-engine").found == "the plain layers are used: it cannot be imported"


@pytest.mark.parametrize(
    ("limits", "state", "words"),
    [
        ((4096, 9000), "ok", "4096"),
        ((4095, 9000), "note", "4095: ulimit -n 9000"),
        ((1024, resource.RLIM_INFINITY), "note", "1024: ulimit -n 65536"),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), "ok", ""),
    ],
)
def test_few_open_files(
    limits: tuple[int, int], state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    assert found("open files").state == state and words in found("open files").found


def test_little_shared_memory_or_disk_and_a_long_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=64 << 20, free=3 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: "/" + "x" * 100)
    assert found("shared memory").found == "64 MiB: start the container with --shm-size=8g, or --ipc=host"
    assert found("disk").found.startswith("3 GiB free in /") and "run.dir" in found("disk").found
    assert found("tmpdir").state == "note" and "TMPDIR" in found("tmpdir").found


def test_a_proxy_is_named_without_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy:3128")
    assert found("proxy").found.startswith("HTTPS_PROXY=proxy:3128: ")


def test_metrics_are_explained_all_or_by_a_part_of_their_name(capsys: Any) -> None:
    assert main(["metrics"]) == 0
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert len(blocks) == len(glossary.METRICS)
    assert max(map(len, "\n".join(blocks).splitlines())) <= 100
    assert main(["metrics", "entropy", "lr"]) == 0
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == ["policy/entropy (nats)", "policy/lr"]
    assert "  sick: goes to 0" in blocks[0]


def test_the_page_of_metrics_is_of_all(capsys: Any) -> None:
    assert main(["metrics", "--markdown"]) == 0
    assert capsys.readouterr().out == glossary.markdown()
    assert main(["metrics", "lr", "--markdown"]) == 2
    assert capsys.readouterr().err == "error: dapo metrics lr: --markdown is of all metrics\n"


def test_a_metric_that_does_not_exist_is_refused(capsys: Any) -> None:
    assert main(["metrics", "nothing"]) == 2
    assert capsys.readouterr().err == "error: no metric is called nothing: see dapo metrics\n"
