"""The page of a run that goes on: it shows the newest step, and loads itself again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread

import pytest

from dapo.config import ConfigError
from dapo.report import serve
from tests.dapo.report.builders import make_run
from tests.dapo.report.test_page import CHROMIUM, in_a_browser


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A run of three steps, and the URL of its page."""
    run = make_run(tmp_path / "run", steps=3)
    with serve.make_server([run], 1.0, 0) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield run, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def get(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        return answer.read().decode()


def write_step(run: Path, step: int) -> None:
    with (run / "metrics.jsonl").open("a") as rows:
        rows.write(json.dumps({"step": step, "rollout/reward": 0.123456}) + "\n")


def test_the_page_has_the_newest_step_each_time(served: tuple[Path, str]) -> None:
    run, url = served
    before, text = get(url + "state"), get(url)
    assert "0.123456" not in text and "connect-src 'self'" in text and text.count("/state") == 1
    write_step(run, 3)
    assert get(url + "state") != before
    assert "0.123456" in get(url)


def test_a_check_of_the_address_gets_no_page(served: tuple[Path, str]) -> None:
    request = urllib.request.Request(served[1], method="HEAD")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200 and answer.read() == b""


def test_a_run_that_has_no_step_yet_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    text = serve.live([tmp_path / "run"], 1.0)
    assert "its first step is still being made" in text and "/state" in text
    (tmp_path / "<b>").mkdir()
    assert "<b>" not in serve.live([tmp_path / "<b>"], 1.0).replace("<body>", "")


@pytest.mark.parametrize("path", ["etc/passwd", "../run/config.yaml", "state/x"])
def test_nothing_else_is_served(path: str, served: tuple[Path, str]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(served[1] + path)


def test_another_site_s_page_gets_nothing_through_a_name_of_its_own(served: tuple[Path, str]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(served[1], Host="evil.example:8000")
    assert get(
        served[1] + "state",
        Host=served[1].removeprefix("http://").strip("/").replace("127.0.0.1", "localhost"),
    )


def test_a_port_that_is_taken_is_refused(served: tuple[Path, str]) -> None:
    port = int(served[1].rstrip("/").rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"--port {port}: Address already in use: name another one"):
        serve.make_server([served[0]], 1.0, port)


def test_the_command_serves_until_ctrl_c(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    command = [sys.executable, "-m", "dapo", "report", "--serve", str(run), "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # tests that a shell has put into the background ignore Ctrl-C, and what they start does too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout and process.stderr
        url = process.stdout.readline().split()[0]
        assert "<title>" in get(url)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0 and not process.stderr.read()
    finally:
        process.kill()
        process.communicate()


@in_a_browser
def test_a_browser_shows_a_step_that_was_written_while_it_looked(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, url = served
    asked: list[str] = []
    state = serve.state

    def write_and_ask(directories: Sequence[Path]) -> str:
        asked.append(state(directories))
        if len(asked) == 2:  # the browser knows the first answer
            write_step(run, 3)
        return state(directories)

    monkeypatch.setattr(serve, "state", write_and_ask)
    options = "--headless=new --no-sandbox --disable-gpu --virtual-time-budget=20000 --dump-dom"
    command = [str(CHROMIUM), *options.split(), f"--user-data-dir={tmp_path / 'profile'}", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert len(asked) > 2
    assert "0.123456" in done.stdout
