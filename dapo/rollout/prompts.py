"""The prompt stream: files → rows → unique prompts → a seeded, endless, resumable order.

A public training file repeats its 17 thousand prompts a hundred times over, a few of them with conflicting
answers: copies are counted and left out, conflicts are dropped and listed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dapo import config
from dapo.config import ConfigError
from dapo.types import Prompt

ROLES = {"system", "developer", "user", "assistant", "tool"}
ARROW_ROWS = 65_536  # parquet rows held at a time


class PromptStream:
    """Prompts in a fresh seeded order each epoch. What was taken but not used can be put back and is taken
    first.

    Args:
        prompts: all of them; `prompts[i].index == i`.
        sources: (number of prompts, weight) of consecutive parts of `prompts`, to be mixed in the proportion
            of their weights, each in its own epochs. None: one part.
    """

    def __init__(self, prompts: list[Prompt], seed: int, sources: Sequence[tuple[int, float]] | None = None):
        self.prompts, self.returned = prompts, list[int]()
        starts = np.cumsum([0, *(size for size, _ in sources or ())])
        parts = sources or [(len(prompts), 1.0)]
        self.sources = [
            _Source(int(start), size, weight, (seed, i))
            for i, (start, (size, weight)) in enumerate(zip(starts, parts, strict=False))
        ]

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts; epochs follow one another without a seam."""
        return [self.prompts[self.returned.pop(0) if self.returned else self._next()] for _ in range(count)]

    def put_back(self, prompts: Iterable[Prompt]) -> None:
        """`put_back(unused)`: the next `take` starts with these, in this order."""
        self.returned[:0] = [prompt.index for prompt in prompts]

    def state_dict(self) -> dict[str, Any]:
        return {
            "drawn": [source.drawn for source in self.sources],
            "returned": list(self.returned),
            "data": digest(self.prompts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError if the data has changed under the run: the positions would mean other
        prompts.
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
        """From the source that is furthest behind its share."""
        total, weight = sum(s.drawn for s in self.sources) + 1, sum(s.weight for s in self.sources)
        return max(self.sources, key=lambda s: s.weight / weight * total - s.drawn).next()


@dataclass
class _Source:
    """Prompts start … start + size, one permutation an epoch; `drawn` of them so far."""

    start: int
    size: int
    weight: float
    seed: tuple[int, int]
    drawn: int = 0
    _epoch: int = -1
    _order: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def next(self) -> int:
        epoch, position = divmod(self.drawn, self.size)
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                np.random.default_rng([*self.seed, epoch]).permutation(self.size),
            )
        self.drawn += 1
        return self.start + int(self._order[position])


@dataclass
class Summary:
    """What became of a file's rows; every row is in exactly one of prompts, copies, conflicting, skipped,
    dropped.
    """

    path: Path
    rows: int = 0
    prompts: int = 0
    copies: int = 0  # repeated rows, beyond the first of each
    skipped: int = 0  # malformed, with data.on_error=skip
    conflicting: int = 0  # rows of prompts whose copies disagree on the answer
    dropped: int = 0  # too long
    truncated: int = 0  # too long, and kept
    conflicts: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {
            "copies": self.copies,
            "malformed": self.skipped,
            "too long": self.dropped,
            "with conflicting answers": self.conflicting,
        }
        left_out = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        cut = f"; {self.truncated:,} cut on the left" if self.truncated else ""
        return (
            f"{self.path}: {self.rows:,} rows, {self.prompts:,} prompts"
            + (f"; left out: {left_out}" if left_out else "")
            + cut
        )


@dataclass
class _Row:
    """One row, or several that are the same. `place` is for error messages."""

    place: str
    prompt: str | list[dict[str, str]]
    answer: str
    count: int = 1


def load_stream(options: config.Data, tokenizer: Any, seed: int) -> tuple[PromptStream, list[Summary]]:
    """The training prompts: of one file, of several as if they were one, or mixed by weights."""
    train = options.train
    paths = [train] if isinstance(train, Path) else list(train)
    loaded = [load_prompts(path, tokenizer, options) for path in paths]
    prompts = [
        Prompt(i, prompt.tokens, prompt.answer)
        for i, prompt in enumerate(p for some, _ in loaded for p in some)
    ]
    sources = (
        [(len(some), train[path]) for path, (some, _) in zip(paths, loaded, strict=True)]
        if isinstance(train, dict)
        else None
    )
    return PromptStream(prompts, seed, sources), [summary for _, summary in loaded]


def load_prompts(path: Path, tokenizer: Any, options: config.Data) -> tuple[list[Prompt], Summary]:
    """The distinct prompts of a file, in the order of their first rows.

    Args:
        path: .jsonl of {prompt, answer} or of the parquet's columns; .parquet with `prompt` and
            `reward_model.ground_truth` (DAPO-Math-17k) or `answer`. A prompt is raw text, or a list of chat
            messages, which the tokenizer's chat template makes text.

    Raises:
        ConfigError: no such file, a malformed row (with its line, unless data.on_error=skip), an unknown
            format, or nothing left.
    """
    summary, prompts = Summary(path), list[Prompt]()
    for row in distinct_rows(path, summary, options.on_error == "skip"):
        tokens = np.asarray(_encode(row, tokenizer), dtype=np.int32)
        if len(tokens) > options.max_prompt_length:
            if options.too_long == "error":
                raise ConfigError(
                    f"{row.place}: prompt of {len(tokens)} tokens, "
                    f"data.max_prompt_length={options.max_prompt_length}: "
                    "raise it, or set data.too_long=drop"
                )
            if options.too_long == "drop":
                summary.dropped += 1
                continue
            tokens = tokens[-options.max_prompt_length :]
            summary.truncated += 1
        if len(tokens) == 0:
            raise ConfigError(f"{row.place}: the prompt is empty")
        prompts.append(Prompt(index=len(prompts), tokens=tokens, answer=row.answer))
    summary.prompts = len(prompts)
    if not prompts:
        raise ConfigError(
            f"{path}: no prompts in it (data.max_prompt_length={options.max_prompt_length}, "
            f"data.too_long={options.too_long})"
        )
    return prompts, summary


def digest(prompts: list[Prompt]) -> str:
    """A hash of all prompts and answers, in order."""
    state = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        state.update(prompt.tokens.tobytes() + b"\0" + prompt.answer.encode() + b"\1")
    return state.hexdigest()


def distinct_rows(path: Path, summary: Summary, skip_malformed: bool) -> list[_Row]:
    """The first row of each prompt of a file, without those whose copies disagree on the answer; the summary
    counts them all.
    """
    first: dict[str, _Row] = {}
    answers: dict[str, dict[str, int]] = {}
    for row in _rows(path, summary, skip_malformed):
        summary.rows += row.count
        key = row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt, sort_keys=True)
        first.setdefault(key, row)
        counts = answers.setdefault(key, {})
        counts[row.answer] = counts.get(row.answer, 0) + row.count
    for key, counts in answers.items():
        if len(counts) > 1:
            summary.conflicting += sum(counts.values())
            summary.conflicts.append(
                {"place": first[key].place, "prompt": first[key].prompt, "answers": counts}
            )
            del first[key]
        else:
            summary.copies += sum(counts.values()) - 1
    return list(first.values())


