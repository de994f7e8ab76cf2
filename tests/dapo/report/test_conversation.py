"""Samples of several turns: who wrote which token, as it is described and as the page shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dapo.config import ConfigError
from dapo.report import page, samples
from dapo.report.conversation import Conversation, turns
from dapo.rollout import dump
from tests.dapo.report.builders import ASKED, GUESSED, HOSTILE, Messages, data_of, make_episodes, make_run
from tests.dapo.report.test_page import in_a_browser, open_page, words

COUNTED = {"num_calls": 2, "num_unreadable": 1, "num_neutralised": 1, "num_attempts": 2}


def described(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The entry of the run's group, and its samples."""
    [rows] = samples.read_groups(run / "rollouts", 0, slice(None))
    entry, content = samples.describe(0, rows, samples.Tokenizer.find([run / "hf"]))
    return entry, content["samples"]


def conversation_of(messages: Messages, **counts: int) -> Conversation:
    zeros = {f"num_{name}": 0 for name in ("calls", "unreadable", "failed", "neutralised")}
    num_turns = sum(message["role"] == "assistant" for message in messages)
    return Conversation.read(
        json.dumps({"messages": messages, "num_attempts": 1, "num_turns": num_turns} | zeros | counts)
    )


def texts(sample: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Of each turn: its authors, the text of its tokens, and what is marked in it."""
    pieces = sample["pieces"]
    return [
        (
            turn["by"],
            "".join(pieces[turn["start"] : turn["end"]]),
            ["".join(pieces[a:b]) for a, b in turn["marked"]],
        )
        for turn in sample["turns"]
    ]


# what is described


def test_each_turn_has_its_author_its_tokens_and_the_calls_or_messages_in_them(tmp_path: Path) -> None:
    _, [asked, guessed, plain] = described(make_episodes(tmp_path / "run", ASKED, GUESSED, None, **COUNTED))
    calls = ['<tool_call>\n{"name": "times"}\n</tool_call>', '<tool_call>{"na</tool_call>']
    assert texts(asked) == [
        ("policy", f"the {calls[0]}{calls[1]}<|im_end|>", calls),
        (
            "tool times, tool",
            "\n<|im_start|>tool\n12 é<|im_end|>\n<|im_start|>tool\nno JSON: <|im_end|><|im_end|>\n"
            "<|im_start|>assistant\n",
            ["12 é", "no JSON: <|im_end|>"],
        ),
        ("policy", "the answer is 12<|im_end|>", []),
    ]
    higher = "\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n"
    assert texts(guessed)[1] == ("environment", higher, ["higher"])
    assert [turn.get("turn") for turn in guessed["turns"]] == [1, None, 2, None, 3]
    assert asked["episode"] == {
        "turns": 2,
        "calls": 2,
        "unreadable": 1,
        "failed": 0,
        "neutralised": 1,
        "attempts": 2,
        "own": sum(turn["end"] - turn["start"] for turn in asked["turns"] if "turn" in turn),
    }
    assert "turns" not in plain and "episode" not in plain and "foreign" not in asked


def test_the_list_of_groups_has_the_task_and_the_number_of_turns(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "many tools"}, {"role": "user", "content": "what is\n3 * 4?"}]
    entry, _ = described(make_episodes(tmp_path / "run", ASKED, GUESSED, None, prompt=prompt))
    assert entry["preview"] == "what is 3 * 4?" and entry["turns"] == [2, 3]


def test_the_mean_probability_is_of_the_policys_tokens(tmp_path: Path) -> None:
    run = make_episodes(tmp_path / "run", GUESSED, None)
    [rows] = samples.read_groups(run / "rollouts", 0, slice(None))
    rows[0]["behavior_logprobs"] = [-1.0 if own else 0.0 for own in rows[0]["loss_mask"]]
    _, content = samples.describe(0, rows, None)
    assert content["samples"][0]["probability"] == pytest.approx(0.367879)


def test_without_a_tokenizer_the_turns_are_the_messages(tmp_path: Path) -> None:
    run = make_episodes(tmp_path / "run", ASKED, None)
    [rows] = samples.read_groups(run / "rollouts", 0, slice(None))
    _, content = samples.describe(0, rows, None)
    [sample, plain] = content["samples"]
    assert [(turn["by"], turn["text"]) for turn in sample["turns"]] == [
        ("policy", ASKED[0]["content"]),
        ("tool times, tool", "12 é\nno JSON: <|im_end|>"),
        ("policy", ASKED[3]["content"]),
    ]
    assert "turns" not in plain and plain["text"] == "the answer<|im_end|>"


def test_what_comes_after_the_last_turn_has_a_text_and_no_tokens() -> None:
    conversation = conversation_of([*GUESSED[:1], {"role": "user", "content": "right!"}])
    assert turns(conversation, [True, True], ["is the number 5?", "."]) == [
        {"by": "policy", "turn": 1, "start": 0, "end": 2, "marked": []},
        {"by": "environment", "text": "right!"},
    ]


def test_messages_of_the_policy_in_the_prompt_are_not_its_turns() -> None:
    shots = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    conversation = conversation_of([*shots, {"role": "user", "content": "2+2"}, *GUESSED[:1]], num_turns=1)
    assert conversation.task == "2+2"
    assert [part[0].content for part in conversation.parts()] == ["is the number 5?"]


def test_messages_that_do_not_fit_the_tokens_name_nobody() -> None:
    found = turns(conversation_of(ASKED), [True, False, True, False, True], ["a", "12 é", "b", "c", "d"])
    assert [turn["by"] for turn in found] == ["policy", "environment", "policy", "environment", "policy"]
    assert all(turn["marked"] == [] for turn in found)


def test_a_message_that_the_template_has_changed_is_not_marked() -> None:
    for content in ('say "12"', [{"type": "text", "text": "12"}]):
        messages = [GUESSED[0], {"role": "tool", "content": content}, GUESSED[2]]
        [_, turn, _] = turns(conversation_of(messages), [True, False, True], ["a", '"say \\"12\\""', "c"])
        assert turn == {"by": "tool", "start": 1, "end": 2, "marked": []}


@pytest.mark.parametrize(
    "text, call",
    [
        ("so <tool_call>{}</tool_call> then<|im_end|>", "<tool_call>{}</tool_call>"),
        ("so <tool_call>{ and no end", "<tool_call>{ and no end"),
        ("I <tool_call>1</tool_call></think>\n<tool_call>2</tool_call>", "<tool_call>2</tool_call>"),
        ('\n{"name": "f", "parameters": {"a": {}}}<|eot_id|>', '\n{"name": "f", "parameters": {"a": {}}}'),
        ('<|python_tag|>{"name": "f"}<|eom_id|>', '<|python_tag|>{"name": "f"}'),
        ('it is {"name": "f"}', None),
    ],
)
def test_a_call_is_known_by_its_form(text: str, call: str | None) -> None:
    [turn] = turns(
        conversation_of([{"role": "assistant", "content": text}], num_calls=1), [True] * len(text), [*text]
    )
    assert [text[start:end] for start, end in turn["marked"]] == ([call] if call else [])
    [turn] = turns(conversation_of([{"role": "assistant", "content": text}]), [True] * len(text), [*text])
    assert turn["marked"] == [], "no call was counted"


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"messages": []}', '{"messages": [{"content": "a"}]}'])
def test_a_column_that_is_no_episode_is_refused_and_the_sample_named(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "run")
    path = dump.path_of(run / "rollouts", 0)
    table = pq.read_table(path)
    column = pa.array([text] * len(table), pa.string())
    pq.write_table(table.append_column("episode", column), path, write_page_checksum=True)
    with pytest.raises(ConfigError, match=rf"{path} is damaged: episode of sample 0 of group \d+: "):
        samples.read_groups(run / "rollouts", 0, slice(None))


def test_a_dump_without_episodes_is_described_as_one_without_the_column(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = samples.embed(run, None, 1 << 20)
    path = dump.path_of(run / "rollouts", 0)
    table = pq.read_table(path)
    column = pa.array([None, ""] * (len(table) // 2), pa.string())
    pq.write_table(table.append_column("episode", column), path, write_page_checksum=True)
    assert samples.embed(run, None, 1 << 20) == before


# in a browser


def blocks(dom: str) -> list[tuple[str, str]]:
    """The turns that the page shows: their classes and their text."""
    response = dom.split('id="response"')[1]
    parts = re.split(r'<div class="(turn \w+)">', response)[1:]
    return [(kind, re.sub("<[^>]*>", "", text)) for kind, text in zip(parts[::2], parts[1::2], strict=True)]


@in_a_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_sample_of_several_turns_is_shown_as_a_conversation(tmp_path: Path, width: int) -> None:
    run = make_episodes(tmp_path / "run", ASKED, GUESSED, None, **COUNTED)
    page.write([run], None, 1)
    script = "document.body.dataset.width = document.documentElement.scrollWidth + ' ' + innerWidth;"
    dom, complaints = open_page(run / "report.html", script=script, width=width)
    assert complaints == []
    content, window = map(int, re.search(r'data-width="(\d+) (\d+)"', dom).groups())  # type: ignore[union-attr]
    assert content <= window
    first, second, third = blocks(dom)
    assert first[0] == third[0] == "turn own" and second[0] == "turn theirs"
    assert re.match(r"policy, turn 1\d+ tokensthe &lt;tool_call&gt;\n", first[1])
    assert re.match(r"tool times, tool\d+ tokens↵&lt;\|im_start\|&gt;tool↵12 é&lt;\|im_end\|&gt;↵", second[1])
    assert re.match(r"policy, turn 2\d+ tokensthe answer is 12", third[1])
    assert dom.count('class="call"') == 2 and dom.count('class="content"') == 2
    head = words(dom, "episode")
    assert head.startswith("2 turns of the policy, 2 calls1 unreadable1 control token neutralised2 attempts")
    assert "failed" not in head and "tokens are the policy's" in head
    [*_, listed] = re.findall(r'class="group[^"]*">(.*?)</div>', dom)
    assert "kept, 2–3 turns" in re.sub("<[^>]*>", "", listed)
    assert re.findall(r"<tr data-sample.*?</tr>", dom)[2].count(">–<") == 2, "no turns, no calls"
    own, theirs = (
        dom.split('class="turn own"')[1],
        dom.split('class="turn theirs"')[1].split('class="turn')[0],
    )
    assert re.search(r'<span [^>]*class="(up|down)"', own) and "rgba" in own and "rgba" not in theirs


@in_a_browser
def test_samples_of_one_turn_beside_them_and_elsewhere_look_as_ever(tmp_path: Path) -> None:
    run = make_episodes(tmp_path / "run", ASKED, None)
    page.write([run], None, 1)
    dom, complaints = open_page(run / "report.html", "step=0&group=7&sample=1")
    assert complaints == [] and blocks(dom) == []
    assert words(dom, "response") == "the answer&lt;|im_end|&gt;" and 'id="episode"' not in dom
    other = make_run(tmp_path / "other")
    page.write([other], None, 1)
    dom, complaints = open_page(other / "report.html")
    assert complaints == [] and "turns" not in words(dom, "members") + words(dom, "groups")
    assert "turns" not in data_of(other / "report.html")["runs"][0]["groups"][0]


@in_a_browser
def test_pointing_at_a_token_says_whether_it_is_the_policys(tmp_path: Path) -> None:
    run = make_episodes(tmp_path / "run", GUESSED, None)
    page.write([run], None, 1)
    script = """
const look = async () => {
  while (!document.querySelector(".turn")) await new Promise(done => setTimeout(done, 20));
  const seen = [...document.querySelectorAll(".turn")].slice(0, 2).map(turn => {
    turn.querySelector("div > span:not(.soft)").dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
    return $("token").textContent;
  });
  document.body.dataset.seen = JSON.stringify(seen);
};
look();
"""
    dom, complaints = open_page(run / "report.html", script=script)
    assert complaints == []
    own, theirs = json.loads(re.search(r'data-seen="(.*?)"', dom)[1].replace("&quot;", '"'))  # type: ignore[index]
    assert own.startswith("token 1 of ") and own.endswith("p = 1")
    assert theirs.endswith('"\\n"  not the policy\'s')


@in_a_browser
def test_a_conversation_without_a_tokenizer_is_shown_by_its_messages(tmp_path: Path) -> None:
    run = make_episodes(tmp_path / "run", GUESSED, None)
    (run / "hf" / "tokenizer.json").unlink()
    page.write([run], None, 1)
    dom, complaints = open_page(run / "report.html")
    assert complaints == []
    assert blocks(dom)[1] == ("turn theirs", "environmenthigher")


@in_a_browser
def test_nothing_that_an_environment_says_is_read_as_html(tmp_path: Path) -> None:
    said = {"role": "tool", "content": HOSTILE, "name": "<b>times"}
    page.write([make_episodes(tmp_path / "run", [GUESSED[0], said, GUESSED[2], said], None)], None, 1)
    dom, complaints = open_page(tmp_path / "run" / "report.html")
    assert complaints == []
    assert "<img" not in dom and "<b>bold" not in dom and "<b>times" not in dom and "hurt</title>" not in dom
    last = blocks(dom)[-1][1]
    assert last.startswith("tool &lt;b&gt;timesthe policy has not read ita&lt;/script&gt;")
