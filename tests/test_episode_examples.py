"""The calculator as a tool, the game as an environment, and the base policies of both."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from transformers.utils import get_json_schema

from dapo import config
from dapo.episodes import Reply
from dapo.episodes.assemble import make_setup, turns_of
from dapo.episodes.calls import read_hermes
from dapo.episodes.tools import ToolBox
from dapo.episodes.user_code import Raised
from dapo.model.tokenizer import check_vocabulary, decoder_json, load_tokenizer, stop_ids
from examples.calculator import task as sums
from examples.calculator.calculator import calculator
from examples.game import task as games
from examples.game.game import GUESSES, GuessNumber
from examples.tiny_chat import Messages, School, make_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = {"calculator": sums.WORDS, "game": games.WORDS}
TOOLS: dict[str, Any] = {"calculator": [get_json_schema(calculator)], "game": None}
FLAWS = sums.Flaws(guess=0.3, slip=0.3, equals=0.3)


def school_of(example: str) -> School:
    return School(load_tokenizer(EXAMPLES / example / "base"), TOOLS[example])


def episodes_of(example: str, count: int = 20) -> list[Messages]:
    """Flawed demonstrations, each from its own seed."""
    if example == "calculator":
        rngs = [random.Random(i) for i in range(count)]
        return [sums.demonstrate(sums.make_problem(rng), rng, FLAWS) for rng in rngs]
    rngs = [random.Random(i) for i in range(count)]
    return [games.demonstrate(games.make_row(rng), rng, games.Flaws(0.3, 0.3, 0.2)) for rng in rngs]


def rows_of(example: str, name: str) -> list[dict[str, Any]]:
    lines = (EXAMPLES / example / "data" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# --- the calculator ---


@pytest.mark.parametrize(
    ("expression", "value"),
    [("47*83-12", "3889"), ("2+3*4", "14"), ("(2+3)*4", "20"), (" 7 - 9 ", "-2"), ("-3*-3", "9"), ("5", "5")],
)
def test_the_calculator_is_exact(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "47*", "47*83=", "2**9", "7/2", "7//2", "1.5+1", "True+1", "'a'*3", "a+1", "f(1)", "[1]", "1,2",
     "1;2", "__import__('os')", "99999999*99999999", "(" * 90, "1+" * 60 + "1", "\0"],
)  # fmt: skip
def test_the_calculator_refuses_what_is_no_small_sum(expression: str) -> None:
    with pytest.raises(ValueError):
        calculator(expression)


def test_the_calculators_problems_have_their_answers_and_are_all_different() -> None:
    train, heldout = (rows_of("calculator", name) for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (2000, 200)
    contents = [row["prompt"][0]["content"] for row in train + heldout]
    assert len(set(contents)) == 2200
    for row, content in zip(train + heldout, contents, strict=True):
        assert row["answer"] == str(eval(content.removesuffix("=")))  # another way to compute it


# --- the game ---


def play(row: dict[str, int], player: list[str]) -> list[str]:
    """The game's answers to a player's turns; at the end "won" or "lost"."""
    game = GuessNumber()
    game.reset(row, seed=0)
    answers = []
    for text in player:
        turn = game.step(Reply(text))
        if turn.is_done:
            assert turn.reward == (1.0 if turn.is_correct else -1.0) and not turn.messages
            return [*answers, "won" if turn.is_correct else "lost"]
        answers += [message["content"] for message in turn.messages]
    return answers


def test_the_game_answers_each_guess() -> None:
    row = {"highest": 20, "secret": 7}
    assert GuessNumber().reset(row, seed=3)[0]["content"] == "Guess my number from 1 to 20."
    assert play(row, ["10", "5", "7"]) == ["lower", "higher", "won"]
    assert play(row, ["21", "0", "seven", "-7", "7"]) == ["no", "no", "no", "no", "won"]
    assert play(row, ["10", "5", "8", "6", "9"]) == ["lower", "higher", "lower", "higher", "lost"]
    assert play(row, ["", "7" * 5000, "7\n", "²", "7"]) == ["no", "no", "no", "no", "won"]


def test_who_halves_what_is_left_always_wins() -> None:
    for row in rows_of("game", "train") + rows_of("game", "heldout"):
        episode = games.demonstrate(row, random.Random(row["secret"]), games.Flaws())
        turns = [message["content"] for message in episode if message["role"] == "assistant"]
        assert play(row, turns)[-1] == "won" and len(turns) <= GUESSES


def test_the_games_are_all_there_and_all_different() -> None:
    train, heldout = (rows_of("game", name) for name in ("train", "heldout"))
    assert len(heldout) == 80
    found = {(row["highest"], row["secret"]) for row in train + heldout}
    assert found == {(n, k) for n in range(games.LEAST, games.MOST + 1) for k in range(1, n + 1)}
    assert len(train + heldout) == len(found)


# --- the base policies ---


@pytest.mark.parametrize("example", WORDS)
def test_a_base_has_its_makers_tokenizer_in_every_class(example: str, tmp_path: Path) -> None:
    """AutoTokenizer rebuilds a Qwen2Tokenizer whatever the files say."""
    base = EXAMPLES / example / "base"
    auto, made = load_tokenizer(base), make_tokenizer(WORDS[example])
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(base)
    bare = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    chats = [auto.apply_chat_template(e, tools=TOOLS[example], tokenize=False) for e in episodes_of(example)]
    for text in [*chats, " 12  3\n\n4\r\n", "don't é→", "".join(map(chr, range(32, 127)))]:
        ids = auto(text, add_special_tokens=False)["input_ids"]
        assert ids == fast(text, add_special_tokens=False)["input_ids"]
        assert ids == made(text, add_special_tokens=False)["input_ids"]
        assert ids == bare.encode(text, add_special_tokens=False).ids
        assert auto.decode(ids) == fast.decode(ids) == bare.decode(ids, skip_special_tokens=False) == text
    assert auto.chat_template == fast.chat_template == made.chat_template
    assert decoder_json(auto)  # workers decode
    check_vocabulary(base, auto)
    assert stop_ids(base, auto) == (auto.convert_tokens_to_ids("<|im_end|>"),)
    tags = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    assert not set(tags) & set(auto.all_special_tokens) and all(len(auto.tokenize(tag)) == 1 for tag in tags)


@pytest.mark.parametrize("example", WORDS)
def test_demonstrations_have_the_tokens_of_episodes(example: str) -> None:
    """An episode's prompt, then the turns as the policy writes them, then what the chat adds between."""
    school, tools = school_of(example), TOOLS[example] or []
    loaded = config.load(EXAMPLES / example / "config.yaml")
    chat = make_setup(loaded, school.tokenizer, turns_of(loaded)).chat
    for episode in episodes_of(example):
        expected = chat.start(episode[:1], tools)
        is_written = [False] * len(expected)
        for i in range(1, len(episode), 2):
            following = episode[i + 1 : i + 2]
            turn = school.tokenizer(episode[i]["content"], add_special_tokens=False)["input_ids"]
            turn.append(school.tokenizer.eos_token_id)
            between = chat.after(turn[-1], following, tools, room=1000).tokens if following else []
            assert between is not None
            expected += turn + between
            is_written += [True] * len(turn) + [False] * len(between)
        assert school.tokens(episode) == (expected, is_written)


