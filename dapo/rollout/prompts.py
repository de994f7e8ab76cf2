"""The prompt stream: the distinct prompts of the data files in a seeded, endless, resumable order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dapo import config
from dapo.config import ConfigError
from dapo.rollout.data_files import Row, Summary, distinct_rows, read_row
from dapo.types import Prompt


class RowTable:
    """Finds the row of the data files that a prompt was made of. A row is read when it is asked for, never
    held.

    Args:
        files: path and row positions (int64, one a prompt) of each file, in the order of the prompts.
    """

    def __init__(self, files: Sequence[tuple[Path, np.ndarray]] = ()):
        self.paths = [path for path, _ in files]
        self.ends = np.cumsum([len(positions) for _, positions in files])
        self.positions = np.concatenate([np.empty(0, np.int64), *(positions for _, positions in files)])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return all columns of prompt `index`'s first row, as they stand in the file."""
        file = int(np.searchsorted(self.ends, index, side="right"))
        return read_row(self.paths[file], int(self.positions[index]))


class PromptStream:
    """Prompts in a new seeded order each epoch. Prompts taken but not used are put back, and taken first.

    Args:
        prompts: all of them; `prompts[i].index == i`.
        sources: (number of prompts, weight) of consecutive parts of `prompts`, mixed in proportion to their
            weights, each in its own epochs. None: one part.
        rows: `rows[i]` is the row that prompts[i] was made of.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        seed: int,
        sources: Sequence[tuple[int, float]] | None = None,
        rows: RowTable | None = None,
    ):
        self.prompts, self.rows = prompts, rows or RowTable()
        self.returned: list[int] = []
        self.sources: list[_Source] = []
        start = 0
        for i, (size, weight) in enumerate(sources or [(len(prompts), 1.0)]):
            self.sources.append(_Source(start, size, weight, (seed, i)))
            start += size

    def take(self, count: int) -> list[Prompt]:
        """Return the next `count` prompts. An epoch follows the other without a gap."""
        return [self.prompts[self.returned.pop(0) if self.returned else self._next()] for _ in range(count)]

    def put_back(self, prompts: Iterable[Prompt]) -> None:
        """Return prompts to the stream: the next `take` starts with these, in this order."""
        self.returned[:0] = [prompt.index for prompt in prompts]

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and a hash of the data that it is a position in."""
        drawn = [source.drawn for source in self.sources]
        return {"drawn": drawn, "returned": list(self.returned), "data": digest(self.prompts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position.

        Raises:
            ConfigError: the data has changed under the run, so positions would mean other prompts.
        """
        if state["data"] != digest(self.prompts) or len(state["drawn"]) != len(self.sources):
            raise ConfigError(
                "data.train is not what the checkpoint was made with: use the same files and tokenizer, or a "
                "new run.dir"
            )
        self.returned = list(state["returned"])
        for source, drawn in zip(self.sources, state["drawn"], strict=True):
            source.drawn = drawn

    def _next(self) -> int:
        """Draw from the source that is furthest behind its weight."""
        total = sum(source.drawn for source in self.sources) + 1
        weight = sum(source.weight for source in self.sources)
        return max(self.sources, key=lambda s: s.weight / weight * total - s.drawn).next()


@dataclass
class _Source:
    """Prompts start … start + size, in one permutation an epoch."""

    start: int
    size: int
    weight: float
    seed: tuple[int, int]
    drawn: int = 0  # prompts, over all epochs
    _epoch: int = -1
    _order: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def next(self) -> int:
        epoch, position = divmod(self.drawn, self.size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([*self.seed, epoch]).permutation(self.size)
        self.drawn += 1
        return self.start + int(self._order[position])


def load_stream(data: config.Data, tokenizer: Any, seed: int) -> tuple[PromptStream, list[Summary]]:
    """Load the training prompts: of one file, of several as if they were one, or mixed by weights."""
    paths = [data.train] if isinstance(data.train, Path) else list(data.train)
    prompts, files, summaries = list[Prompt](), list[tuple[Path, np.ndarray]](), list[Summary]()
    for path in paths:
        summary = Summary(path)
        rows = _tokenized(path, tokenizer, data, summary)
        prompts += (Prompt(i, tokens, row.answer) for i, (row, tokens) in enumerate(rows, start=len(prompts)))
        files.append((path, np.array([row.position for row, _ in rows], np.int64)))
        summaries.append(summary)
    sources = None
    if isinstance(data.train, dict):
        sources = [(len(positions), data.train[path]) for path, positions in files]
    return PromptStream(prompts, seed, sources, RowTable(files)), summaries


def load_prompts(path: Path, tokenizer: Any, data: config.Data) -> tuple[list[Prompt], Summary]:
    """Load the distinct prompts of a file, in the order of their first rows.

    Args:
        path: .jsonl of {prompt, answer} or of the parquet's columns; .parquet with `prompt` and
            `reward_model.ground_truth` (DAPO-Math-17k) or `answer`. A prompt is raw text, or a list of chat
            messages, which the tokenizer's chat template turns into text.

    Raises:
        ConfigError: no such file, a malformed row (with its line, unless data.on_error=skip), an unknown
            format, or no prompts.
    """
    summary = Summary(path)
    rows = _tokenized(path, tokenizer, data, summary)
    return [Prompt(i, tokens, row.answer) for i, (row, tokens) in enumerate(rows)], summary


def digest(prompts: list[Prompt]) -> str:
    """Return a hash of all prompts and answers, in order."""
    state = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        state.update(prompt.tokens.tobytes() + b"\0" + prompt.answer.encode() + b"\1")
    return state.hexdigest()


def _tokenized(
    path: Path, tokenizer: Any, data: config.Data, summary: Summary
) -> list[tuple[Row, np.ndarray]]:
    """Return a file's distinct rows with their prompts' tokens, int32 [p]; fill the summary."""
    kept = []
    for row in distinct_rows(path, summary, data.on_error == "skip"):
        tokens = np.asarray(_encode(row, tokenizer), dtype=np.int32)
        if len(tokens) > data.max_prompt_length:
            if data.too_long == "error":
                raise ConfigError(
                    f"{row.place}: prompt of {len(tokens)} tokens, "
                    f"data.max_prompt_length={data.max_prompt_length}: raise it, or set data.too_long=drop"
                )
            if data.too_long == "drop":
                summary.dropped += 1
                continue
            tokens = tokens[-data.max_prompt_length :]
            summary.truncated += 1
        if len(tokens) == 0:
            raise ConfigError(f"{row.place}: the prompt is empty")
        kept.append((row, tokens))
    summary.prompts = len(kept)
    if not kept:
        lengths = f"data.max_prompt_length={data.max_prompt_length}, data.too_long={data.too_long}"
        raise ConfigError(f"{path}: no prompts in it ({lengths})")
    return kept


def _encode(row: Row, tokenizer: Any) -> list[int]:
    if isinstance(row.prompt, str):
        return list(tokenizer(row.prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{row.place}: the prompt is a chat and the model's tokenizer has no chat template: give the "
            "prompt as text"
        )
    text = tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
