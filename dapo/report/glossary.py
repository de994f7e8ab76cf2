"""Every metric that a run logs: what it means, and how a healthy and a sick run look in it.

The table's order is that of the report page. docs/metrics.md is printed from it:
python -m dapo.report.glossary > docs/metrics.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Column(NamedTuple):
    """A column of the console: its place among the columns, its header, and the format of its values."""

    place: int
    header: str
    format: str

    @property
    def width(self) -> int:
        """Number of characters in a row."""
        return int(self.format.split(".")[0])

    def text(self, value: float | None) -> str:
        """Format a value; None, a metric that the step does not have, leaves the column empty."""
        return " " * self.width if value is None else format(value, self.format)


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of them: <set> and <phase> in a name stand for any name."""

    name: str
    unit: str  # "" for a plain number, or where the meaning says it
    meaning: str
    healthy: str
    sick: str
    column: Column | None = None
    curve: str = ""  # title of its curve on the report page; "": among everything else that was measured
    monitor: int = 0  # place in curves.png among the paper's monitors (Figures 2 and 7); 0: not there

    def matches(self, name: str) -> bool:
        return re.fullmatch(re.sub("<[a-z]+>", ".+", self.name), name) is not None

    @property
    def title(self) -> str:
        """Name for a reader, with the unit: "entropy (nats)"."""
        return (self.curve or self.name) + (f" ({self.unit})" if self.unit else "")


