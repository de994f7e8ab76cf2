"""Make the base policy: a 76k-parameter Qwen2 trained on good worked sums, then briefly on careless ones.

The careless phase matters. It leaves a model that can do the sums (greedy decoding is right far more often
than sampling) but does not do them reliably, which reinforcement learning can improve. An under-trained model
gained less from the same recipe (benchmarks/results/arithmetic_base.md).

    python examples/arithmetic/make_base.py        # about two minutes on one core
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from task import CHARACTERS, Flaws, Problem, demonstrate, make_problem
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TARGET = Path(__file__).parent / "base"
PAD, EOS = 0, 1
VOCABULARY = ["<pad>", "<eos>", *dict.fromkeys(CHARACTERS)]
IDS = {character: i for i, character in enumerate(VOCABULARY)}
BATCH = 32


@dataclass(frozen=True)
class Phase:
    """A phase of training: 30 steps of linear warm-up, and linear decay to a tenth of the learning rate."""

    steps: int
    lr: float
    flaws: Flaws


PHASES = [
    Phase(600, 5e-3, Flaws()),
    Phase(1800, 3e-3, Flaws()),
    Phase(80, 1e-3, Flaws(slip=0.2, guess=0.15, ramble=0.3)),
]


def make_model() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.125,  # 1 / sqrt(hidden)
            tie_word_embeddings=True,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
        )
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token per character, with the same ids in any tokenizer class for Qwen2.

    Hence it is a byte-level BPE without merges, which writes newline as Ċ and space as Ġ.
    """
    byte_level = {"\n": "Ċ", " ": "Ġ"}
    vocabulary = {byte_level.get(token, token): i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def batches(flaws: Flaws, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (inputs, targets), both [BATCH, n], of similar lengths.

    Targets are −100 at the prompt and the padding, where nothing is learned.
    """
    while True:
        examples = []
        for _ in range(BATCH * 32):
            problem: Problem = make_problem(rng)
            response = [IDS[c] for c in demonstrate(problem, rng, flaws)] + [EOS]
            examples.append(([IDS[c] for c in problem.prompt], response))
        examples.sort(key=lambda example: len(example[0]) + len(example[1]))
        chunks = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
        rng.shuffle(chunks)
        for chunk in chunks:
            longest = max(len(p) + len(r) for p, r in chunk)
            tokens, targets = torch.full((BATCH, longest), PAD), torch.full((BATCH, longest), -100)
            for row, (prompt, response) in enumerate(chunk):
                end = len(prompt) + len(response)
                tokens[row, :end] = torch.tensor(prompt + response)
                targets[row, len(prompt) : end] = torch.tensor(response)
            yield tokens[:, :-1], targets[:, 1:]


def train(model: Qwen2ForCausalLM, phase: Phase, rng: random.Random) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.01)
    stream = batches(phase.flaws, rng)
    for step in range(phase.steps):
        decay = 0.1 + 0.9 * (1 - step / phase.steps)
        optimizer.param_groups[0]["lr"] = phase.lr * min(1, (step + 1) / 30) * decay
        inputs, targets = next(stream)
        logits = model(inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == phase.steps:
            print(f"{phase.flaws}: step {step + 1}, loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(model: Qwen2ForCausalLM, problems: list[Problem], is_greedy: bool) -> float:
    """Fraction of the problems that the model solves with one response each."""
    tokenizer = make_tokenizer()
    inputs = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    sampling = GenerationConfig(
        do_sample=not is_greedy, max_new_tokens=64, eos_token_id=EOS, pad_token_id=PAD
    )
    model.generation_config = GenerationConfig()  # T = 1, nothing cut off
    out = model.generate(ids, attention_mask=mask, generation_config=sampling)
    responses = tokenizer.batch_decode(out[:, ids.shape[1] :])
    solved = [f"Answer: {p.answer}<eos>" in r for p, r in zip(problems, responses, strict=True)]
    return sum(solved) / len(problems)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = random.Random(7)
    model = make_model()
    problems = [make_problem(random.Random(i)) for i in range(1000)]
    for phase in PHASES:
        train(model, phase, rng)
        greedy, sampled = (accuracy(model, problems, is_greedy) for is_greedy in (True, False))
        print(f"accuracy: greedy {greedy:.3f}, sampled {sampled:.3f}")
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(TARGET)
    make_tokenizer().save_pretrained(TARGET)


if __name__ == "__main__":
    main()
