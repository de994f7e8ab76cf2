"""Prompts → tokens, with Hugging Face's own tokenizers and templates."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers.processors import TemplateProcessing

from dapo.config import ConfigError, Data
from dapo.rollout.data_files import Row
from dapo.rollout.prompts import load_prompts, load_stream
from dapo.rollout.render import Renderer
from tests.dapo.rollout.test_data_files import write

BOS, EOS = "<s>", "</s>"
CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n", "é"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %}"
    "(no){% endif %}{% endif %}"
)
DATED = TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%d %b %Y') }} ")
ASK = {"role": "user", "content": "2+2"}


def make_tokenizer(template: str | None = TEMPLATE, added: str = f"{BOS} $A", **special: str) -> Any:
    """A token a character, <s> and </s>; what it adds to text is `added`."""
    vocabulary = {text: i for i, text in enumerate([BOS, EOS, *CHARACTERS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    made.post_processor = TemplateProcessing(single=added, special_tokens=[(BOS, 0), (EOS, 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = template
    return tokenizer


def render(prompt: Any, tokenizer: Any = None, **arguments: Any) -> str:
    tokenizer = tokenizer or make_tokenizer()
    return str(tokenizer.decode(Renderer(tokenizer, arguments).tokens(prompt, "here")))


@pytest.mark.parametrize("added", ["$A", f"{BOS} $A", f"$A {EOS}", f"{BOS} $A {EOS}"])
def test_text_begins_once_and_does_not_end(added: str) -> None:
    tokenizer, begin = make_tokenizer(added=added), BOS if BOS in added else ""
    assert render("2+2=", tokenizer) == f"{begin}2+2="
    assert render(f"{BOS}[user]2+2[assistant]", tokenizer) == f"{BOS}[user]2+2[assistant]"
    assert render(f"{BOS}2+2={EOS}", tokenizer) == f"{BOS}2+2="
    assert render(f"2{EOS}+2", tokenizer) == f"{begin}2{EOS}+2"


@pytest.mark.parametrize("added", [f"$A {EOS}", f"{BOS} $A", f"{BOS} $A {EOS}"])
@pytest.mark.parametrize("prompt", ["", EOS])
def test_text_of_no_tokens_is_refused(prompt: str, added: str) -> None:
    with pytest.raises(ConfigError, match="here: the prompt is empty"):
        render(prompt, make_tokenizer(added=added))


def test_a_chat_begins_once_and_asks_for_an_answer() -> None:
    assert render([ASK]) == f"{BOS}[user]2+2{EOS}[assistant]"


def test_a_message_that_the_assistant_has_begun_goes_on() -> None:
    begun = {"role": "assistant", "content": "So 2+2 "}
    assert render([ASK, begun]) == f"{BOS}[user]2+2{EOS}[assistant]So 2+2 "


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_message_of_the_assistant_is_the_header_that_is_written_anyway(content: str) -> None:
    empty = {"role": "assistant", "content": content}
    assert render([ASK, empty]) == render([ASK])
    assert render([ASK, ASK, empty]) == render([ASK, ASK])


def test_the_templates_arguments_reach_it(tmp_path: Path) -> None:
    assert render([ASK], enable_thinking=False) == f"{BOS}[user]2+2{EOS}[assistant](no)"
    path = write(tmp_path / "t.jsonl", {"prompt": [ASK], "answer": "4"})
    data = Data(train=path, template_arguments={"enable_thinking": False})
    tokenizer = make_tokenizer()
    [held_out], _ = load_prompts(path, tokenizer, data)
    [trained] = load_stream(data, tokenizer, seed=0)[0].prompts
    for prompt in (held_out, trained):
        assert tokenizer.decode(prompt.tokens).endswith("(no)")


@pytest.mark.parametrize(
    ("arguments", "template", "said"),
    [
        ({"enable_thinkin": False}, TEMPLATE, "enable_thinkin: the model's chat template has no such"),
        ({"enable_thinking": False}, None, "enable_thinking: the model's chat template has no such"),
        ({"add_generation_prompt": False}, TEMPLATE, "add_generation_prompt is set by the run"),
        ({"tokenize": True}, TEMPLATE, "tokenize is set by the run"),
        ({"enable_thinking": "no"}, TEMPLATE, "enable_thinking='no': write true or false"),
        ({"enable_thinking": "off"}, TEMPLATE, "enable_thinking='off': write true or false"),
    ],
)
def test_an_argument_that_the_template_does_not_know_is_refused(
    arguments: dict[str, Any], template: str | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=f"data.template_arguments.{said}"):
        Renderer(make_tokenizer(template), arguments)


def test_a_template_may_compare_its_argument_with_text() -> None:
    template = "{% if thinking == 'off' %}(no){% endif %}"
    assert render([ASK], make_tokenizer(template), thinking="off") == "(no)"


def test_a_template_may_be_one_of_several() -> None:
    template: Any = {"default": TEMPLATE, "tool_use": "{{ messages }}"}
    assert render([ASK], make_tokenizer(template), enable_thinking=False).endswith("[assistant](no)")
    tokenizer = make_tokenizer(template | {"default": DATED})
    chat = Renderer(tokenizer, {}, dates={"%d %b %Y": "09 May 2026"}).tokens([ASK], "here")
    assert "09 May 2026" in tokenizer.decode(chat)


@pytest.mark.parametrize(
    ("template", "chat"),
    [
        ("{{ raise_exception('roles must alternate') }}", [ASK]),
        ("{{ messages[0].content + 1 }}", [ASK]),
        ("{{ messages[0].content.missing.x }}", [ASK]),
        # a template that hides what the assistant has begun
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
         [ASK, {"role": "assistant", "content": "4"}]),
    ],
)  # fmt: skip
def test_a_chat_that_the_template_refuses_is_refused_or_skipped(
    tmp_path: Path, template: str, chat: Sequence[dict[str, Any]]
) -> None:
    path = write(tmp_path / "t.jsonl", {"prompt": "2+2=", "answer": "4"}, {"prompt": chat, "answer": "4"})
    with pytest.raises(
        ConfigError, match=r"t\.jsonl, line 2: the chat template refuses the prompt: "
    ) as error:
        load_prompts(path, make_tokenizer(template), Data(train=path))
    assert "\n" not in str(error.value)
    prompts, summary = load_prompts(path, make_tokenizer(template), Data(train=path, on_error="skip"))
    assert (len(prompts), summary.rows, summary.skipped) == (1, 2, 1)


def test_a_template_that_is_wrong_is_not_the_rows_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"prompt": [ASK], "answer": "4"})
    with pytest.raises(ConfigError, match="the model's chat template is wrong"):
        load_prompts(path, make_tokenizer("{% if %}"), Data(train=path, on_error="skip"))


def at(path: Path, day: int, tokenizer: Any = None, **options: Any) -> Any:
    """The stream of a file as loaded on a day of May."""
    made = tokenizer or make_tokenizer(DATED)
    dates = {"%d %b %Y": f"{day:02} May 2026"}
    return load_stream(Data(train=path, **options), made, seed=0, dates=dates)[0]


def test_a_date_in_the_template_is_the_runs_and_does_not_change_the_datas_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"prompt": [ASK], "answer": "4"})
    first, later = at(path, 9), at(path, 10)
    tokenizer = make_tokenizer(DATED)
    assert [tokenizer.decode(stream.prompts[0].tokens)[3:14] for stream in (first, later)] == [
        "09 May 2026",
        "10 May 2026",
    ]
    assert first.data == later.data
    later.load_state_dict(first.state_dict())
    resumed, _ = load_stream(Data(train=path), tokenizer, seed=0, dates=first.state_dict()["dates"])
    assert resumed.prompts[0].tokens.tolist() == first.prompts[0].tokens.tolist()
    new, _ = load_stream(Data(train=path), tokenizer, seed=0)
    assert tokenizer.decode(new.prompts[0].tokens)[3:14] == datetime.now().strftime("%d %b %Y")


ROWS = [{"prompt": [ASK], "answer": "4"}, {"prompt": "1+1=", "answer": "2"}]


@pytest.mark.parametrize(
    ("rows", "template", "options"),
    [
        ([ROWS[0] | {"answer": "5"}, ROWS[1]], DATED, {}),
        ([ROWS[0], ROWS[1] | {"prompt": "1+1 ="}], DATED, {}),
        (ROWS[::-1], DATED, {}),
        (ROWS, DATED + " ", {}),
        (ROWS, DATED, {"template_arguments": {"enable_thinking": False}}),
        (ROWS, DATED, {"max_prompt_length": 20}),
    ],
)
def test_another_file_template_argument_or_cut_changes_the_datas_hash(
    tmp_path: Path, rows: list[Any], template: str, options: dict[str, Any]
) -> None:
    before = at(write(tmp_path / "t.jsonl", *ROWS), 9)
    after = at(write(tmp_path / "t.jsonl", *rows), 9, make_tokenizer(template), **options)
    with pytest.raises(ConfigError, match="checkpoint"):
        after.load_state_dict(before.state_dict())


def test_a_limit_that_cuts_nothing_does_not_change_the_datas_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", *ROWS)
    before, after = at(path, 9, max_prompt_length=100), at(path, 9, max_prompt_length=200, too_long="drop")
    after.load_state_dict(before.state_dict())
    assert before.data == after.data


def test_another_tokenizer_changes_the_datas_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", *ROWS)
    assert at(path, 9).data != at(path, 9, make_tokenizer(DATED, added="$A")).data


def test_a_tokenizer_that_splits_the_rows_otherwise_changes_the_datas_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"prompt": "é", "answer": "1"})
    other = make_tokenizer(DATED)
    other.add_tokens(["éé"])  # of no text that is in the file, nor printable ASCII
    assert at(path, 9).data == at(path, 9, other).data
    other.add_tokens(["é1"])
    write(path, {"prompt": "é1", "answer": "1"})
    assert at(path, 9).data != at(path, 9, other).data


def test_a_template_does_not_matter_where_every_prompt_is_text(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", ROWS[1])
    assert at(path, 9).data == at(path, 9, make_tokenizer(None)).data


def test_a_checkpoint_of_version_0_1_0_holds_the_hash_of_the_tokens(tmp_path: Path) -> None:
    from dapo.rollout.prompts import digest

    stream = at(write(tmp_path / "t.jsonl", *ROWS), 9)
    old = stream.state_dict() | {"data": digest(stream.prompts)}
    assert old["data"] != stream.data
    stream.load_state_dict(old)


def test_a_chat_template_that_is_no_text_is_refused() -> None:
    tokenizer = SimpleNamespace(chat_template=["{{ messages }}"])
    with pytest.raises(ConfigError, match="the model's chat_template is list; expected text"):
        Renderer(tokenizer, {})


def test_the_order_of_the_template_s_arguments_is_no_other_data() -> None:
    tokenizer, row = make_tokenizer(), Row("here", 0, [ASK], "4", 1)
    first, second = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    prints = [Renderer(tokenizer, {}).fingerprint([row])]
    for arguments in (first, second):
        renderer = Renderer(tokenizer, {})
        renderer.arguments = arguments
        prints.append(renderer.fingerprint([row]))
    assert prints[1] == prints[2] != prints[0]
