"""The prompt stream: the distinct prompts of the data files in a seeded, endless, resumable order."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dapo import config
from dapo.config import ConfigError
from dapo.rollout.data_files import Row, Summary, distinct_rows, row_reader
from dapo.rollout.ground_truth import GroundTruths
from dapo.rollout.render import NONE, ONE_TURN, Renderer, Turns
from dapo.rollout.rows import BadRow, key_of, prompt_and_answer
from dapo.types import Prompt, RewardError, reason

DEFAULT_REWARD = config.Reward()


class RowTable:
    """The origin of prompts: finds the rows of the data files that they were made of, and reads them again.

    Args:
        files: path and row positions (int64, one a prompt) of each file, in the order of the prompts.
        text_of: returns the text of token ids [p].
    """

    def __init__(self, files: Sequence[tuple[Path, np.ndarray]], text_of: Callable[[np.ndarray], str]):
        self.files, self.text_of = files, text_of
        self.ends = np.cumsum([len(positions) for _, positions in files])
        self._readers: dict[int, Callable[[int], dict[str, Any]]] = {}  # of the files that were asked for

    def read(self, prompt: Prompt, names: Collection[str]) -> dict[str, Any]:
        """Return what a reward function or an environment asks for, by name. Raise RewardError if a row is
        lost.
        """
        found: dict[str, Any] = {"prompt": self.text_of(prompt.tokens)} if "prompt" in names else {}
        if {"row", "messages", "task"} & set(names):
            try:
                row = self[prompt.index]
                if "task" in names:
                    return {"task": row}
                content, _ = prompt_and_answer(row, f"prompt {prompt.index}")
            except (OSError, ValueError, LookupError) as error:
                path = self.files[self._file_of(prompt.index)][0]
                failed = f"data file {path} cannot be read again: {reason(error)}"
                raise RewardError(f"{failed}; the run asks for its rows: restore it") from error
            found["messages"] = None if isinstance(content, str) else content
            known = {"prompt"} if "reward_model" in row else {"prompt", "answer"}
            found["row"] = {name: row[name] for name in row if name not in known}
        return found

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return all columns of prompt `index`'s first row, as they stand in the file."""
        file = self._file_of(index)
        path, positions = self.files[file]
        if file not in self._readers:
            self._readers[file] = row_reader(path, positions)
        return self._readers[file](index - int(self.ends[file]) + len(positions))

    def _file_of(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))


@dataclass(frozen=True, slots=True)
class Visit:
    """A prompt as it comes by in the stream."""

    index: int
    epoch: int  # of its source
    number: int  # of the visit, counted over the run: the id of the group that is asked for


