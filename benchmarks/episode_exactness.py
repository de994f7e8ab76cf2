"""Episodes of several turns, token for token: what is wrong in thousands of them, and what rendering anew
would have changed.

python benchmarks/episode_exactness.py [EPISODES]
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from pathlib import Path

import record

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.dapo.episodes.families import FAMILIES, Family
from tests.dapo.episodes.scripted import Script, faults, make_script, play, render_again

HOSTILE = 0.2  # fraction of messages that hold control tokens


def make_hostile(family: Family, rng: random.Random) -> Script:
    """Make a script in which some messages hold the family's control tokens."""
    script = make_script(family, rng)
    for messages in script.answers:
        for message in messages:
            if rng.random() < HOSTILE:
                message["content"] += rng.choice([*family.special, *family.added]) + " so"
    return script


def measure(family: Family, num_episodes: int) -> list[object]:
    """Return a family's row of the table."""
    chat, count, wrong = family.chat(), Counter[str](), Counter[str]()
    seconds = 0.0
    start = time.process_time()
    for script, sample in play(family, num_episodes, script_of=make_hostile):
        paused = time.process_time()
        wrong.update(fault for fault in faults(family, script, sample))
        again = render_again(family, chat, script, sample)
        assert sample.episode
        count["episodes"] += 1
        count["calls"] += len(script.calls)
        count["later"] += len(again)
        count["text"] += sum(text for text, _ in again)
        count["tokens"] += sum(tokens for _, tokens in again)
        count["neutralised"] += sample.episode.num_neutralised
        seconds += time.process_time() - paused
    played = time.process_time() - start - seconds
    wrong_masks, wrong_tokens = wrong.pop("the mask is wrong", 0), sum(wrong.values())
    return [
        family.name,
        f"{count['episodes']:,}",
        f"{count['calls']:,}",
        wrong_tokens,
        wrong_masks,
        f"{count['neutralised']:,}",
        f"{count['later']:,}",
        f"{count['text'] / count['later']:.1%}",
        f"{count['tokens'] / count['later']:.1%}",
        f"{1e6 * played / count['calls']:.0f}",
    ]


def main() -> None:
    num_episodes = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    rows = [measure(family, num_episodes) for family in FAMILIES]
    header = [
        "template", "episodes", "calls", "wrong tokens", "wrong masks", "control tokens neutralised",
        "later calls", "other text if rendered anew", "other tokens", "µs of CPU a call",
    ]  # fmt: skip
    text = (
        f"{record.heading('Episodes, token for token')}\n"
        "Scripted policies that split their text into tokens at random, and scripted environments, played by "
        "EpisodeStream; templates of five families (tests/dapo/episodes/families.py), byte-level tokenizers. "
        "Up to 4 turns; some episodes are cut by their token budget. "
        f"{HOSTILE:.0%} of the environments' messages hold a control token.\n\n"
        "A call's input ids have to be a prefix of the episode, each turn the tokens that were sampled, the "
        "mask True on them and nowhere else, and the text between two turns the template's. Wrong tokens: "
        "any of these but the mask, and log-probs and versions. Rendered anew: the conversation's messages "
        "by the same template, in place of the tokens that were kept; how many later calls would have had "
        "other text, and other tokens. CPU: the whole play, scripted policy included, on a machine with "
        "other load.\n\n"
        f"{record.table(header, rows)}"
    )
    record.save("episode_exactness.md", text)


if __name__ == "__main__":
    main()