def _rows(path: Path, summary: Summary, skip: bool) -> Iterator[_Row]:
    if not path.is_file():
        raise ConfigError(f"data file {path} does not exist")
    if path.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"data file {path}: expected .jsonl or .parquet")
    for place, count, parse in _jsonl(path) if path.suffix == ".jsonl" else _parquet(path):
        try:
            prompt, answer = _prompt_and_answer(parse() if callable(parse) else parse, place)
        except ConfigError:
            if not skip:
                raise
            summary.rows += count
            summary.skipped += count
            continue
        yield _Row(place, prompt, answer, count)


def _jsonl(path: Path) -> Iterator[tuple[str, int, Any]]:
    """(place, 1, how to parse the line)."""

    def parse(line: bytes, place: str) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise ConfigError(f"{place}: not JSON: {error}") from None

    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, 1, lambda line=line, place=place: parse(line, place)


def _parquet(path: Path) -> Iterator[tuple[str, int, Any]]:
    """(place of the first, number of equal rows, row). Equal rows of a batch become one in Arrow, before they
    become Python objects.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"data file {path}: not parquet: {error}") from None
    names = file.schema_arrow.names
    columns = ["prompt", "reward_model" if "reward_model" in names else "answer"]
    for column in columns:
        if column not in names:
            raise ConfigError(
                f"{path}: no column {column!r}; expected prompt and reward_model.ground_truth (or answer), "
                f"found {names}"
            )
    before = 0
    for batch in file.iter_batches(batch_size=ARROW_ROWS, columns=columns):
        for first, count, row in _fold(pa.Table.from_batches([batch])):
            yield f"{path}, row {before + first + 1}", count, row
        before += batch.num_rows


def _fold(table: Any) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(index of the first, number of equal rows, row) of a table; equal rows are found by Arrow if prompts
    are single messages or text.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    prompts, truths = table.column("prompt").combine_chunks(), table.column(1).combine_chunks()
    keys: dict[str, Any] = {}
    if pa.types.is_list(prompts.type) and pa.types.is_struct(prompts.type.value_type):
        fields = {f.name for f in prompts.type.value_type}
        if (
            {"role", "content"} <= fields
            and not prompts.null_count
            and pc.all(pc.equal(pc.list_value_length(prompts), 1)).as_py()
        ):
            keys = {name: pc.struct_field(prompts.flatten(), name) for name in ("role", "content")}
    elif pa.types.is_string(prompts.type) or pa.types.is_large_string(prompts.type):
        keys = {"content": prompts}
    if table.column_names[1] == "reward_model":
        has_truth = pa.types.is_struct(truths.type) and "ground_truth" in {f.name for f in truths.type}
        truths = pc.struct_field(truths, "ground_truth") if has_truth else pa.nulls(len(truths))
    if not keys or not (pa.types.is_string(truths.type) or pa.types.is_large_string(truths.type)):
        yield from ((i, 1, row) for i, row in enumerate(table.to_pylist()))
        return
    folded = pa.table({**keys, "answer": truths, "row": np.arange(len(truths))}).group_by(
        [*keys, "answer"], use_threads=False
    )
    for row in folded.aggregate([("row", "min"), ("row", "count")]).sort_by("row_min").to_pylist():
        prompt = [{"role": row["role"], "content": row["content"]}] if "role" in keys else row["content"]
        yield row["row_min"], row["row_count"], {"prompt": prompt, "answer": row["answer"]}


def _prompt_and_answer(row: Any, place: str) -> tuple[Any, str]:
    """Raises ConfigError that names the column."""
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: {type(row).__name__}; expected {{prompt, answer}}")
    prompt, answer = row.get("prompt"), row.get("answer")
    if answer is None and isinstance(row.get("reward_model"), dict):
        answer = row["reward_model"].get("ground_truth")
    if prompt is None:
        raise ConfigError(f"{place}: no column 'prompt'; expected {{prompt, answer}}")
    if answer is None:
        raise ConfigError(
            f"{place}: no column 'reward_model.ground_truth'"
            if "reward_model" in row
            else f"{place}: no column 'answer'"
        )
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise ConfigError(f"{place}: column 'answer' is {type(answer).__name__}; expected text or a number")
    if (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in prompt)
    ):
        for message in prompt:
            if message["role"] not in ROLES:
                raise ConfigError(
                    f"{place}: chat role {message['role']!r} is not known; known: {', '.join(sorted(ROLES))}"
                )
    elif not isinstance(prompt, str):
        raise ConfigError(
            f"{place}: column 'prompt' is {type(prompt).__name__}; expected text or a list of "
            f"{{role, content}}"
        )
    return prompt, str(answer)


def _encode(row: _Row, tokenizer: Any) -> list[int]:
    if isinstance(row.prompt, str):
        return list(tokenizer(row.prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{row.place}: the prompt is a chat and the model's tokenizer has no chat template: give the "
            "prompt as text"
        )
    text = tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
