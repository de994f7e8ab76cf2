"""Make the base policies of the ladder from the example's, or from a larger model of its kind.

They differ in how their responses are spread: most guess (`rare`, `rarer`), or say the answer again and again
(`echo`, `long_echo`).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/arithmetic"))
import make_base
from task import Flaws, Problem, demonstrate, make_problem

EXAMPLE = "example"
SIZES = {  # name → what differs from the example's model
    "60m": {
        "hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 10, "num_attention_heads": 10,
        "num_key_value_heads": 2, "layer_types": ["full_attention"] * 10, "initializer_range": 0.02,
    }
}  # fmt: skip
LR_RATIO = 0.1  # of a larger model's learning rates to the example's
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


def batches(
    write: Callable[[Problem, random.Random], str], rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (inputs, targets), both [BATCH, n], of similar lengths; 16 batches are written at once."""
    while True:
        rows = []
        for _ in range(BATCH * 16):
            problem = make_problem(rng)
            prompt, response = problem.prompt, write(problem, rng)
            ids = [make_base.IDS[character] for character in prompt + response]
            rows.append((len(prompt), [*ids, make_base.EOS]))
        rows.sort(key=lambda row: len(row[1]))
        groups = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        rng.shuffle(groups)
        for some in reversed(groups):
            longest = max(len(ids) for _, ids in some)
            tokens, targets = torch.full((BATCH, longest), make_base.PAD), torch.full((BATCH, longest), -100)
            for i, (start, ids) in enumerate(some):
                tokens[i, : len(ids)] = torch.tensor(ids)
                targets[i, start : len(ids)] = torch.tensor(ids[start:])
            yield tokens[:, :-1], targets[:, 1:]


def fit(
    model: Qwen2ForCausalLM, steps: int, peak: float, write: Callable[[Problem, random.Random], str]
) -> None:
    """Train on demonstrations: linear warm-up over 30 steps, then linear decay to a tenth of `peak`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    stream = batches(write, random.Random(7))
    for step in range(steps):
        inputs, targets = (tensor.to(model.device) for tensor in next(stream))
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 30) * (0.1 + 0.9 * (1 - step / steps))
        logits = model(inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def begin(size: str) -> Qwen2ForCausalLM:
    """Return the example's base, or one of its kind of another size, from scratch."""
    if size == EXAMPLE:
        return Qwen2ForCausalLM.from_pretrained(Path(make_base.__file__).parent / "base")
    config = make_base.make_model().config
    config.update(SIZES[size])
    model = Qwen2ForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")
    for phase in make_base.PHASES:
        flaws = phase.flaws
        fit(
            model,
            phase.steps,
            phase.lr * LR_RATIO,
            lambda problem, rng, flaws=flaws: demonstrate(problem, rng, flaws),
        )
    return model


def make(name: str, target: Path, size: str = EXAMPLE) -> None:
    """Write a base; `name` "" is the example's itself, of another size."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = begin(size)
    if name:
        steps, write = BASES[name]
        fit(model, steps, 1e-3 * (1 if size == EXAMPLE else LR_RATIO), write)
    model.generation_config = GenerationConfig(eos_token_id=make_base.EOS, pad_token_id=make_base.PAD)
    model.save_pretrained(target)
    make_base.make_tokenizer().save_pretrained(target)


if __name__ == "__main__":
    name, directory, size = sys.argv[1:]
    make(name, Path(directory), size)
