import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from dapo.__main__ import main
from dapo.config import ConfigError
from dapo.learn.traces import Trace
from dapo.report import page
from dapo.rollout import dump
from dapo.rollout.buffer import Buffer
from dapo.types import Group, Prompt, Sample

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"
)
HOSTILE = 'a</script><img src=x onerror=document.title="hurt"><!-- <b>bold</b> \x00\u2028 é😀 «data» &amp;'


def make_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Byte-level: every text has tokens, and a character that was not seen is several of them."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        ["the answer is the number the answer"] * 3, vocab_size=260, show_progress=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def make_groups(
    step: int, tokenizer: tokenizers.Tokenizer, responses: list[str], num_groups: int = 3
) -> list[Group]:
    """Groups all correct, all wrong and mixed in turn; the last sample of each is cut off."""
    groups = []
    for place in range(num_groups):
        group = Group(
            (step << 20) + place,
            Prompt(place, np.array(tokenizer.encode(f"what is {place}? {responses[0]}").ids, np.int32), "42"),
        )
        for index, response in enumerate(responses):
            tokens = np.array(tokenizer.encode(response).ids, np.int32)
            n, is_correct = len(tokens), [True, False, index == 0][place % 3]
            logprobs = -np.linspace(0, 3, n, dtype=np.float32)
            finish = "length" if index == len(responses) - 1 else "stop"
            sample = Sample(
                group.id,
                index,
                tokens,
                logprobs,
                np.ones(n, bool),
                ((0, 0, n),),
                finish,
                response,
                is_correct,
            )
            group.samples.append(sample)
        groups.append(group)
    return groups


def make_run(
    directory: Path,
    *,
    steps: int = 3,
    responses: tuple[str, ...] = ("the answer", "is the number"),
    dumps: int = 1,
    lr: float = 1e-6,
) -> Path:
    tokenizer = make_tokenizer(directory / "hf")
    (directory / "config.yaml").write_text(
        f"run: {{dir: {json.dumps(str(directory))}}}\noptim: {{lr: {lr}}}\npolicy: {{model: elsewhere}}\n"
    )
    rows = [{"step": step, "rollout/reward": step / 7, "rollout/length": 100 + step, "groups/kept": 2, "groups/all_wrong": 1,
             "time/rollout": 2.0, "time/step": 5.0, "odd/metric": 1.0} for step in range(steps)]  # fmt: skip
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in range(dumps):
        buffer = Buffer(8, is_dynamic=True)
        for group in make_groups(step, tokenizer, list(responses)):
            buffer.offer(group)
        dump.write(dump.path_of(directory / "rollouts", step), buffer, share=1.0)
        dump.write_traces(
            dump.traces_path_of(directory / "rollouts", step),
            [make_trace(s) for g in buffer.kept for s in g.samples],
        )
    return directory


def make_trace(sample: Sample) -> Trace:
    """The second token clipped low, the third high, by e^∓1."""
    at, change = np.arange(sample.length), np.zeros(sample.length, np.float32)
    change[1:3] = [-1, 1]
    return Trace(
        sample.group,
        sample.index,
        sample.behavior_logprobs,
        sample.behavior_logprobs + change,
        at == 1,
        at == 2,
    )


def data_of(file: Path):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text())[1]
    )


