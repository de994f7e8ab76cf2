"""The prompt stream: files → prompts → a seeded, endless, resumable order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dapo.config import ConfigError
from dapo.types import Prompt


class PromptStream:
    """Prompts in a fresh seeded order each epoch. What was taken but not used can be put back and is taken first."""

    def __init__(self, prompts: list[Prompt], seed: int):
        self.prompts, self.seed = prompts, seed
        self.epoch, self.position = 0, 0
        self.returned: list[int] = []
        self._order = self._shuffle()

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts; epochs follow one another without a seam."""
        return [self.prompts[self._next()] for _ in range(count)]

    def put_back(self, prompts: Iterable[Prompt]) -> None:
        """`put_back(unused)`: the next `take` starts with these, in this order."""
        self.returned[:0] = [prompt.index for prompt in prompts]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "returned": list(self.returned), "data": digest(self.prompts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError if the data has changed under the run: the positions would mean other prompts."""
        if state["data"] != digest(self.prompts):
            raise ConfigError("data.train is not what the checkpoint was made with: use the same file and tokenizer, or a new run.dir")
        self.epoch, self.position, self.returned = state["epoch"], state["position"], list(state["returned"])
        self._order = self._shuffle()

    def _next(self) -> int:
        if self.returned:
            return self.returned.pop(0)
        if self.position == len(self.prompts):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._shuffle()
        self.position += 1
        return int(self._order[self.position - 1])

    def _shuffle(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.prompts))


def load_prompts(path: Path, tokenizer: Any, max_length: int, too_long: str) -> list[Prompt]:
    """Read a data file whole.

    Args:
        path: .jsonl of {prompt, answer}, or .parquet with `prompt` and `reward_model.ground_truth` (DAPO-Math-17k). A prompt is raw text,
            or a list of chat messages, which the tokenizer's chat template turns into text.
        max_length: tokens of a prompt.
        too_long: what happens to a longer one: "error", "drop", or "truncate" (its last max_length tokens stay).

    Raises:
        ConfigError: no such file, a missing column (with its line), an unknown format, or nothing left.
    """
    prompts: list[Prompt] = []
    for place, prompt, answer in _rows(path):
        tokens = np.asarray(_encode(prompt, tokenizer, place), dtype=np.int32)
        if len(tokens) > max_length:
            if too_long == "error":
                raise ConfigError(
                    f"{place}: prompt of {len(tokens)} tokens, data.max_prompt_length={max_length}: raise it, or set data.too_long=drop"
                )
            if too_long == "drop":
                continue
            tokens = tokens[-max_length:]
        if len(tokens) == 0:
            raise ConfigError(f"{place}: the prompt is empty")
        prompts.append(Prompt(index=len(prompts), tokens=tokens, answer=answer))
    if not prompts:
        raise ConfigError(f"{path}: no prompts in it (data.max_prompt_length={max_length}, data.too_long={too_long})")
    return prompts


def digest(prompts: list[Prompt]) -> str:
    """A hash of all prompts and answers, in order."""
    state = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        state.update(prompt.tokens.tobytes() + b"\0" + prompt.answer.encode() + b"\1")
    return state.hexdigest()


def _rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    """(place for error messages, prompt, answer) of every row."""
    if not path.is_file():
        raise ConfigError(f"data file {path} does not exist")
    if path.suffix == ".jsonl":
        yield from _jsonl_rows(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise ConfigError(f"data file {path}: expected .jsonl or .parquet")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ConfigError(f"{place}: not JSON: {error}") from None
            for column in ("prompt", "answer"):
                if not isinstance(row, dict) or row.get(column) is None:
                    raise ConfigError(f"{place}: no column {column!r}; expected {{prompt, answer}}")
            yield place, row["prompt"], str(row["answer"])


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"data file {path}: not parquet: {error}") from None
    for column in ("prompt", "reward_model"):
        if column not in file.schema_arrow.names:
            raise ConfigError(
                f"{path}: no column {column!r}; expected prompt and reward_model.ground_truth, found {file.schema_arrow.names}"
            )
    number = 0
    for batch in file.iter_batches(columns=["prompt", "reward_model"]):
        for row in batch.to_pylist():
            number += 1
            place = f"{path}, row {number}"
            if not isinstance(row["reward_model"], dict) or row["reward_model"].get("ground_truth") is None:
                raise ConfigError(f"{place}: no column 'reward_model.ground_truth'")
            yield place, row["prompt"], str(row["reward_model"]["ground_truth"])


def _encode(prompt: Any, tokenizer: Any, place: str) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if isinstance(prompt, list) and prompt and all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in prompt):
        if tokenizer.chat_template is None:
            raise ConfigError(f"{place}: the prompt is a chat and the model's tokenizer has no chat template: give the prompt as text")
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    raise ConfigError(f"{place}: column 'prompt' is {type(prompt).__name__}; expected text or a list of {{role, content}}")
