"""How long it takes to pack a step's samples into microbatches, and how evenly the data-parallel ranks are
loaded.

python benchmarks/batch.py [--ranks 16] [--trials 20]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from record import heading, save, spread, table

from dapo import config
from dapo.learn.batch import ATTENTION_SPAN, pack, plan
from dapo.types import Group, Prompt, Sample

BUDGET, LONGEST, GROUP_SIZE, PROMPT = 32_768, 20_480, 16, 256  # tokens; the paper's group size
MIXES = {  # response lengths in tokens, cut off at LONGEST
    "lognormal, median 2,500, σ 1": lambda rng, count: rng.lognormal(np.log(2500), 1.0, count),
    "Pareto from 500, index 1.1": lambda rng, count: 500 * (1 + rng.pareto(1.1, count)),
    "uniform": lambda rng, count: rng.integers(1, LONGEST + 1, count),
}


def cost(lengths: np.ndarray) -> np.ndarray:
    return lengths + lengths**2 / ATTENTION_SPAN


def in_asking_order(lengths: list[int], budget: int, num_ranks: int) -> list[list[int]]:
    """What packing without a plan would do: fill one bin after the other, empty ones at the end to a multiple
    of the ranks.
    """
    bins: list[list[int]] = [[]]
    for i, n in enumerate(lengths):
        if sum(lengths[j] for j in bins[-1]) + n > budget:
            bins.append([])
        bins[-1].append(i)
    return bins + [[]] * (-len(bins) % num_ranks)


def idle_shares(
    lengths: np.ndarray, updates: list[tuple[np.ndarray, list[list[int]]]], num_ranks: int
) -> list[str]:
    """Of the ranks' time, in percent: waiting for the slowest rank at each update's end; the same if they met
    after every microbatch, by cost and by tokens."""
    # each: the work there is, and the work there would be if every rank had the largest share
    waits = np.zeros((3, 2))
    for members, bins in updates:
        costs, tokens = (
            [f(lengths[members[b]]).sum() if b else 0.0 for b in bins] for f in (cost, np.asarray)
        )
        costs, tokens = (np.reshape(x, (-1, num_ranks)) for x in (costs, tokens))  # [turn, rank]
        for wait, work in zip(waits, (costs.sum(0, keepdims=True), costs, tokens), strict=True):
            wait += work.sum(), num_ranks * work.max(1).sum()
    return [f"{1 - work / most:.2%}" for work, most in waits]


def gathered_shares(
    lengths: np.ndarray, updates: list[tuple[np.ndarray, list[list[int]]]], num_ranks: int
) -> list[str]:
    """Where all tokens of a turn are gathered at every layer, in percent: of all tokens, those that pad the
    ranks to the longest; of the ranks' time, waiting, if a turn takes the most tokens and the most attention
    that a rank has in it."""
    # each: what there is, and what there would be if every rank had the most
    padded, waits = np.zeros(2), np.zeros(2)
    for members, bins in updates:
        parts = [
            [f(lengths[members[b]]).sum() if b else 0.0 for b in bins]
            for f in (np.asarray, lambda n: n**2 / ATTENTION_SPAN)
        ]
        tokens, attention = (np.reshape(x, (-1, num_ranks)) for x in parts)  # [turn, rank]
        padded += tokens.sum(), num_ranks * tokens.max(1).sum()
        waits += tokens.sum() + attention.sum(), num_ranks * (tokens.max(1) + attention.max(1)).sum()
    return [f"{1 - work / most:.2%}" for work, most in (padded, waits)]


def groups_of(lengths: list[int], rng: np.random.Generator) -> Iterator[Group]:
    for g in range(0, len(lengths), GROUP_SIZE):
        prompt, samples = Prompt(g, np.zeros(PROMPT, np.int32), "0"), []
        for i, n in enumerate(lengths[g : g + GROUP_SIZE]):
            values = rng.random(n, dtype=np.float32)
            samples.append(
                Sample(
                    g,
                    i,
                    np.zeros(n, np.int32),
                    values,
                    np.ones(n, bool),
                    ((0, 0, n),),
                    "stop",
                    reward=1.0,
                    advantage=1.0,
                )
            )
        yield Group(g, prompt, samples)


def seconds(function, trials: int) -> list[float]:
    """Of this process: a machine that others use as well counts only what was worked."""
    taken = []
    for _ in range(trials):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return taken


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
                if how == "packed" or mix == next(iter(MIXES)):
                    updates = [(part, function(lengths[part].tolist(), BUDGET, args.ranks)) for part in parts]
                    taken = seconds(
                        lambda: [pack(lengths[part].tolist(), BUDGET, args.ranks) for part in parts],
                        args.trials,
                    )  # noqa: B023
                    timing = spread([1e3 * s for s in taken], 1) if how == "packed" else "–"
                    num_bins = sum(len(bins) for _, bins in updates)
                    rows.append(
                        [
                            mix,
                            name,
                            how,
                            timing,
                            num_bins // args.ranks,
                            *idle_shares(lengths, updates, args.ranks),
                        ]
                    )
            for how in (False, True):
                updates = [
                    (part, pack(lengths[part].tolist(), BUDGET, args.ranks, by_tokens=how)) for part in parts
                ]
                gathered.append(
                    [
                        mix,
                        name,
                        "by tokens" if how else "by cost",
                        *gathered_shares(lengths, updates, args.ranks),
                    ]
                )

    lengths = np.clip(
        MIXES[next(iter(MIXES))](np.random.default_rng(0), args.samples).astype(int), 1, LONGEST
    ).tolist()
    groups = list(groups_of(lengths, np.random.default_rng(0)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text("run: {dir: r}\ndata: {train: t}\npolicy: {model: m}\n")
        run = config.load(
            path, [f"rollout.prompts_per_step={len(groups)}", f"rollout.group_size={GROUP_SIZE}"]
        )
    whole = seconds(lambda: plan(groups, run, args.ranks, {}), 3)
    batches = plan(groups, run, args.ranks, {})
    microbatches = [m for batch in batches for minibatch in batch.minibatches for m in minibatch]
    num_tokens, num_real = (
        sum(len(m.tokens) for m in microbatches),
        sum(len(s.tokens) + PROMPT - 1 for g in groups for s in g.samples),
    )

    text = heading("Packing a step's samples into microbatches")
    text += (
        f"\n{args.samples:,} samples in microbatches of {BUDGET:,} tokens at most, on {args.ranks} "
        "data-parallel ranks; prompts of "
        f"{PROMPT} tokens, responses of at most {LONGEST:,}.\n"
        f"Times are CPU time of one thread, median (min–max) of {args.trials} trials.\n\n"
        "Idle is the share of all ranks' work that would fit into the time that they wait for the slowest of "
        "them: at the end of an\n"
        "update, where gradients are summed, counting attention and the rest of a layer (n + n²/32,768 for n "
        "tokens); if they\n"
        "waited after every microbatch as well, counting the same; and that in tokens alone.\n\n"
    )
    header = [
        "response lengths",
        "samples in",
        "",
        "ms",
        "microbatches a rank",
        "idle",
        "if met each turn",
        "the same in tokens",
    ]
    text += table(header, rows)
    text += (
        f"\n`plan` whole, 16 updates of {args.samples // 16} samples of the first mix, arrays of "
        f"{num_real:,} tokens filled: "
        f"{spread(whole, 2)} s. Sequence parallelism over 8 tensor ranks pads {num_tokens - num_real:,} "
        "tokens, "
        f"{1 - num_real / num_tokens:.4%}.\n"
    )
    text += (
        "\n## Experts by allgather\n\n"
        "There all tokens of a turn are gathered at every layer: ranks are padded to the longest and wait "
        "for the slowest.\n"
        "Packed by cost as above, or by tokens as `plan` does for this dispatcher. Padding is a share of all "
        "tokens; idle is of\n"
        "the ranks' time, if a turn takes the most tokens and the most attention that a rank has in it.\n\n"
    )
    text += table(["response lengths", "samples in", "packed", "padding", "idle"], gathered)
    save("batch.md", text)


if __name__ == "__main__":
    main()
