import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dapo.__main__ import main
from dapo.config import ConfigError
from dapo.report import curves, glossary, page
from dapo.report.samples import embed
from dapo.rollout import dump
from tests.dapo.report.builders import HOSTILE, data_of, make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium or google-chrome on PATH")


def refused(arguments: list[str], capsys) -> str:
    """The one line that the command prints of what it cannot use."""
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


# what a run's directory says


def test_numbers_keep_six_digits_and_what_is_missing_or_not_finite_is_nothing():
    rows = [
        {"step": 0, "a": 1 / 3, "note": "text"},
        {"step": 1, "a": float("nan")},
        {"step": 2, "a": 7, "b": -1e-9},
    ]
    assert curves.columns(rows) == {"step": [0, 1, 2], "a": [0.333333, None, 7], "b": [None, None, -1e-9]}


@pytest.mark.parametrize(
    "paths, expected",
    [
        (["/r/a", "/r/b"], ["a", "b"]),
        (["/r/x/run", "/r/y/run"], ["x/run", "y/run"]),
        (["/r/x/run", "/s/x/run", "/s/b"], ["r/x/run", "s/x/run", "/s/b"[1:]]),
        (["/r/a", "/r/a"], ["a", "a (2)"]),
    ],
)
def test_runs_of_the_same_name_are_told_apart(paths, expected):
    assert page.labels([Path(path) for path in paths]) == expected


def test_the_options_that_differ_are_named(tmp_path):
    runs = [page.read(make_run(tmp_path / name, lr=lr), name) for name, lr in [("a", 1e-6), ("b", 2e-6)]]
    assert page.differences(runs) == {"optim.lr": ["1e-06", "2e-06"]}
    assert page.differences(runs[:1]) == {}


# bad input


def test_a_directory_that_is_no_runs_is_refused(tmp_path, capsys):
    assert "nowhere is not a directory" in refused([str(tmp_path / "nowhere")], capsys)
    assert "has no metrics.jsonl" in refused([str(tmp_path)], capsys)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "no whole row"),
        (b'{"step": 0, "rew', "no whole row"),
        (b'{"step": 0}\n[1, 2]\n', "metrics.jsonl:2 is not a row"),
        (b'{"reward": 0}\n', "metrics.jsonl:1 is not a row"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
    ids=["empty", "torn", "list", "no step", "binary"],
)
def test_metrics_without_a_row_are_refused(tmp_path, capsys, content, said):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_bytes(content)
    assert said in refused([str(run)], capsys)
    assert not (run / "report.html").exists()


