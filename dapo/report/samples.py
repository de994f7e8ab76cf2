"""Dumped groups for the report page: choose which of them fit, and describe their samples token by token."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dapo.config import ConfigError
from dapo.report.conversation import Conversation, turns
from dapo.report.curves import rounded
from dapo.rollout.dump import COLUMNS, KINDS, TRACE_COLUMNS, path_of, read_rows, traces_path_of

PREVIEW = 160  # characters of a prompt in the list of groups
EPISODE = {"episode": "string"}  # a column of dumps that have samples of several turns


@dataclass
class Embedded:
    """A run's samples in the page: groups as `index` lists them, and the content of each, compressed."""

    index: list[dict[str, Any]] = field(default_factory=list)
    blobs: list[str] = field(default_factory=list)
    num_samples: int = 0
    num_bytes: int = 0
    num_steps: int = 0  # dumped steps, in the page or not
    num_dumped: int = 0  # dumped samples, in the page or not
    warnings: list[str] = field(default_factory=list)


def embed(directory: Path, model: str | None, budget: int) -> Embedded:
    """Choose as many of a run's dumped groups as fit into `budget` bytes.

    The order is: one group of each kind, of steps that are spread evenly; then the others.

    Args:
        directory: the run's.
        model: its policy.model, for the tokenizer.

    Raises:
        ConfigError: a dump cannot be read.
    """
    rollouts = directory / "rollouts"
    steps = dumped_steps(rollouts)
    embedded = Embedded(num_steps=len(steps), num_dumped=sum(_num_rows(path_of(rollouts, i)) for i in steps))
    if not steps or not budget:
        return embedded
    exported = directory / "hf"
    tokenizer = Tokenizer.find([Path(model), exported] if model else [exported])
    if tokenizer is None:
        missing = f"no tokenizer.json in policy.model={model} or {exported}"
        embedded.warnings.append(f"{missing}: prompts and shading are left out")
    for step, group in _by_importance(rollouts, steps):
        entry, content = describe(step, group, tokenizer)
        packed = gzip.compress(json.dumps(content).encode(), compresslevel=5, mtime=0)
        blob = base64.b64encode(packed).decode()
        size = len(blob) + len(json.dumps(entry))
        if embedded.num_bytes + size > budget:
            break
        embedded.index.append(entry | {"blob": len(embedded.blobs)})
        embedded.blobs.append(blob)
        embedded.num_samples += len(content["samples"])
        embedded.num_bytes += size
    embedded.index.sort(key=lambda entry: (entry["step"], KINDS.index(entry["kind"]), entry["group"]))
    return embedded


def dumped_steps(rollouts: Path) -> list[int]:
    """Return the steps that have a dump, in order."""
    names = [re.fullmatch(r"step-(\d+)\.parquet", path.name) for path in rollouts.glob("step-*.parquet")]
    return sorted(int(name[1]) for name in names if name)


def _num_rows(path: Path) -> int:
    """Number of samples in a dump; 0 if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError):
        return 0


def _by_importance(rollouts: Path, steps: list[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    for part in (slice(0, 1), slice(1, None)):
        for i in spread(len(steps)):
            for group in read_groups(rollouts, steps[i], part):
                yield steps[i], group


def spread(count: int) -> list[int]:
    """Order 0 … count − 1 so that every beginning of it is spread evenly, with the last one first.

    `spread(5)` → [4, 0, 2, 1, 3].
    """
    width = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda i: (i != count - 1, int(f"{i:0{width}b}"[::-1], 2)))


def read_groups(rollouts: Path, step: int, part: slice) -> list[list[dict[str, Any]]]:
    """Read `part` of the groups of each kind in a step's dump: a row a sample, with its trace if it has one.

    Raises:
        ConfigError: a file is damaged or is no dump.
    """
    path, traces_path = path_of(rollouts, step), traces_path_of(rollouts, step)
    kinds: dict[str, dict[int, None]] = {kind: {} for kind in KINDS}
    for row in read_rows(path, {name: COLUMNS[name] for name in ("kind", "group")}):
        kinds.setdefault(row["kind"], {})[row["group"]] = None
    wanted = [group for kind in KINDS for group in list(kinds[kind])[part]]
    if not wanted:
        return []
    traces = {}
    if traces_path.exists():
        traces = {(row["group"], row["index"]): row for row in read_rows(traces_path, TRACE_COLUMNS, wanted)}
    groups: dict[int, list[dict[str, Any]]] = {group: [] for group in wanted}
    for row in read_rows(path, COLUMNS, wanted, EPISODE):
        key = row["group"], row["index"]
        groups[row["group"]].append(
            row | {"trace": traces.get(key), "conversation": _conversation(path, row)}
        )
    if not all(groups.values()):
        raise ConfigError(f"{path} is damaged: it names groups of which it holds no sample")
    return list(groups.values())


def _conversation(path: Path, row: dict[str, Any]) -> Conversation | None:
    try:
        return Conversation.read(row["episode"]) if row.get("episode") else None
    except ValueError as error:
        which = f"sample {row['index']} of group {row['group']}"
        raise ConfigError(f"{path} is damaged: episode of {which}: {error}") from None


def describe(
    step: int, rows: list[dict[str, Any]], tokenizer: Tokenizer | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a group's entry in the list of groups, and its content: prompt, answer and samples."""
    first = rows[0]
    tokens = first["prompt_tokens"]
    prompt = tokenizer.text(tokens) if tokenizer else f"({len(tokens)} tokens)"
    entry = {
        "step": step,
        "group": first["group"],
        "kind": first["kind"],
        "preview": " ".join((first["conversation"].task if first["conversation"] else prompt).split())[
            :PREVIEW
        ],
        "outcomes": "".join(map(_outcome, rows)),
    }
    if num_turns := [row["conversation"].counts["turns"] for row in rows if row["conversation"]]:
        entry["turns"] = [min(num_turns), max(num_turns)]
    samples = [_describe_sample(row, tokenizer) for row in rows]
    return entry, {"prompt": prompt, "answer": first["answer"], "samples": samples}