def test_demonstrations_have_the_answers_of_episodes() -> None:
    """Results and errors, which the policy reads."""

    async def call(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except ValueError as error:
            raise Raised(error) from error

    toolbox = ToolBox({"calculator": calculator})
    answers = []
    for episode in episodes_of("calculator", 40):
        for message, following in zip(episode[1::2], episode[2::2], strict=False):
            reply = Reply(message["content"], read_hermes(message["content"], TOOLS["calculator"]))
            turn, _ = asyncio.run(toolbox.step(reply, call))
            assert turn.messages == [following]
            answers.append(following["content"])
        last = Reply(episode[-1]["content"], read_hermes(episode[-1]["content"], TOOLS["calculator"]))
        assert asyncio.run(toolbox.step(last, call))[0].is_done
    assert any(answer.startswith("Error: ") for answer in answers) and len(answers) > 20


def test_the_template_writes_tool_calls_as_qwen2_5_does() -> None:
    tokenizer = load_tokenizer(EXAMPLES / "calculator/base")
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2*3"}}}
    chat = [
        {"role": "user", "content": "2*3="},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": "6"},
        {"role": "tool", "name": "calculator", "content": "7"},
    ]
    said = tokenizer.apply_chat_template(
        chat, tools=TOOLS["calculator"], tokenize=False, add_generation_prompt=True
    )
    assert said == (
        "<|im_start|>system\nTools: calculator<|im_end|>\n<|im_start|>user\n2*3=<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "calculator", "arguments": {"expression": "2*3"}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n6\n</tool_response>\n<tool_response>\n7\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@torch.inference_mode()
def greedy(example: str, text: str) -> str:
    """What the base policy writes after a text, up to the end of its turn."""
    base = EXAMPLES / example / "base"
    tokenizer, model = load_tokenizer(base), transformers.AutoModelForCausalLM.from_pretrained(base)
    fed = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(fed, max_new_tokens=40, do_sample=False)
    return str(tokenizer.decode(out[0, fed.shape[1] :]))


def test_the_calculators_base_copies_problem_and_result_once_it_calls() -> None:
    school = school_of("calculator")
    problems = [sums.make_problem(random.Random(seed)) for seed in range(20)]
    num_right = 0
    for problem in problems:
        call, result, answer = sums.demonstrate(problem, random.Random(0), sums.Flaws())[1:]
        prompt = school.tokenizer.apply_chat_template(
            problem.prompt, tools=school.tools, tokenize=False, add_generation_prompt=True
        )
        written = greedy("calculator", f"{prompt}<tool_call>")
        then = school.tokenizer.apply_chat_template(
            [*problem.prompt, call, result], tools=school.tools, tokenize=False, add_generation_prompt=True
        )
        is_called = f"<tool_call>{written}" == call["content"] + "<|im_end|>"
        num_right += is_called and greedy("calculator", then) == answer["content"] + "<|im_end|>"
    assert num_right >= 18


def test_the_games_base_makes_legal_moves_when_it_does_not_sample() -> None:
    tokenizer = load_tokenizer(EXAMPLES / "game/base")
    for highest in range(games.LEAST, games.MOST + 1):
        chat = GuessNumber().reset({"highest": highest, "secret": 1}, seed=0)
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert 1 <= int(greedy("game", prompt).removesuffix("<|im_end|>")) <= highest
