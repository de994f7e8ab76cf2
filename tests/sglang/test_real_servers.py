"""Real SGLang servers: they start, answer, say what is wrong, come back, and leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dapo.config import ConfigError
from dapo.engine.arguments import OURS, known_arguments, server_options
from dapo.engine.fleet import make_servers
from tests.sglang.conftest import RunningServer, server_config
from tests.sglang.two_servers import GROUPS, SAMPLES

ROOT = Path(__file__).parents[2]


def test_a_started_server_is_healthy_and_generates(sglang_server: RunningServer) -> None:
    answer = sglang_server.server.post(
        "/generate", {"input_ids": [3, 4, 5], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    )
    assert len(answer["output_ids"]) == 4
    assert sglang_server.server.get("/model_info")["model_path"] == str(sglang_server.model)


def test_arguments_are_those_of_the_installed_sglang(sglang_python: Path, tmp_path: Path) -> None:
    known = known_arguments(str(sglang_python), has_cuda=False)
    ours = server_options(server_config(tmp_path, tmp_path), {}, has_cuda=False)
    for name in [*ours, *OURS, "tp-size", "pp-size", "dp-size", "enable-dp-attention", "enable-memory-saver"]:
        assert known[name][0] == name, "arguments.py uses this name"
    with pytest.raises(
        ConfigError,
        match=r"mem-fraction-statik: SGLang has no such argument; did you mean mem-fraction-static\?",
    ):
        server_options(
            server_config(tmp_path, tmp_path, sglang={"mem-fraction-statik": 0.5}), known, has_cuda=False
        )


@pytest.mark.parametrize(
    ("model", "sglang", "words"),
    [
        ("absent", {}, ["ended with status", "absent"]),
        ("", {"attention-backend": "fast"}, ["--attention-backend: invalid choice: 'fast'"]),
    ],
)
def test_a_server_that_does_not_start_says_why(
    sglang_python: Path,
    random_model: Path,
    tmp_path: Path,
    model: str,
    sglang: dict[str, str],
    words: list[str],
) -> None:
    servers = make_servers(
        server_config(
            tmp_path, tmp_path / model if model else random_model, python=sglang_python, sglang=sglang
        ),
        lambda text: None,
    )
    with pytest.raises(ConfigError) as error:
        servers.wait()
    print(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_a_server_killed_or_hung_at_work_loses_nothing_and_comes_back_and_all_die_with_the_trainer(
    sglang_python: Path, random_model: Path, tmp_path: Path
) -> None:
    with open(tmp_path / "stderr", "w") as stderr:
        command = [
            sys.executable,
            "-m",
            "tests.sglang.two_servers",
            str(tmp_path),
            str(random_model),
            str(sglang_python),
        ]
        trainer = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        assert trainer.stdout
        printed = next((line for line in trainer.stdout if line.startswith("{")), "")
        assert printed, (tmp_path / "stderr").read_text()[-3000:]
        seen = json.loads(printed)
        family = [psutil.Process(pid) for pid in seen["family"]]
        assert seen["num_processes"] >= 11, (
            "three guardians, two servers of at least three processes, a router"
        )

        assert seen["running_when_killed"] > 0, "it was killed at work"
        for name, step, version in (("first_step", 0, 0), ("second_step", 1, 1), ("third_step", 2, 1)):
            groups = range(step * GROUPS, (step + 1) * GROUPS)
            asked = [(group, index) for group in groups for index in range(SAMPLES)]
            assert sorted((group, index) for group, index, _ in seen[name]["samples"]) == asked, "each once"
            assert seen[name]["kept"] == [[group, SAMPLES] for group in groups], "the step is whole"
            wrote = {version for *_, versions in seen[name]["samples"] for version in versions}
            assert wrote == {version}, "somebody with other weights answered"
        assert seen["workers_before_sync"] == seen["urls"][1:]
        assert len(seen["urls_after_sync"]) == 2 and seen["urls"][0] not in seen["urls_after_sync"]
        assert sorted(seen["most_running"]) == sorted(seen["urls_after_sync"]) and all(
            seen["most_running"].values()
        ), "both serve"
        assert any("starting it again" in line for line in seen["said"]) and any(
            "up again" in line for line in seen["said"]
        )

        assert any("server 0 stood still for 5 s" in line for line in seen["said"])

        guarded = [psutil.Process(pid) for pid in seen["guarded"]]
        assert len(guarded) >= 3
        psutil.Process(seen["guardian"]).kill()
        assert psutil.wait_procs(guarded, timeout=10)[1] == []
    finally:
        trainer.kill()
        trainer.wait()
    assert psutil.wait_procs(family, timeout=10)[1] == []
