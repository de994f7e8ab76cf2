"""Make the base policies of the ladder from the example's, in 15 to 50 seconds each.

They differ in how their responses are spread: most guess (`rare`, `rarer`), or say the answer again and again
(`echo`, `long_echo`).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/arithmetic"))
import make_base
from task import Flaws, Problem, demonstrate, make_problem

EXAMPLE = Path(make_base.__file__).parent / "base"
BATCH = 32
MOST = 230  # characters of a demonstration


def guesses(worked: float) -> Callable[[Problem, random.Random], str]:
    """Return a writer of demonstrations of which this fraction is worked out, and the rest guessed."""
    flaws = Flaws(slip=0.03, guess=1 - worked)
    return lambda problem, rng: demonstrate(problem, rng, flaws)


def echoes(again: float) -> Callable[[Problem, random.Random], str]:
    """Return a writer that says the last line again with this probability, each time: long is not wrong."""

    def write(problem: Problem, rng: random.Random) -> str:
        text = demonstrate(problem, rng, Flaws(slip=0.08))
        last = text.split("\n")[-1]
        while rng.random() < again and len(text) < MOST:
            text += "\n" + last
        return text

    return write


BASES: dict[str, tuple[int, Callable[[Problem, random.Random], str]]] = {  # steps, demonstrations
    "rare": (250, guesses(0.03)),
    "rarer": (250, guesses(0.005)),
    "echo": (200, echoes(0.8)),
    "long_echo": (200, echoes(0.93)),
}


def batch(
    write: Callable[[Problem, random.Random], str], rng: random.Random
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return 16 batches of (inputs, targets), both [BATCH, n], each of similar lengths."""
    rows = []
    for _ in range(BATCH * 16):
        problem = make_problem(rng)
        response = [make_base.IDS[character] for character in write(problem, rng)]
        rows.append(([make_base.IDS[character] for character in problem.prompt], [*response, make_base.EOS]))
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    batches = []
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        longest = max(len(prompt) + len(response) for prompt, response in some)
        tokens, targets = torch.full((BATCH, longest), make_base.PAD), torch.full((BATCH, longest), -100)
        for i, (prompt, response) in enumerate(some):
            end = len(prompt) + len(response)
            tokens[i, :end] = torch.tensor(prompt + response)
            targets[i, len(prompt) : end] = torch.tensor(response)
        batches.append((tokens[:, :-1], targets[:, 1:]))
    rng.shuffle(batches)
    return batches


def make(name: str, target: Path) -> None:
    """Fine-tune the example's base: linear warm-up over 30 steps, then linear decay to a tenth."""
    steps, write = BASES[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng, peak = random.Random(7), 1e-3
    model = Qwen2ForCausalLM.from_pretrained(EXAMPLE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(steps):
        batches = batches or batch(write, rng)
        inputs, targets = batches.pop()
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 30) * (0.1 + 0.9 * (1 - step / steps))
        logits = model(inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.generation_config = GenerationConfig(eos_token_id=make_base.EOS, pad_token_id=make_base.PAD)
    model.save_pretrained(target)
    make_base.make_tokenizer().save_pretrained(target)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