def refused(arguments: list[str], capsys) -> str:
    """What the command says, in one line, of what it cannot use."""
    assert main(["report", *arguments]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    return told


# what a run's directory says


def test_numbers_keep_six_digits_and_what_is_missing_or_not_finite_is_nothing():
    rows = [
        {"step": 0, "a": 1 / 3, "note": "text"},
        {"step": 1, "a": float("nan")},
        {"step": 2, "a": 7, "b": -1e-9},
    ]
    assert page.columns(rows) == {"step": [0, 1, 2], "a": [0.333333, None, 7], "b": [None, None, -1e-9]}


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


def test_every_beginning_of_the_order_is_spread_evenly():
    assert page.spread(0) == []
    for count in range(1, 70):
        order = page.spread(count)
        assert sorted(order) == list(range(count)) and order[0] == count - 1
        for taken in (4, 8, 16):
            if taken < count:
                gaps = np.diff([-1, *sorted(order[:taken]), count])
                assert gaps.max() <= 2 * count / taken + 1


# tokens


def test_the_pieces_of_a_text_are_its_tokens_and_a_split_character_is_its_last_tokens(tmp_path):
    made = make_tokenizer(tmp_path)
    tokenizer = page.Tokenizer(tmp_path / "tokenizer.json")
    for text in ["the answer é😀 is", "😀", HOSTILE, ""]:
        ids = made.encode(text).ids
        pieces = tokenizer.pieces(ids)
        assert "".join(pieces) == text and len(pieces) == len(ids)
    assert tokenizer.pieces(made.encode("é!").ids) == ["", "é", "!"]


def test_the_pieces_of_half_a_character_are_its_replacement(tmp_path):
    ids = make_tokenizer(tmp_path).encode("the 😀").ids
    pieces = page.Tokenizer(tmp_path / "tokenizer.json").pieces(ids[:-1])
    assert pieces[-1] == "\ufffd" and pieces[0] == "the"


def test_a_decoder_that_strips_a_leading_space_keeps_it_between_tokens(tmp_path):
    tokenizer = tokenizers.SentencePieceBPETokenizer()
    tokenizer.train_from_iterator(["0 the answer the answer"], vocab_size=20, show_progress=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("the answer the answer").ids
    pieces = page.Tokenizer(tmp_path / "tokenizer.json").pieces(ids)
    assert (
        pieces is not None
        and len(pieces) == len(ids) >= 4
        and "".join(pieces).strip() == "the answer the answer"
    )


# samples in the page


def test_what_fits_is_spread_over_steps_and_counted(tmp_path):
    run = page.read(make_run(tmp_path / "run", dumps=16), "run")
    whole = page.embed(run, 1 << 20)
    assert whole.num_samples == 16 * 3 * 2
    assert [entry["kind"] for entry in whole.index[:3]] == ["kept", "all_correct", "all_wrong"]
    quarter = page.embed(run, whole.num_bytes // 4)
    steps = sorted({entry["step"] for entry in quarter.index})
    assert whole.num_bytes / 5 < quarter.num_bytes <= whole.num_bytes / 4
    assert {0, 15} <= set(steps) and len(steps) >= 4 and np.diff(steps).max() <= 8
    assert page.embed(run, 0).num_samples == 0


def test_a_group_says_of_each_sample_what_the_dump_and_its_traces_say(tmp_path):
    run = page.read(make_run(tmp_path / "run"), "run")
    mixed = page.read_groups(run.directory / "rollouts", 0, slice(0, 1))[0]
    entry, content = page.describe(0, mixed, page.Tokenizer.of(run))
    assert (
        entry["kind"] == "kept"
        and entry["outcomes"] == "cW"
        and entry["preview"] == content["prompt"] == "what is 2? the answer"
    )
    first, second = content["samples"]
    assert "".join(first["pieces"]) == "the answer" and first["correct"] and not first["truncated"]
    assert "".join(second["pieces"]) == "is the number" and second["finish"] == "length"
    n = second["tokens"]
    assert second["surprise"] == [round(300 * i / (n - 1)) for i in range(n)]
    assert second["clips"] == [[1, "low", 0.367879], [2, "high", 2.71828]]


def test_a_step_made_anew_has_lost_the_traces_of_the_attempt_before(tmp_path):
    rollouts = make_run(tmp_path / "run") / "rollouts"
    assert dump.traces_path_of(rollouts, 0).exists()
    dump.write(dump.path_of(rollouts, 0), dump.read(dump.path_of(rollouts, 0), 8), share=1.0)
    assert not dump.traces_path_of(rollouts, 0).exists()


def test_a_group_without_traces_has_no_clips(tmp_path):
    run = page.read(make_run(tmp_path / "run"), "run")
    dump.traces_path_of(run.directory / "rollouts", 0).unlink()
    for rows in page.read_groups(run.directory / "rollouts", 0, slice(0, None)):
        assert all(
            "clips" not in sample for sample in page.describe(0, rows, page.Tokenizer.of(run))[1]["samples"]
        )


def test_tokens_that_the_policy_did_not_write_are_marked(tmp_path):
    run = page.read(make_run(tmp_path / "run"), "run")
    row = page.read_groups(run.directory / "rollouts", 0, slice(0, 1))[0][0]
    row["loss_mask"][1] = False
    assert page.describe(0, [row], page.Tokenizer.of(run))[1]["samples"][0]["foreign"] == [1]


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
    told = capsys.readouterr()
    assert (
        told.err.startswith("warning: ")
        and "metrics.jsonl:4 is cut short" in told.err
        and "report.html" in told.out
    )
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
    damaged, content = 0, page.embed(page.read(run, "run"), 1 << 20).blobs
    # a byte in the middle: it does not matter, or it is said
    for at in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            assert page.embed(page.read(run, "run"), 1 << 20).blobs == content
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
    code = f"import sys; from dapo.__main__ import main; main(['report', {str(run)!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# in a browser


def open_page(file: Path, fragment: str = "", script: str = "") -> tuple[str, list[str]]:
    """The document as Chromium has it after running the page, and `script` at its end; and what it complained
    of.
    """
    if script:
        file = Path(shutil.copy(file, file.with_suffix(".scripted.html")))
        file.write_text(file.read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = [
        str(CHROMIUM),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={file.parent / 'profile'}",
    ]
    options = [
        "--window-size=1500,1000",
        "--virtual-time-budget=10000",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    done = subprocess.run(
        [*command, *options, f"{file.as_uri()}#{fragment}"], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    complaints = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return re.sub(
        r"<script.*?</script>", "", done.stdout.decode(errors="surrogateescape"), flags=re.DOTALL
    ), complaints


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
    assert re.search(
        r'<body data-opened="\d+" data-shown="1/17/\d+/0"',
        dom.replace('data-shown="1/17', 'data-shown="1/17'),
    )
    assert dom.count('class="panel card"') == 3 + 2 + 2, (
        "reward, length and time, and groups and phases of each run"
    )
    assert len(re.findall(r'class="curve" d="(?:[ML][-\d. ]+){1000}"', dom)) == 6, (
        "a point for every step of both runs"
    )
    assert "a/run" in words(dom, "runs") and "b/run" in words(dom, "runs")
    assert "optim.lr1e-062e-06" in words(dom, "differences")
    assert words(dom, "curves").startswith("response length (tokens)1,0991,099")
    assert words(dom, "held") == "all 240 dumped samples of 40 steps"
    assert words(dom, "prompt") == "what is 2? the answer" and words(dom, "response") == "the answer"
    assert (
        len(
            re.findall(
                r'<span[^>]*class="(?:up|down)"[^>]*>', re.search(r'id="response".*', dom, re.DOTALL)[0]
            )
        )
        == 2
    )
    assert re.search(
        r"<span style=\"background: rgba\(214, 122, 32|<span style=\"background: rgba\(var\(--heat\), 0\.\d+\)",
        dom,
    )


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
const svg = document.querySelector(".panel svg"), box = svg.getBoundingClientRect(), told = [];
const px = step => 50 + step / 100 * (box.width - 62);
const at = step => ({clientX: box.left + px(step), clientY: box.top + 60, pointerId: 1, bubbles: true});
const send = (type, step) => svg.dispatchEvent(new PointerEvent(type, at(step)));
const tell = () => told.push([(state.zoom || []).map(Math.round), state.step]);
send("pointermove", 30); told.push(document.querySelector(".readout").textContent);
send("pointerdown", 20); send("pointermove", 50); send("pointerup", 50); tell();
svg.dispatchEvent(new MouseEvent("dblclick")); tell();
send("pointerdown", 70); send("pointerup", 70); tell();
document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"})); tell();
document.body.dataset.told = JSON.stringify(told);
"""
    dom, complaints = open_page(tmp_path / "page.html", "step=5", script)
    assert complaints == []
    told = json.loads(re.search(r'data-told="(.*?)"', dom)[1].replace("&quot;", '"'))
    assert told == ["130", [[20, 50], 5], [[], 5], [[], 70], [[], 69]]


@in_a_browser
def test_a_run_without_its_tokenizer_shows_whole_responses(tmp_path):
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "hf")
    page.write([run], None, 16)
    dom, complaints = open_page(run / "report.html")
    assert complaints == []
    assert (
        words(dom, "response") == "the answer"
        and "<span" not in re.search(r'id="response".*?</div>', dom, re.DOTALL)[0]
    )
    assert "no tokenizer.json" in words(dom, "top")


@in_a_browser
def test_a_page_that_fails_is_noticed(tmp_path):
    page.write([make_run(tmp_path / "run")], tmp_path / "page.html", 16)
    assert any(
        "undefinedFunction" in line
        for line in open_page(tmp_path / "page.html", script="undefinedFunction()")[1]
    )
