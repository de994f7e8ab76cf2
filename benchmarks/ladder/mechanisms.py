"""Show what each technique of DAPO does to a gradient, without a run, in half a minute.

python benchmarks/ladder/mechanisms.py
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from record import heading, save, table

from dapo.learn.objective import NORMALISERS
from dapo.types import Group
from tests.conftest import make_group
from tests.gradients import (
    BUDGET,
    CACHE,
    LONGEST,
    advantages_of,
    ascend,
    at_ratios,
    gradient_at,
    kept_of,
    punish,
    pushes,
    steps_to,
    weights_of,
)

STEP = 2e-4  # of a logit, where a token's ascent is followed
MOST = 0.99  # probability at which it is no longer followed


def main() -> None:
    text = heading("What each technique does to a gradient")
    text += (
        "\nNo run and no model: `dapo_kernels.reference.policy_loss` in float64 on made-up logits, with the "
        "project's own token weights, advantages, penalty and buffer. `tests/dapo/test_mechanisms.py` checks "
        "the same against arithmetic by hand. A is a token's advantage, w its weight.\n"
    )
    parts = (clip, rare_tokens, token_level, filtering, dynamic_sampling, soft_punishment)
    save("ladder_mechanisms.md", text + "".join(part() for part in parts))


def clip() -> str:
    ratios = [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 9.9, 10.1]
    rows = []
    for advantage, clip_high, dual_clip in (
        (1.0, 0.2, None),
        (1.0, 0.28, None),
        (-1.0, 0.2, None),
        (-1.0, 0.28, None),
        (-1.0, 0.28, 10.0),
    ):
        logits, targets, *_ = at_ratios(ratios, advantage)
        own = logits.softmax(-1).gather(-1, targets[:, None])[:, 0]
        slopes = gradient_at(ratios, advantage, clip_high, dual_clip).gather(-1, targets[:, None])[:, 0]
        found = (-slopes / (1 - own)).tolist()
        rows.append(
            [f"{advantage:+.0f}", clip_high, dual_clip or "none", *(f"{x:.2f}" if x else "0" for x in found)]
        )
    text = """
## Clip-Higher: which tokens have a gradient

−∂loss/∂log-prob of a token of weight 1, by its ratio r; clip_low is 0.2. The higher bound changes tokens with
A > 0 alone, and of these the ones between the bounds alone.

"""
    return text + table(["A", "clip_high", "dual_clip", *(f"r {r}" for r in ratios)], rows)


def rare_tokens() -> str:
    rows: list[list[object]] = []
    for p in (0.01, 0.1, 0.5, 0.9):
        row: list[object] = [p]
        for clip_high in (0.2, 0.28):
            end, bound = ascend(p, clip_high, STEP, MOST), p * (1 + clip_high)
            row += [f"{end:.4f}" if end < MOST else "no end", f"{bound:.4f}" if bound < 1 else "beyond 1"]
        rows.append(row)
    steps = []
    for clip_high in (0.05, 0.2, 0.28):
        exact = math.log(0.5 / 0.016) / math.log(1 + clip_high)
        steps.append([clip_high, f"{exact:.1f}", steps_to(0.5, 0.016, clip_high, STEP)])
    header = ["p", "ends at, .20", "p · 1.20", "ends at, .28", "p · 1.28"]
    text = f"""
## Clip-Higher: how far a token may go in one rollout step

One token of eight with A = 1: its gradient is followed, {STEP} of a logit at a time, until it is zero. Where
p · (1 + clip_high) is 1 or more, no ratio is clipped: no end before {MOST}.

"""
    text += table(header, rows)
    text += """
Rollout steps, each to its bound, until a token of probability 0.016 has 0.5:
ln(0.5 / 0.016) / ln(1 + clip_high), and counted by following the gradient.

"""
    return text + table(["clip_high", "by the logarithm", "counted"], steps)


def token_level() -> str:
    rows = []
    for normaliser in NORMALISERS:
        [within] = weights_of([make_group([1] * 16, [30] * 14 + [256] * 2)], normaliser)
        short, long = weights_of([make_group([1] * 16, [n] * 16, id=n) for n in (30, 256)], normaliser)
        ratio = (within[-1] / 256) / (within[0] / 30)
        of_groups = sum(long) / (sum(short) + sum(long))
        of_long = sum(within[14:]) / sum(within)
        rows.append([normaliser, *(f"{x:.3f}" for x in (ratio, of_long, sum(within), of_groups))])
    header = ["normaliser", "weight of a long one's token / a short one's", "long ones' fraction"]
    text = f"""