# fmt: off
METRICS = [
    Metric("step", "", "Iteration of Algorithm 1, from 0; run.steps for the last evaluation.", "", "",
           Column(1, "step", "4.0f")),
    Metric("rollout/length", "tokens", "Mean response length, without surplus groups.",
           "grows slowly with accuracy, with plateaus",
           "shrinks while accuracy stalls, or runs into the length limit", Column(4, "length", "7.1f"),
           "response length", monitor=3),
    Metric("rollout/reward", "", "Mean reward, length penalty included, without surplus groups.",
           "rises steadily", "rises while eval/accuracy does not, or drops suddenly",
           Column(3, "reward", "7.3f"), "reward", monitor=4),
    Metric("eval/accuracy", "", "Fraction of correct samples on held-out problems, mean over the sets.",
           "rises with rollout/accuracy, then levels off",
           "falls while rollout/reward rises: the reward is exploited, or prompts memorized",
           curve="accuracy on held-out problems", monitor=1),
    Metric("rollout/accuracy", "", "Fraction of correct samples, without surplus groups.",
           "rises, with fluctuations", "falls for many steps", Column(2, "accuracy", "8.3f"),
           "accuracy while sampling", monitor=2),
    Metric("policy/entropy", "nats", "Mean entropy of the next token's distribution.",
           "falls at first, then stays level or rises slowly",
           "goes to 0: raise objective.clip_high; or explodes: responses turn to noise",
           Column(7, "entropy", "7.4f"), "entropy", monitor=5),
    Metric("policy/probability", "", "Mean probability that the policy gives to the response tokens.",
           "rises slowly and stays below 1", "goes to 1 together with entropy to 0, or falls steadily",
           Column(8, "prob", "6.3f"), "mean probability", monitor=6),
    Metric("policy/clip_high", "fraction of tokens",
           "Tokens whose gradient is clipped at 1 + clip_high (A > 0).",
           "below 1 %; 0 with one update a step", "several percent: lr too high, or too many updates a step",
           Column(9, "clip↑", "6.4f"), "clipped high"),
    Metric("policy/clip_low", "fraction of tokens",
           "Tokens whose gradient is clipped at 1 − clip_low (A < 0).", "below 1 %; 0 with one update a step",
           "several percent: lr too high, or too many updates a step", Column(10, "clip↓", "6.4f"),
           "clipped low"),
    Metric("policy/mismatch", "|Δ log p|",
           "Mean distance of the engine's and the trainer's log-probs of the same weights.",
           "small and constant: rounding only",
           "jumps or grows: the weight sync is broken, or numerics differ", Column(12, "mismatch", "8.1e"),
           "mismatch of sampler and trainer"),
    Metric("rollout/truncated", "fraction of samples", "Responses cut off at rollout.max_response_length.",
           "a few percent, and not growing", "grows: see reward.soft_overlong_punishment", curve="truncated"),
    Metric("policy/grad_norm", "", "Norm of the gradient before clipping, mean over updates.",
           "of one magnitude all the time",
           "spikes, or grows steadily: lower optim.lr, or the policy collapses", Column(11, "|grad|", "7.3f"),
           "gradient norm"),
    Metric("time/step", "s", "Wall time of the step, everything included.", "follows rollout/length",
           "grows without it: a slow disk, server or rank", Column(13, "sec", "6.2f"), "time of a step"),
    Metric("rollout/length_max", "tokens", "Longest response of the step, without surplus groups.",
           "often the length limit", "far below the limit while rollout/truncated is above 0: a bug"),
    Metric("rollout/length_kept", "tokens", "Mean response length of the kept groups.", "near rollout/length",
           "far from it: the filter prefers one kind of prompt"),
    Metric("rollout/length_turned_away", "tokens",
           "Mean response length of all correct and all wrong groups.", "near rollout/length", "far from it"),
    Metric("rollout/tokens", "tokens", "Response tokens sampled in the step, surplus groups included.",
           "follows groups/asked and rollout/length", "grows while groups/kept does not"),
    Metric("rollout/staleness", "steps", "Mean age of the kept groups when they are learned from.", "below 1",
           "near rollout.max_staleness"),
    Metric("rollout/staleness_max", "steps", "Age of the oldest kept group when it is learned from.",
           "at most rollout.max_staleness", "always at that limit"),
    Metric("groups/asked", "groups", "Groups sampled: kept + all correct + all wrong + surplus.",
           "rises as more prompts are solved", "several times groups/kept: prompts too easy or too hard",
           Column(6, "asked", "6.0f")),
    Metric("groups/kept", "groups", "Groups that the step learns from: the mixed ones (Eq. 11).",
           "always rollout.prompts_per_step", "fewer: max_rounds was reached; 0: there is no update",
           Column(5, "kept", "5.0f")),
    Metric("groups/all_correct", "groups", "Groups with only correct samples: no advantage, rejected.",
           "rises as the policy learns", "nearly all groups: the prompts are too easy"),
    Metric("groups/all_wrong", "groups", "Groups with no correct sample: no advantage, rejected.",
           "falls as the policy learns", "nearly all groups: prompts too hard, or a broken reward"),
    Metric("groups/surplus", "groups", "Finished groups for which the batch had no room.",
           "small against groups/kept",
           "large: lower rollout.prompts_per_round or raise rollout.max_staleness"),
    Metric("policy/loss", "", "Loss of Eq. 8, mean over the step's updates.",
           "near 0, of both signs: it measures no progress", "large: advantages or token weights are wrong"),
    Metric("policy/clip_high_probability", "", "Mean probability of the tokens that are clipped high.",
           "low: unlikely tokens are held back", "near 1: likely tokens are held back"),
    Metric("policy/lr", "", "Learning rate of the step's updates, their mean.",
           "rises over optim.warmup_steps, then constant", "absent: the step made no update"),
    Metric("policy/mismatch_max", "|Δ log p|", "Largest distance of the two log-probs of a token.",
           "of one magnitude all the time", "grows with policy/mismatch"),
    Metric("policy/importance", "",
           "Mean importance weight of tokens written by older weights, exp(old − behavior).", "near 1",
           "far from 1: lower rollout.max_staleness"),
    Metric("policy/importance_cut", "fraction of tokens",
           "Tokens of older weights whose importance weight is cut at the cap.", "near 0",
           "several percent: samples are too old"),
    Metric("eval/<set>/mean", "", "mean@k: fraction of correct samples, k = eval.samples of each problem.",
           "rises", "falls while rollout/accuracy rises"),
    Metric("eval/<set>/mean_half_width", "",
           "Half width of the 95 % confidence interval of mean@k, clustered by problem.",
           "small against the differences of interest", "larger than them: the set is too small"),
    Metric("eval/<set>/majority", "", "maj@k: fraction of problems whose most frequent answer is correct.",
           "above mean@k", "below mean@k: it agrees on wrong answers"),
    Metric("eval/<set>/pass", "", "pass@k: fraction of problems with at least one correct sample.",
           "stays level or rises", "falls while mean@k rises: diversity is lost"),
    Metric("eval/<set>/length", "tokens", "Mean response length.", "follows rollout/length",
           "runs into the length limit"),
    Metric("eval/<set>/truncated", "fraction of samples", "Responses cut off at the length limit.",
           "a few percent", "grows"),
    Metric("reward/timeouts", "calls",
           "Calls of a reward that exceeded reward.time_limit and count as wrong.", "0, or a few",
           "many: it is slow, or responses exploit it"),
    Metric("reward/crashes", "calls", "Calls of a reward that ended their process and count as wrong.", "0",
           "any: the function has a bug"),
    Metric("reward/disagreement", "fraction of samples",
           "Samples on which reward.shadow contradicts the first function.", "small and constant",
           "grows: one of them is exploited, see disputes.jsonl"),
    Metric("time/rollout", "s", "Sampling and scoring the step's groups.", "follows rollout/tokens",
           "grows without them: servers are slow"),
    Metric("time/old_logprobs", "s", "Recomputing log π_θold of the batch in the trainer.",
           "about a third of time/update", "more than time/update"),
    Metric("time/update", "s", "Forward, backward and optimizer of the step's updates.",
           "follows the tokens kept", "grows without them: one rank is slow"),
    Metric("time/sync", "s", "Sending the policy's weights to the engine.", "constant",
           "grows: network or disk"),
    Metric("time/eval", "s", "Evaluation on held-out problems.", "0 except every eval.every steps",
           "more than training between two evaluations"),
    Metric("time/checkpoint", "s", "Saving a checkpoint, as far as training waits for it.",
           "small with run.async_save", "grows: the disk is slow or nearly full"),
    Metric("time/<phase>", "s", "Another phase that is timed on the main rank.", "constant", "grows"),
    Metric("perf/tokens_per_second", "tokens/s", "rollout/tokens divided by time/step.",
           "constant, or rises with length", "falls", Column(14, "tok/s", "7.0f")),
    Metric("perf/peak_memory_gib", "GiB", "Peak memory of the main rank so far, of the GPU or resident.",
           "constant after a few steps", "grows all the time: a leak"),
    Metric("perf/groups_aborted", "groups", "Groups dropped unfinished when the batch was full.",
           "small against groups/asked", "large: too many are requested at once"),
    Metric("perf/bytes_received", "bytes", "Size of the batch as sent to all ranks but the main one.",
           "follows rollout/tokens", ""),
    Metric("perf/bytes_received_max", "bytes", "Size of the largest shard that a rank received.",
           "perf/bytes_received over the number of receivers", "most of it: the batch is unbalanced"),
]
# fmt: on


