"""Measures how long packing a step's samples takes, and how evenly the data-parallel ranks are loaded.

python benchmarks/batch.py [--ranks 16] [--trials 20]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from record import heading, save, spread, table

from dapo import config
from dapo.learn.batch import shares
from dapo.learn.packing import ATTENTION_SPAN, pack
from dapo.types import Group, Prompt, Sample

BUDGET, LONGEST, GROUP_SIZE, PROMPT = 32_768, 20_480, 16, 256  # tokens; the paper's group size
MIXES = {  # response lengths in tokens, cut off at LONGEST
    "lognormal, median 2,500, σ 1": lambda rng, count: rng.lognormal(np.log(2500), 1.0, count),
    "Pareto from 500, index 1.1": lambda rng, count: 500 * (1 + rng.pareto(1.1, count)),
    "uniform": lambda rng, count: rng.integers(1, LONGEST + 1, count),
}
FIRST = next(iter(MIXES))


def cost(lengths: np.ndarray) -> np.ndarray:
    return lengths + lengths**2 / ATTENTION_SPAN


def in_asking_order(lengths: list[int], budget: int, num_ranks: int) -> list[list[int]]:
    """Pack without a plan: fill one bin after the other, and add empty ones to a multiple of the ranks."""
    bins: list[list[int]] = [[]]
    for i, n in enumerate(lengths):
        if sum(lengths[j] for j in bins[-1]) + n > budget:
            bins.append([])
        bins[-1].append(i)
    return bins + [[]] * (-len(bins) % num_ranks)


Updates = list[tuple[np.ndarray, list[list[int]]]]  # samples of each, and their bins


def idle_fractions(lengths: np.ndarray, updates: Updates, num_ranks: int) -> list[str]:
    """Return the fraction of the ranks' time that waits for the slowest rank, as text.

    At each update's end, by cost; and after every microbatch, by cost and by tokens.
    """
    # each: the work there is, and the work if every rank had as much as the busiest
    waits = np.zeros((3, 2))
    for members, bins in updates:
        costs, tokens = (
            [f(lengths[members[b]]).sum() if b else 0.0 for b in bins] for f in (cost, np.asarray)
        )
        costs, tokens = (np.reshape(x, (-1, num_ranks)) for x in (costs, tokens))  # [row, rank]
        for wait, work in zip(waits, (costs.sum(0, keepdims=True), costs, tokens), strict=True):
            wait += work.sum(), num_ranks * work.max(1).sum()
    return [f"{1 - work / most:.2%}" for work, most in waits]


def gathered_fractions(lengths: np.ndarray, updates: Updates, num_ranks: int) -> list[str]:
    """Return two fractions as text, where all tokens of a row are gathered at every layer.

    Of all tokens, those that pad the ranks to the longest; of the ranks' time, waiting, if a row takes as
    long as the most tokens and the most attention that a rank has in it.
    """
    # each: the amount there is, and the amount if every rank had the most
    padded, waits = np.zeros(2), np.zeros(2)
    for members, bins in updates:
        parts = [
            [f(lengths[members[b]]).sum() if b else 0.0 for b in bins]
            for f in (np.asarray, lambda n: n**2 / ATTENTION_SPAN)
        ]
        tokens, attention = (np.reshape(x, (-1, num_ranks)) for x in parts)  # [row, rank]
        padded += tokens.sum(), num_ranks * tokens.max(1).sum()
        waits += tokens.sum() + attention.sum(), num_ranks * (tokens.max(1) + attention.max(1)).sum()
    return [f"{1 - work / most:.2%}" for work, most in (padded, waits)]


def groups_of(lengths: list[int], rng: np.random.Generator) -> Iterator[Group]:
    for g in range(0, len(lengths), GROUP_SIZE):
        prompt, samples = Prompt(g, np.zeros(PROMPT, np.int32), "0"), []
        for i, n in enumerate(lengths[g : g + GROUP_SIZE]):
            arrays = np.zeros(n, np.int32), rng.random(n, dtype=np.float32), np.ones(n, bool)
            samples.append(Sample(g, i, *arrays, ((0, 0, n),), "stop", reward=1.0, advantage=1.0))
        yield Group(g, prompt, samples)


def seconds(function, trials: int) -> list[float]:
    """Return CPU seconds of this process: a machine that others use counts only its own work."""
    taken = []
    for _ in range(trials):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return taken


def pack_all(parts: list[np.ndarray], lengths: np.ndarray, num_ranks: int) -> None:
    for part in parts:
        pack(lengths[part].tolist(), BUDGET, num_ranks)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--trials", type=int, default=20)
    args = parser.parse_args()
    rows, gathered = [], []
    for mix, draw in MIXES.items():
        rng = np.random.default_rng(0)
        lengths = PROMPT + np.clip(draw(rng, args.samples).astype(int), 1, LONGEST) - 1
        everything = np.arange(len(lengths))
        for name, parts in (("one update", [everything]), ("16 updates", np.array_split(everything, 16))):
            for how, function in (("packed", pack), ("in asking order", in_asking_order)):
                if how == "in asking order" and mix != FIRST:
                    continue
                updates = [(part, function(lengths[part].tolist(), BUDGET, args.ranks)) for part in parts]
                timing = "–"
                if how == "packed":
                    taken = seconds(partial(pack_all, parts, lengths, args.ranks), args.trials)
                    timing = spread([1e3 * s for s in taken], 1)
                count = sum(len(bins) for _, bins in updates) // args.ranks
                idle = idle_fractions(lengths, updates, args.ranks)
                rows.append([mix, name, how, timing, count, *idle])
            for how, by_tokens in (("by cost", False), ("by tokens", True)):
                bins = [pack(lengths[part].tolist(), BUDGET, args.ranks, by_tokens) for part in parts]
                updates = list(zip(parts, bins, strict=True))
                gathered.append([mix, name, how, *gathered_fractions(lengths, updates, args.ranks)])

    drawn = MIXES[FIRST](np.random.default_rng(0), args.samples)
    lengths = np.clip(drawn.astype(int), 1, LONGEST).tolist()
    groups = list(groups_of(lengths, np.random.default_rng(0)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text("run: {dir: r}\ndata: {train: t}\npolicy: {model: m}\n")
        sizes = [f"rollout.prompts_per_step={len(groups)}", f"rollout.group_size={GROUP_SIZE}"]
        run = config.load(path, sizes)
    whole = seconds(lambda: list(shares(groups, run, args.ranks, {})), 3)
    batches = [share.batch(run.parallel, 0) for share in shares(groups, run, args.ranks, {})]
    microbatches = [m for batch in batches for minibatch in batch.minibatches for m in minibatch]
    num_tokens = sum(len(m.tokens) for m in microbatches)
    num_real = sum(len(s.tokens) + PROMPT - 1 for g in groups for s in g.samples)

    text = heading("Packing a step's samples into microbatches")
    text += f"""
{args.samples:,} samples in microbatches of {BUDGET:,} tokens at most, on {args.ranks} data-parallel ranks;
prompts of {PROMPT} tokens, responses of at most {LONGEST:,}.
Times are CPU time of one thread, median (min–max) of {args.trials} trials.

Idle is the fraction of the ranks' time in which they wait for the slowest of them: at the end of an update,
where gradients are summed, counting attention and the rest of a layer (n + n²/32,768 for n tokens); if they
waited after every microbatch as well, counting the same; and that in tokens alone.

"""
    header = ["response lengths", "samples in", "", "ms", "microbatches a rank"]
    text += table([*header, "idle", "waiting after each microbatch", "the same in tokens"], rows)
    text += f"""
`plan` whole, 16 updates of {args.samples // 16} samples of the first mix, arrays of {num_real:,} tokens:
{spread(whole, 2)} s. Sequence parallelism over 8 tensor ranks pads {num_tokens - num_real:,} tokens,
{1 - num_real / num_tokens:.4%}.

## Experts by allgather

All tokens that the ranks compute at a time are gathered at every layer: ranks are padded to the longest and
wait for the slowest. Packed by cost as above, or by tokens as `plan` does for this dispatcher. Padding is a
fraction of all tokens; idle is a fraction of the ranks' time, if each microbatch takes as long as the most
tokens and the most attention of a rank.

"""
    text += table(["response lengths", "samples in", "packed", "padding", "idle"], gathered)
    save("batch.md", text)


if __name__ == "__main__":
    main()