## Token-level loss: what a long response weighs

A group of 14 responses of 30 tokens and two of 256; and, last column, a minibatch of a group of 16 × 30 and
one of 16 × 256. token_mean is the released code's Eq. 8, group_token_mean Eq. 8 to the letter, sample_mean
GRPO's, constant Dr. GRPO's, which divides by max_response_length, here {LONGEST}.

"""
    return text + table([*header, "sum of weights", "long group's fraction of the minibatch"], rows)


def filtering() -> str:
    lengths = [30] * 10 + [48] * 6
    [group] = kept_of([make_group([1] * 6 + [0] * 10, lengths, truncated=range(10, 16))], is_dynamic=True)
    rows = []
    for normaliser in NORMALISERS:
        for is_filtered in (False, True):
            [found] = pushes([group], normaliser, is_filtered)
            sums = [sum(found[:6]), sum(found[6:10]), sum(found[10:]), sum(found)]
            rows.append([normaliser, "on" if is_filtered else "off", *map(_signed, sums)])
    text = """
## Overlong filtering: what is left is not centred

Σ w · A of six right and four wrong responses of 30 tokens and six truncated ones of 48 (A = 1.25 and −0.75).
Advantages are made with the truncated samples, which then count in no denominator.

"""
    return text + table(["normaliser", "filtering", "right", "wrong", "truncated", "all"], rows)


def _signed(x: float) -> str:
    """Write x with its sign; what is as small as the rounding of advantages is 0."""
    return f"{x:+.3f}" if abs(x) > 5e-6 else "0"


def dynamic_sampling() -> str:
    rows = []
    for is_dynamic in (True, False):
        for name, is_punished in (("none", False), ("soft", True)):
            kept = kept_of([_outcome(i, is_punished) for i in range(3)], is_dynamic)
            found = {g.id: sum(map(abs, of_group)) for g, of_group in zip(kept, pushes(kept), strict=True)}
            sums = [f"{found[i]:.3f}" if i in found else "dropped" for i in range(3)]
            rows.append(["on" if is_dynamic else "off", name, *sums])
    text = f"""
## Dynamic sampling: groups that separate nothing

Σ |w · A| of three groups of four responses, lengths 30, 40, 50 and 60 of {BUDGET} tokens: one mixed, one all
right, one all wrong; token_mean, one minibatch. Soft punishment begins at {BUDGET - CACHE} tokens. A kept
group without a gradient counts in the denominator: it dilutes the others. With a punishment it has a
gradient, of lengths alone.

"""
    return text + table(["dynamic sampling", "punishment", "mixed", "all right", "all wrong"], rows)


def _outcome(index: int, is_punished: bool) -> Group:
    group = make_group([[1, 0, 0, 0], [1] * 4, [0] * 4][index], [30, 40, 50, 60], id=index)
    return punish(group) if is_punished else group


def soft_punishment() -> str:
    cases = {
        "all right, one 4 tokens over": ([1] * 8, [30] * 7 + [52]),
        "all right, one at full length": ([1] * 8, [30] * 7 + [96]),
        "one wrong, none over": ([1] * 7 + [0], [30] * 8),
        "5 right, 3 wrong, none over": ([1] * 5 + [0] * 3, [30] * 8),
        "5 right, 3 wrong, a wrong one 4 tokens over": ([1] * 5 + [0] * 3, [30] * 7 + [52]),
        "5 right, 3 wrong, a wrong one at full length": ([1] * 5 + [0] * 3, [30] * 7 + [96]),
    }
    rows = []
    for name, (correct, lengths) in cases.items():
        found = [advantages_of(correct, lengths, estimator) for estimator in ("group_std", "no_std")]
        rows.append([name, *(f"{advantages[0]:+.3f} / {advantages[-1]:+.3f}" for advantages in found)])
    text = f"""
## Soft overlong punishment: in an all-right group a hair is as large as the whole

Advantages of the first and of the last of eight responses by Eq. 7 and 13: {BUDGET} tokens, of which {CACHE}
are the cache. Eq. 9 (group_std) has no scale: 4 tokens over (−0.083) and full length (−1) give the same.
Dynamic sampling drops the all-right group. no_std is Dr. GRPO's.

"""
    return text + table(["group", "group_std", "no_std"], rows)


if __name__ == "__main__":
    main()