def find(name: str) -> Metric | None:
    """Return the entry of a metric by its name, else the one whose pattern matches it."""
    exact = [metric for metric in METRICS if metric.name == name]
    return next(iter(exact or [metric for metric in METRICS if metric.matches(name)]), None)


def columns() -> dict[str, Column]:
    """Columns of the console by metric, from left to right."""
    found = {metric.name: metric.column for metric in METRICS if metric.column}
    return dict(sorted(found.items(), key=lambda item: item[1].place))


def monitors() -> list[Metric]:
    """List the metrics of curves.png in its order."""
    return sorted((metric for metric in METRICS if metric.monitor), key=lambda metric: metric.monitor)


def described(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Texts of the report page for each metric of the table, and for the `names` that match a pattern."""
    entries = {name: find(name) for name in [*(metric.name for metric in METRICS), *names]}
    return {
        name: {"curve": m.curve, "unit": m.unit, "meaning": m.meaning, "healthy": m.healthy, "sick": m.sick}
        for name, m in entries.items()
        if m and "<" not in name
    }


def as_markdown() -> str:
    """Render the table as docs/metrics.md, one section for each part of a run."""
    sections: dict[str, list[str]] = {}
    for metric in METRICS:
        places = [f"console `{metric.column.header}`"] if metric.column else []
        places += ["page"] if metric.curve else []
        places += ["curves.png"] if metric.monitor else []
        texts = [metric.unit, metric.meaning, metric.healthy, metric.sick, ", ".join(places)]
        line = " | ".join(text.replace("|", "\\|") for text in (f"`{metric.name}`", *texts))
        sections.setdefault(metric.name.split("/")[0], []).append(f"| {line} |\n")
    header = "| metric | unit | meaning | healthy | sick | shown first |\n" + "|---" * 6 + "|\n"
    tables = [f"\n## {name}\n\n{header}{''.join(lines)}" for name, lines in sections.items()]
    return INTRODUCTION + "".join(tables)


INTRODUCTION = """# Metrics

Made by `python -m dapo.report.glossary > docs/metrics.md`; edit dapo/report/glossary.py instead.

A run writes each metric to `metrics.jsonl`, one line a step, and to TensorBoard. `python -m dapo report RUN`
shows all of them on one page. The last column names the other places, and the page where it shows the
metric among its first curves. A cell of the unit column is empty for a plain number.
"""


if __name__ == "__main__":
    print(as_markdown(), end="")
