"""Which public chat templates can be continued after the policy's turn?

python benchmarks/episode_templates.py FOLDER

FOLDER: .jinja files, such as those in the wheel of trl. Each is tried as before a run, with a byte-level
tokenizer that knows the markers it writes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from record import heading, save, table
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dapo.config import ConfigError
from dapo.episodes.chat import Chat

# tokens that end a turn in these templates; <EOS> is what they call eos_token
STOPS = (
    "<|im_end|>", "<｜end▁of▁sentence｜>", "<|eot_id|>", "<|eom_id|>", "<|return|>", "<|call|>", "<|end|>",
    "<turn|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>", "<|user|>", "<|observation|>", "</s>",
    "<end_of_utterance>", "<EOS>",
)  # fmt: skip
MARKER = re.compile(
    r"<\|[^|>]{1,40}\|>|<｜[^｜>]{1,40}｜>|<[a-z_]+_of_[a-z]+>|</?(?:think|tool_call|tool_response|s)>|<turn\|>"
    r"|<\|turn>|\[/?INST\]|\[gMASK\]|<sop>"
)
PARAMETERS = {
    "type": "object",
    "properties": {"x": {"type": "string", "description": "x"}},
    "required": ["x"],
}
TOOL = {
    "type": "function",
    "function": {"name": "calc", "description": "Evaluate.", "parameters": PARAMETERS},
}


def chat_of(template: str) -> Chat:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    markers = sorted({*MARKER.findall(template), "<BOS>", "<EOS>"})
    tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
    stops = tuple(id for stop in STOPS if (id := tokenizer.token_to_id(stop)) is not None)
    special = {"bos_token": "<BOS>", "eos_token": "<EOS>", "pad_token": "<EOS>", "unk_token": "<EOS>"}
    return Chat(template, tokenizer.to_str(), special, {}, stops)


def refusal(template: str, has_tools: bool) -> str:
    """Return why a template is refused; nothing if it is not."""
    try:
        chat_of(template).check([TOOL] if has_tools else [])
    except ConfigError as error:
        return str(error).partition(" message: ")[2].partition("; use another")[0] or str(error)
    return ""


def main() -> None:
    paths = sorted(Path(sys.argv[1]).rglob("*.jinja"), key=lambda path: path.stem)
    found = [
        (path.stem, *(refusal(path.read_text(), has_tools) for has_tools in (False, True))) for path in paths
    ]
    by_user, by_tool = (sum(not row[i] for row in found) for i in (1, 2))
    sys.argv[1:] = ["FOLDER"]
    refused = [
        [name, user or "–", tool.replace("|", "\\|") or "–"] for name, user, tool in found if user or tool
    ]
    text = f"""{heading("Which public chat templates can be continued?")}
The chat templates in the wheel of trl 1.16.0, copies of models' own and variants of them: of {len(found)}
templates {by_user} can be continued with a user's message, and {by_tool} with a tool's answer. The
others are refused before a run starts:

{table(["template", "a user's message", "a tool's answer"], refused)}"""
    save("episode_templates.md", text)


if __name__ == "__main__":
    main()