def test_a_torn_last_line_is_left_out_with_a_warning(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rollout/rew')
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: ") and "metrics.jsonl:4 is cut short" in printed.err
    assert "report.html" in printed.out
    data = data_of(run / "report.html")["runs"][0]
    assert data["columns"]["step"] == [0, 1, 2] and "cut short" in data["warnings"][0]
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_writing_a_step_is_read_as_far_as_it_is(tmp_path):
    run = make_run(tmp_path / "run", dumps=2)
    dump.traces_path_of(run / "rollouts", 1).unlink()
    (run / "rollouts" / "step-000002.partial").write_bytes(b"PAR1 and no more")
    page.write([run], None, 1)
    assert {group["step"] for group in data_of(run / "report.html")["runs"][0]["groups"]} == {0, 1}


@pytest.mark.parametrize("which", [dump.path_of, dump.traces_path_of], ids=["dump", "traces"])
def test_a_damaged_dump_is_refused_and_named(tmp_path, capsys, which):
    run = make_run(tmp_path / "run")
    path = which(run / "rollouts", 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert f"{path} is damaged" in refused([str(run)], capsys)
    assert main(["report", str(run), "--samples", "0"]) == 0, "the remedy"
    path.write_bytes(whole)
    damaged, content = 0, embed(run, None, 1 << 20).blobs
    # a byte in the middle: it does not matter, or it is said
    for at in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            assert embed(run, None, 1 << 20).blobs == content
        except ConfigError as error:
            damaged += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert damaged > 3


def test_a_parquet_file_that_is_no_dump_is_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    path = dump.path_of(run / "rollouts", 0)
    dump.traces_path_of(run / "rollouts", 0).rename(path)
    assert f"{path} is " in refused([str(run)], capsys)


def test_an_output_that_cannot_be_written_is_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    for out in (tmp_path / "nowhere" / "page.html", tmp_path, tmp_path / "page.png"):
        assert "cannot be written" in refused([str(run), "--out", str(out)], capsys)
    assert "--samples=-1.0" in refused([str(run), "--samples", "-1"], capsys)


def test_reading_a_run_does_not_wait_for_torch(tmp_path):
    run = make_run(tmp_path / "run")
    code = f"""
import sys
from dapo.__main__ import main
main(["report", {str(run)!r}])
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# in a browser


def open_page(file: Path, fragment: str = "", script: str = "", width: int = 1500) -> tuple[str, list[str]]:
    """The document after Chromium ran the page, with `script` at its end, and what Chromium complained of."""
    if script:
        file = Path(shutil.copy(file, file.with_suffix(".scripted.html")))
        file.write_text(file.read_text().replace("</body>", f"<script>{script}</script></body>"))
    options = (
        f"--headless=new --no-sandbox --disable-gpu --window-size={width},1000 --virtual-time-budget=10000"
    )
    outputs = f"--user-data-dir={file.parent / 'profile'} --enable-logging=stderr --dump-dom"
    command = [CHROMIUM, *options.split(), *outputs.split(), f"{file.as_uri()}#{fragment}"]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    complaints = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    dom = done.stdout.decode(errors="surrogateescape")
    return re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL), complaints


def words(dom: str, id: str) -> str:
    """The text below an element, without its tags."""
    found = re.search(rf'<(\w+)[^>]* id="{id}"[^>]*>(.*)', dom, re.DOTALL)
    assert found, f"no #{id}"
    depth, end = 1, len(found[2])
    for tag in re.finditer(rf"<(/?){found[1]}\b", found[2]):
        depth += -1 if tag[1] else 1
        if not depth:
            end = tag.start()
            break
    return re.sub(r"<[^>]*>", "", found[2][:end])


@in_a_browser
def test_a_page_of_two_runs_of_a_thousand_steps_is_drawn_without_complaint(tmp_path):
    runs = [
        make_run(tmp_path / name / "run", steps=1000, dumps=40, lr=lr)
        for name, lr in [("a", 1e-6), ("b", 2e-6)]
    ]
    page.write(runs, tmp_path / "page.html", 16)
    dom, complaints = open_page(tmp_path / "page.html", "run=1&step=17&smooth=0")
    assert complaints == []
    assert re.search(r'<body data-opened="\d+" data-shown="1/17/\d+/0"', dom)
    panels = dom.count('class="panel card"')
    assert panels == 3 + 2 + 2, "reward, length and time, and groups and phases of each run"
    points = re.findall(r'class="curve" d="(?:[ML][-\d. ]+){1000}"', dom)
    assert len(points) == 6, "a point for every step of both runs"
    assert "a/run" in words(dom, "runs") and "b/run" in words(dom, "runs")
    assert "optim.lr1e-062e-06" in words(dom, "differences")
    assert words(dom, "curves").startswith("response length (tokens)1,0991,099")
    assert words(dom, "held") == "all 240 dumped samples of 40 steps"
    assert words(dom, "prompt") == "what is 2? the answer" and words(dom, "response") == "the answer"
    response = re.search(r'id="response".*', dom, re.DOTALL)[0]
    assert len(re.findall(r'<span[^>]*class="(?:up|down)"[^>]*>', response)) == 2
    assert re.search(r'<span style="background: rgba\((?:214, 122, 32|var\(--heat\)), 0\.\d+\)', dom)


@in_a_browser
def test_each_curve_says_what_it_means_and_how_a_healthy_run_looks(tmp_path):
    page.write([make_run(tmp_path / "run")], tmp_path / "page.html", 0)
    dom, complaints = open_page(tmp_path / "page.html", script="$('more').open = true; build();")
    assert complaints == []
    for name in ("rollout/length", "rollout/reward", "time/step"):
        metric = glossary.find(name)
        assert metric.meaning in words(dom, "curves")
        assert f"healthy: {metric.healthy}\nsick: {metric.sick}" in dom
    assert "odd/metric" in words(dom, "others"), "what the glossary lacks is shown by its name"


@in_a_browser
def test_healthy_values_are_shaded_where_they_are_in_sight(tmp_path):
    run = make_run(tmp_path / "run", steps=0)
    rows = [
        {"step": i, "policy/clip_high": 0.02 * i, "policy/entropy": 0.5, "rollout/truncated": 0.9}
        for i in range(3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.write([run], tmp_path / "page.html", 0)
    dom, complaints = open_page(tmp_path / "page.html")
    assert complaints == []
    panels = dom.split('class="panel card"')[1:]
    shaded = {
        re.search(r'class="title"[^>]*>([^<]*)<', panel)[1]: 'class="band"' in panel for panel in panels
    }
    assert {name for name, is_shaded in shaded.items() if is_shaded} == {"clipped high"}
    assert "Shaded: healthy." in words(dom, "curves")
    [panel] = [panel for panel in panels if 'class="band"' in panel]
    rect = {
        name: float(value)
        for name, value in re.findall(
            r'(y|height|width|x)="([\d.]+)"', re.search(r'<rect class="band"[^>]*>', panel)[0]
        )
    }
    assert rect["height"] == pytest.approx(2 + 162 * 0.01 / (0.04 * 1.06), abs=1), (
        "a hundredth of what is in sight"
    )
    assert rect["y"] + rect["height"] == pytest.approx(171, abs=1), "down to the axis"


@in_a_browser
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_fits_its_window(tmp_path, width):
    page.write([make_run(tmp_path / "run")], tmp_path / "page.html", 1)
    script = "document.body.dataset.width = document.documentElement.scrollWidth + ' ' + innerWidth;"
    dom, complaints = open_page(tmp_path / "page.html", script=script, width=width)
    assert complaints == []
    content, window = map(int, re.search(r'data-width="(\d+) (\d+)"', dom).groups())
    assert content <= window


@in_a_browser
def test_nothing_in_a_run_is_read_as_html(tmp_path):
    run = make_run(tmp_path / "<b>run<!--", responses=(HOSTILE, "the answer"))
    page.write([run], tmp_path / "page.html", 16)
    dom, complaints = open_page(tmp_path / "page.html")
    assert complaints == []
    assert "<img" not in dom and "<b>bold" not in dom and "hurt</title>" not in dom
    shown = words(dom, "response").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert shown == HOSTILE.replace("\x00", "␀")
    assert "&lt;b&gt;run&lt;!--" in words(dom, "top")


@in_a_browser
def test_dragging_zooms_double_click_resets_and_a_click_chooses_the_step(tmp_path):
    run = make_run(tmp_path / "run", steps=101, dumps=101)
    page.write([run], tmp_path / "page.html", 16)
    script = """
const svg = document.querySelector(".panel svg"), box = svg.getBoundingClientRect(), seen = [];
const px = step => 50 + step / 100 * (box.width - 62);
const at = step => ({clientX: box.left + px(step), clientY: box.top + 60, pointerId: 1, bubbles: true});
const send = (type, step) => svg.dispatchEvent(new PointerEvent(type, at(step)));
const note = () => seen.push([(state.zoom || []).map(Math.round), state.step]);
send("pointermove", 30); seen.push(document.querySelector(".readout").textContent);
send("pointerdown", 20); send("pointermove", 50); send("pointerup", 50); note();
svg.dispatchEvent(new MouseEvent("dblclick")); note();
send("pointerdown", 70); send("pointerup", 70); note();
document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"})); note();
document.body.dataset.seen = JSON.stringify(seen);
"""
    dom, complaints = open_page(tmp_path / "page.html", "step=5", script)
    assert complaints == []
    seen = json.loads(re.search(r'data-seen="(.*?)"', dom)[1].replace("&quot;", '"'))
    assert seen == ["130", [[20, 50], 5], [[], 5], [[], 70], [[], 69]]


@in_a_browser
def test_a_run_without_its_tokenizer_shows_whole_responses(tmp_path):
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "hf")
    page.write([run], None, 16)
    dom, complaints = open_page(run / "report.html")
    assert complaints == []
    assert words(dom, "response") == "the answer"
    assert "<span" not in re.search(r'id="response".*?</div>', dom, re.DOTALL)[0]
    assert "no tokenizer.json" in words(dom, "top")


@in_a_browser
def test_a_page_that_fails_is_noticed(tmp_path):
    page.write([make_run(tmp_path / "run")], tmp_path / "page.html", 16)
    _, complaints = open_page(tmp_path / "page.html", script="undefinedFunction()")
    assert any("undefinedFunction" in line for line in complaints)