def _outcome(row: dict[str, Any]) -> str:
    """c: correct, w: wrong; a capital letter: truncated."""
    letter = "c" if row["is_correct"] else "w"
    return letter.upper() if _is_truncated(row) else letter


def _is_truncated(row: dict[str, Any]) -> bool:
    return bool(row["finish_reason"] == "length")


def _describe_sample(row: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    logprobs, mask = np.array(row["behavior_logprobs"], np.float64), np.array(row["loss_mask"], bool)
    sample = {
        "index": row["index"],
        "correct": row["is_correct"],
        "truncated": _is_truncated(row),
        "finish": row["finish_reason"],
        "reward": rounded(row["reward"]),
        "advantage": rounded(row["advantage"]),
        "tokens": len(row["tokens"]),
        "probability": rounded(float(np.exp(logprobs[mask]).mean())) if mask.any() else None,
    }
    pieces = tokenizer.pieces(row["tokens"]) if tokenizer else None
    if conversation := row["conversation"]:
        sample["episode"] = conversation.counts | {"own": int(mask.sum())}
        sample["turns"] = turns(conversation, row["loss_mask"], pieces)
    if pieces is None:
        return sample | {"text": row["text"]}
    # −log p in hundredths; 0 where the policy did not write the token
    surprise = np.rint(-100 * np.where(mask, logprobs, 0.0)).clip(0, 9999).astype(int)
    sample |= {"pieces": pieces, "surprise": surprise.tolist()}
    if not mask.all() and not conversation:
        sample["foreign"] = np.flatnonzero(~mask).tolist()
    if trace := row["trace"]:
        low, high = np.array(trace["clipped_low"]), np.array(trace["clipped_high"])
        ratios = np.exp(np.array(trace["logprobs"]) - np.array(trace["old_logprobs"])).tolist()
        clipped = np.flatnonzero(low | high).tolist()
        sample["clips"] = [[i, "high" if high[i] else "low", rounded(ratios[i])] for i in clipped]
    return sample


class Tokenizer:
    """A run's tokenizer.json read without transformers, to show a text token by token."""

    def __init__(self, path: Path):
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # text is decoded behind this token, because some decoders strip the first token's space
        self._anchor: list[int] = self._tokenizer.encode("0", add_special_tokens=False).ids[-1:]
        self._pieces: dict[int, str] = {}

    @classmethod
    def find(cls, folders: list[Path]) -> Tokenizer | None:
        """Read the tokenizer of the first folder that has one."""
        files = [folder / "tokenizer.json" for folder in folders]
        return next((cls(file) for file in files if file.is_file()), None)

    def text(self, ids: list[int]) -> str:
        """Decode tokens, special ones included."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def pieces(self, ids: list[int]) -> list[str] | None:
        """Return the text of each token; a character of several tokens belongs to the last of them.

        None if the pieces do not add up to the whole text.
        """
        pieces: list[str] = []
        pending: list[int] = []
        for i, token in enumerate(ids, start=1):
            piece = self._piece(token) if not pending else "\ufffd"
            if "\ufffd" in piece:
                pending.append(token)
                piece = self._after_anchor(pending)
                # UTF-8 has at most four bytes a character
                if piece.endswith("\ufffd") and len(pending) < 4 and i < len(ids):
                    pieces.append("")
                    continue
                pending = []
            pieces.append(piece)
        return pieces if "".join(pieces) == self._after_anchor(ids) else None

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._after_anchor([token])
        return self._pieces[token]

    def _after_anchor(self, ids: list[int]) -> str:
        return self.text(self._anchor + ids)[len(self.text(self._anchor)) :]
