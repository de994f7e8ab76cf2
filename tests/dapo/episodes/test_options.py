"""Options of several turns that contradict others, and prompts that do not fit, are refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dapo.config import ConfigError, Data
from dapo.model.tokenizer import load_tokenizer
from dapo.rollout.prompts import load_stream
from dapo.rollout.render import Turns
from tests.conftest import make_config

BASE = Path(__file__).parents[3] / "examples/calculator/base"
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "Do.", "parameters": {"type": "object", "properties": {}}},
}


@pytest.mark.parametrize(
    "option",
    [
        "rollout.tools=[mine:f]",
        "reward.function=mine:f",
        "reward.function={dapo.reward:is_correct: 0.5}",
        "reward.shadow=[mine:f]",
        "reward.answer_format=boxed",
    ],
)
def test_what_an_environment_has_no_use_for_is_refused(tmp_path: Path, option: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(
        ConfigError, match=rf"^{re.escape(name)}=.* with rollout.environment=mine:Game.*leave"
    ) as error:
        make_config(tmp_path, "rollout.environment=mine:Game", option)
    assert "\n" not in str(error.value)
    make_config(tmp_path, option)


def write(path: Path, *prompts: object) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts))
    return path


def test_with_tools_a_prompt_is_never_cut(tmp_path: Path) -> None:
    data = Data(train=write(tmp_path / "d.jsonl", [{"role": "user", "content": "1+1="}]), max_prompt_length=5)
    with pytest.raises(
        ConfigError, match=r"d.jsonl, line 1: .*max_prompt_length=5: cut, it would lose its tools"
    ):
        load_stream(data, load_tokenizer(BASE), 0, turns=Turns(tools=[TOOL]))
    load_stream(data, load_tokenizer(BASE), 0)


def test_with_tools_a_prompt_has_to_be_a_chat(tmp_path: Path) -> None:
    data = Data(train=write(tmp_path / "d.jsonl", "1+1="))
    with pytest.raises(ConfigError, match=r"d.jsonl, line 1: the prompt is text; with rollout.tools"):
        load_stream(data, load_tokenizer(BASE), 0, turns=Turns(tools=[TOOL]))


def test_an_environments_rows_need_neither_prompt_nor_answer(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"highest": 3}\n{"highest": 4}\n{"highest": 3}\n')
    stream, [summary] = load_stream(
        Data(train=path), load_tokenizer(BASE), 0, turns=Turns(environment="mine:Game")
    )
    assert [len(prompt.tokens) for prompt in stream.prompts] == [0, 0] and summary.copies == 1
    row = stream.prompts[1].origin
    assert row and row.read(stream.prompts[1], {"task"}) == {"task": {"highest": 4}}
    path.write_text("[1]\n")
    with pytest.raises(ConfigError, match="line 1: list; expected an object"):
        load_stream(Data(train=path), load_tokenizer(BASE), 0, turns=Turns(environment="mine:Game"))