class PromptStream:
    """Prompts in a new seeded order each epoch. Prompts taken but not used are put back, and taken first.

    Args:
        prompts: all of them; `prompts[i].index == i`.
        sources: (number of prompts, weight) of consecutive parts of `prompts`, mixed in proportion to their
            weights, each in its own epochs. None: one part.
        data: a hash of what the prompts were made of; by default, of the prompts.
        dates: as Renderer's, that were written into the prompts.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        seed: int,
        sources: Sequence[tuple[int, float]] | None = None,
        data: str = "",
        dates: Mapping[str, str] = NONE,
    ):
        self.prompts, self.data, self.dates = prompts, data or digest(prompts), dates
        self.returned: deque[Visit] = deque()
        self.sources: list[_Source] = []
        start = 0
        for i, (size, weight) in enumerate(sources or [(len(prompts), 1.0)]):
            self.sources.append(_Source(start, size, weight, (seed, i)))
            start += size

    def take(self, count: int) -> list[Visit]:
        """Return the next `count` visits of prompts. An epoch follows the other without a gap."""
        return [self.returned.popleft() if self.returned else self._next() for _ in range(count)]

    @property
    def num_drawn(self) -> int:
        """Number of visits that were ever taken."""
        return sum(source.drawn for source in self.sources)

    def put_back(self, visits: Iterable[Visit]) -> None:
        """Return visits to the stream: the next `take` starts with these, in this order."""
        self.returned.extendleft(reversed(list(visits)))

    @property
    def epochs(self) -> np.ndarray:
        """Epoch of each prompt's source: how often all of it was taken and not put back. [prompts]"""
        ends = np.cumsum([source.size for source in self.sources])
        indices = [visit.index for visit in self.returned]
        back = np.bincount(np.searchsorted(ends, indices, side="right"), minlength=len(ends))
        return np.concatenate(
            [
                np.full(source.size, (source.drawn - num_back) // source.size)
                for source, num_back in zip(self.sources, back.tolist(), strict=True)
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and a hash of the data that it is a position in."""
        drawn = [source.drawn for source in self.sources]
        state = {
            "drawn": drawn,
            "returned": [[visit.index, visit.epoch, visit.number] for visit in self.returned],
            "data": self.data,
        }
        return state | ({"dates": dict(self.dates)} if self.dates else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position.

        Raises:
            ConfigError: the data has changed under the run, so positions would mean other prompts.
        """
        # version 0.1.0 kept the hash of the prompts
        is_same = state["data"] == self.data or state["data"] == digest(self.prompts)
        if not is_same or len(state["drawn"]) != len(self.sources):
            raise ConfigError(
                "data.train is not what the checkpoint was made with: use the same files, tokenizer, chat "
                "template and options of data, or a new run.dir"
            )
        for source, drawn in zip(self.sources, state["drawn"], strict=True):
            source.drawn = drawn
        # version 0.1.0 kept no numbers, at first no epochs either
        first = self.num_drawn - len(state["returned"])
        kept = [[v, 0] if isinstance(v, int) else v for v in state["returned"]]
        self.returned = deque(
            Visit(index, epoch, *(number or [first + i])) for i, (index, epoch, *number) in enumerate(kept)
        )

    def _next(self) -> Visit:
        """Draw from the source that is furthest behind its weight."""
        number = self.num_drawn
        weight = sum(source.weight for source in self.sources)
        behind = max(self.sources, key=lambda s: s.weight / weight * (number + 1) - s.drawn)
        return behind.next(number)


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

    def next(self, number: int) -> Visit:
        epoch, position = divmod(self.drawn, self.size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([*self.seed, epoch]).permutation(self.size)
        self.drawn += 1
        return Visit(self.start + int(self._order[position]), epoch, number)


def load_stream(
    data: config.Data,
    tokenizer: Any,
    seed: int,
    reward: config.Reward = DEFAULT_REWARD,
    dates: Mapping[str, str] = NONE,
    turns: Turns = ONE_TURN,
) -> tuple[PromptStream, list[Summary]]:
    """Load the training prompts: of one file, of several as if they were one, or mixed by weights.

    Args:
        reward: its first function has to understand the ground truths.
        dates: of the run that goes on, from its stream's state.
        turns: of a rollout of several.
    """
    truths, renderer = _truths(reward, turns), Renderer(tokenizer, data.template_arguments, dates, turns)
    skip_malformed = data.on_error == "skip"
    if isinstance(data.train, dict):  # each in its own epochs
        files = [file for path in data.train for file in distinct_rows([path], truths, skip_malformed)]
    else:
        paths = [data.train] if isinstance(data.train, Path) else data.train
        files = distinct_rows(paths, truths, skip_malformed)
    kept = [_tokenized(rows, renderer, data, summary) for summary, rows in files]
    for size, (summary, _) in zip(map(len, kept), files, strict=True):
        if not size and (isinstance(data.train, dict) or not any(kept)):
            raise _no_prompts(summary, data)
    sources = None
    if isinstance(data.train, dict):
        sources = [(len(rows), weight) for rows, weight in zip(kept, data.train.values(), strict=True)]
    prompts = _prompts(
        [(summary.path, rows) for (summary, _), rows in zip(files, kept, strict=True)], renderer
    )
    is_cut = any(summary.truncated for summary, _ in files)
    cut = f"{data.max_prompt_length} {data.too_long}" if is_cut else ""
    data_digest = _digest_of_rows([row for rows in kept for row, _ in rows], renderer, cut)
    stream = PromptStream(prompts, seed, sources, data_digest, renderer.dates)
    return stream, [summary for summary, _ in files]


def load_prompts(
    path: Path,
    tokenizer: Any,
    data: config.Data,
    reward: config.Reward = DEFAULT_REWARD,
    dates: Mapping[str, str] = NONE,
    turns: Turns = ONE_TURN,
) -> tuple[list[Prompt], Summary]:
    """Load the distinct prompts of a file, in the order of their first rows. `reward`, `dates` and `turns`:
    see `load_stream`.

    Args:
        path: .jsonl of {prompt, answer} or of the parquet's columns; .parquet with `prompt` and
            `reward_model.ground_truth` (DAPO-Math-17k) or `answer`. A prompt is raw text, or a list of chat
            messages, which the tokenizer's chat template turns into text.

    Raises:
        ConfigError: no such file, a row that cannot be used (with its line, unless data.on_error=skip), an
            unknown format, or no prompts.
    """
    [(summary, rows)] = distinct_rows([path], _truths(reward, turns), data.on_error == "skip")
    renderer = Renderer(tokenizer, data.template_arguments, dates, turns)
    kept = _tokenized(rows, renderer, data, summary)
    if not kept:
        raise _no_prompts(summary, data)
    return _prompts([(path, kept)], renderer), summary


def _truths(reward: config.Reward, turns: Turns) -> GroundTruths:
    return GroundTruths.of_environment(turns.environment) if turns.environment else GroundTruths.of(reward)


def _prompts(files: list[tuple[Path, list[tuple[Row, np.ndarray]]]], renderer: Renderer) -> list[Prompt]:
    """Number the prompts of files, given as rows and tokens, and note where they come from."""
    positions = [(path, np.array([row.position for row, _ in rows], np.int64)) for path, rows in files]
    table, every = RowTable(positions, renderer.text), [row for _, rows in files for row in rows]
    return [Prompt(i, tokens, row.answer, table) for i, (row, tokens) in enumerate(every)]


def digest(prompts: list[Prompt]) -> str:
    """Return a hash of all prompts and answers, in order."""
    state = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        state.update(prompt.tokens.tobytes() + b"\0" + prompt.answer.encode() + b"\1")
    return state.hexdigest()


def _digest_of_rows(rows: list[Row], renderer: Renderer, cut: str) -> str:
    """Return a hash of what decides the prompts: rows in order, the template's text, the tokenizer, and how
    they were cut, if any was.

    The tokens are left out: a template may write the date into them.
    """
    state = hashlib.blake2b(digest_size=16)
    for row in rows:
        state.update(key_of(row.prompt).encode() + b"\0" + row.answer.encode() + b"\1")
    state.update(cut.encode() + b"\0" + renderer.fingerprint(rows))
    return state.hexdigest()


def _no_prompts(summary: Summary, data: config.Data) -> ConfigError:
    lengths = f"data.max_prompt_length={data.max_prompt_length}, data.too_long={data.too_long}"
    return ConfigError(f"{summary.path}: no prompts in it" + (f" ({lengths})" if summary.dropped else ""))


def _tokenized(
    rows: list[Row], renderer: Renderer, data: config.Data, summary: Summary
) -> list[tuple[Row, np.ndarray]]:
    """Return the rows that can be used with their prompts' tokens, int32 [p]; fill the summary."""
    kept = []
    for row in rows:
        try:
            tokens = np.asarray(renderer.tokens(row.prompt, row.place), dtype=np.int32)
        except BadRow as error:
            if data.on_error == "stop":
                raise
            summary.skip(error, 1)
            continue
        if len(tokens) > data.max_prompt_length:
            if data.too_long == "error":
                raise ConfigError(
                    f"{row.place}: prompt of {len(tokens)} tokens, "
                    f"data.max_prompt_length={data.max_prompt_length}: raise it, or set data.too_long=drop"
                )
            if renderer.turns.tools and data.too_long == "truncate":
                raise ConfigError(
                    f"{row.place}: prompt of {len(tokens)} tokens, data.max_prompt_length="
                    f"{data.max_prompt_length}: cut, it would lose its tools: raise it, or set "
                    "data.too_long=drop"
                )
            if data.too_long == "drop":
                summary.dropped += 1
                continue
            tokens = tokens[-data.max_prompt_length :]
            summary.truncated += 1
        kept.append((row, tokens))
    summary.prompts = len(kept)
    return kept
