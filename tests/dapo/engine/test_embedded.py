"""The embedded engine: what it draws depends on the seed alone, and its log-probs are the model's."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from dapo.config import ConfigError
from dapo.engine import idle, one_token
from dapo.engine.decoding import decode
from dapo.engine.embedded import EmbeddedEngine
from dapo.engine.one_token import KNOWN
from dapo.engine.route_watch import RouteWatch
from dapo.model.families import read_shape
from dapo.model.routing import Routing
from dapo.types import Group, Prompt, Request, Sample, Sampling
from tests.sglang.conftest import make_model

BASE = Path(__file__).parents[3] / "examples/arithmetic/base"
EOS = 1
EMPTY = np.zeros(0, np.int32)


@pytest.fixture(scope="module")
def engine() -> EmbeddedEngine:
    engine = EmbeddedEngine(BASE, torch.float32, torch.device("cpu"), max_concurrent=6)
    weights = load_file(BASE / "model.safetensors")
    engine.load_weights(weights.items(), version=7)
    return engine


def requests(num_groups: int, sampling: Sampling) -> list[Request]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    texts = ["8+4-8+1=", "3+4=", "9-1+2-3+4-5="]
    prompts = [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts]
    return [
        Request(g, i, Prompt(g % 3, prompts[g % 3], ""), 1000 * g + i, sampling)
        for g in range(num_groups)
        for i in range(2)
    ]


def generate(engine: EmbeddedEngine, wanted: list[Request]) -> dict[str, Sample]:
    stream = engine.stream()
    stream.submit(wanted)
    return {f"{sample.group}.{sample.index}": sample for sample in stream.completed()}


def test_a_sample_does_not_depend_on_what_it_was_batched_with(engine: EmbeddedEngine) -> None:
    wanted = requests(6, Sampling(1.0, 24, (EOS,)))
    together, reversed_order = generate(engine, wanted), generate(engine, wanted[::-1])
    alone = {key: sample for request in wanted for key, sample in generate(engine, [request]).items()}
    assert together.keys() == alone.keys() == {request.id for request in wanted}
    for key, sample in together.items():
        assert sample.tokens.tolist() == alone[key].tokens.tolist() == reversed_order[key].tokens.tolist()
    assert len({tuple(sample.tokens) for sample in together.values()}) > 3, (
        "different seeds draw differently from the same prompt"
    )


def test_requests_with_other_limits_are_generated_together_each_up_to_its_own(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turns of episodes have what is left of their tokens."""
    wanted = requests(3, Sampling(1.0, 12, (EOS,)))
    limits = [3, 12, 1, 7, 5, 9]
    wanted = [
        replace(r, sampling=replace(r.sampling, max_tokens=n)) for r, n in zip(wanted, limits, strict=True)
    ]
    alone = {id: sample for request in wanted for id, sample in generate(engine, [request]).items()}
    sizes, generated = [], engine.generate
    monkeypatch.setattr(
        engine, "generate", lambda batch, *rest: sizes.append(len(batch)) or generated(batch, *rest)
    )
    together = generate(engine, wanted)
    assert sizes == [6]
    for request in wanted:
        ours, theirs = together[request.id], alone[request.id]
        assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.finish_reason == theirs.finish_reason
        assert 0 < ours.length == len(ours.behavior_logprobs) <= request.sampling.max_tokens
    assert any(sample.finish_reason == "length" for sample in together.values())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_behavior_logprobs_are_the_models_at_the_sampling_temperature(
    engine: EmbeddedEngine, temperature: float
) -> None:
    wanted = requests(3, Sampling(temperature, 24, (EOS,)))
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    for request in wanted:
        [sample] = generate(engine, [request]).values()
        prompt = request.prompt.tokens
        tokens = torch.from_numpy(np.concatenate([prompt, sample.tokens])).long()[None]
        with torch.no_grad():
            logprobs = (model(tokens).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        expected = logprobs.gather(-1, torch.from_numpy(sample.tokens).long()[:, None])[:, 0]
        np.testing.assert_allclose(sample.behavior_logprobs, expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("limit", [1, 24])
def test_routes_are_the_models_of_prompt_and_response(tmp_path: Path, limit: int) -> None:
    """Prompts of unlike lengths, which are padded, and rows that end early; only a request that wants routes
    gets them.
    """
    model = make_model(tmp_path / "model", num_experts=8)
    routing = Routing(read_shape(model))
    engine = EmbeddedEngine(model, torch.float32, torch.device("cpu"), 64, routing)
    engine.load_weights(load_file(model / "model.safetensors").items(), version=0)
    wanted = requests(6, Sampling(1.0, limit, (EOS, 5, 7), returns_routes=True))
    found = generate(engine, wanted)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert limit == 1 or len({sample.length for sample in found.values()}) > 3
    for request in wanted:
        sample, prompt = found[request.id], request.prompt.tokens
        watch = RouteWatch(plain, routing)
        with watch, torch.no_grad():
            plain(torch.from_numpy(np.concatenate([prompt, sample.tokens[:-1]])).long()[None])
        expected = watch._take().numpy()
        assert sample.routes is not None and sample.routes.dtype == np.uint8
        assert np.array_equal(sample.routes, expected)
    [without] = generate(engine, requests(1, Sampling(1.0, 4, (EOS,)))[:1]).values()
    assert without.routes is None


def test_what_the_engine_scores_is_what_it_reports(engine: EmbeddedEngine) -> None:
    wanted = requests(3, Sampling(1.0, 24, (EOS,)))
    found = generate(engine, wanted)
    groups = [Group(r.group, r.prompt, [found[r.id]]) for r in wanted]
    for group, logprobs in zip(groups, engine.score(groups), strict=True):
        np.testing.assert_allclose(logprobs, group.samples[0].behavior_logprobs, atol=2e-5)


def test_a_response_ends_with_its_first_stop_token_or_at_the_limit(engine: EmbeddedEngine) -> None:
    for sample in generate(engine, requests(6, Sampling(1.0, 9, (EOS,)))).values():
        stops = np.flatnonzero(sample.tokens == EOS).tolist()
        assert stops == ([sample.length - 1] if sample.finish_reason == "stop" else [])
        assert sample.length <= 9 and (sample.finish_reason == "stop" or sample.length == 9)
        assert sample.versions == ((7, 0, sample.length),)
        assert (
            sample.loss_mask.all() and len(sample.loss_mask) == len(sample.behavior_logprobs) == sample.length
        )


def test_draws_follow_the_models_distribution(engine: EmbeddedEngine) -> None:
    """First tokens of 3,000 samples against the model's probabilities, and within top_p against the cut
    distribution.
    """
    [request, *_] = requests(1, Sampling(1.5, 1, (EOS,)))
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.no_grad():
        probabilities = (
            (model(torch.from_numpy(request.prompt.tokens).long()[None]).logits[0, -1] / 1.5)
            .softmax(-1)
            .double()
            .numpy()
        )
    for top_p in (1.0, 0.9):
        order = np.argsort(-probabilities)
        kept = order[: int(np.searchsorted(probabilities[order].cumsum(), top_p)) + 1]
        cut = np.zeros_like(probabilities)
        cut[kept] = probabilities[kept] / probabilities[kept].sum()
        engine.max_concurrent = 1000
        wanted = [Request(0, i, request.prompt, i, Sampling(1.5, 1, (EOS,), top_p)) for i in range(3000)]
        drawn = (
            np.bincount(
                [int(sample.tokens[0]) for sample in generate(engine, wanted).values()], minlength=len(cut)
            )
            / 3000
        )
        assert np.abs(drawn - cut).max() < 4 * 0.5 / 3000**0.5
        assert (drawn[cut == 0] == 0).all()


SIZES = dict(
    vocab_size=25,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
DELTA: dict[str, Any] = dict(
    head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, linear_num_key_heads=2,
    shared_expert_intermediate_size=16, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
LATENT: dict[str, Any] = dict(
    num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
    n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip
WINDOW = dict(use_sliding_window=True, sliding_window=5, layer_types=["full_attention", "sliding_attention"])


@pytest.mark.parametrize(
    "shape",
    [
        transformers.Qwen2Config(**SIZES, **WINDOW),
        transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
        transformers.Qwen3_5MoeTextConfig(**SIZES | DELTA),
        transformers.DeepseekV3Config(**SIZES | LATENT),
    ],
    ids=["a window", "a state", "a DeltaNet", "latent attention"],
)
def test_layers_that_do_not_see_all_keys_generate_as_the_model_says(tmp_path: Path, shape: Any) -> None:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(shape).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):  # else 0
            torch.nn.init.normal_(buffer, std=0.3)
    model.save_pretrained(tmp_path)
    engine = EmbeddedEngine(tmp_path, torch.float32, torch.device("cpu"), max_concurrent=6)
    weights = load_file(tmp_path / "model.safetensors")
    engine.load_weights(weights.items(), version=7)
    assert_logprobs_are_those_of(model, generate(engine, requests(3, Sampling(1.0, 12, (EOS,)))).values())


@pytest.mark.parametrize("architecture", KNOWN)
def test_one_token_a_row_is_computed_as_transformers_would_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    torch.manual_seed(3)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
    sizes = SIZES | dict(head_dim=8, sliding_window=None) | (experts if "moe" in architecture else {})
    shape = transformers.AutoConfig.for_model(architecture, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa").eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # else 0 and 1: they would change nothing
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    wanted = requests(3, Sampling(1.0, 12, (EOS,)))
    prompts, seeds = [r.prompt.tokens for r in wanted], [r.seed for r in wanted]
    calls: list[int] = []
    whole = type(model).forward

    def counted(self: Any, tokens: torch.Tensor, **named: Any) -> Any:
        calls.append(tokens.shape[1])
        return whole(self, tokens, **named)

    monkeypatch.setattr(one_token, "is_known", lambda model: False)
    tokens, logprobs = decode(model, prompts, seeds, wanted[0].sampling)
    monkeypatch.undo()
    monkeypatch.setattr(model, "forward", counted.__get__(model))
    found_tokens, found = decode(model, prompts, seeds, wanted[0].sampling)
    assert len(calls) == 1, "transformers' own forward pass is for the prompts"
    assert found_tokens.tolist() == tokens.tolist() and found.tobytes() == logprobs.tobytes()


def assert_logprobs_are_those_of(model: Any, samples: Iterable[Sample]) -> None:
    """Samples of `requests(3, …)`, against one forward pass over each whole sequence."""
    for sample, request in zip(samples, requests(3, Sampling(1.0, 12, (EOS,))), strict=True):
        prompt = request.prompt.tokens
        tokens = torch.from_numpy(np.concatenate([prompt, sample.tokens])).long()[None]
        with torch.no_grad():
            logprobs = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(-1, torch.from_numpy(sample.tokens).long()[:, None])[:, 0]
        np.testing.assert_allclose(sample.behavior_logprobs, expected.numpy(), atol=2e-5)


def test_a_mixture_of_experts_takes_weights_as_its_files_have_them_and_generates_with_them(
    tmp_path: Path,
) -> None:
    torch.manual_seed(3)
    experts = dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True, head_dim=8
    )
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **experts)).eval()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in weights, "one by one in files, fused in memory"
    engine = EmbeddedEngine(tmp_path, torch.float32, torch.device("cpu"), max_concurrent=6)
    engine.load_weights(weights.items(), version=7)
    for name, parameter in model.named_parameters():
        assert torch.equal(engine.model.get_parameter(name), parameter), name
    assert_logprobs_are_those_of(model, generate(engine, requests(3, Sampling(1.0, 12, (EOS,)))).values())
    weights.pop("model.layers.0.mlp.experts.2.down_proj.weight")
    with pytest.raises(ConfigError, match=r"1 tensors are missing, first .*experts\.2\.down_proj"):
        engine.load_weights(weights.items(), version=8)


def ids(samples: Iterable[Sample]) -> list[str]:
    return [f"{sample.group}.{sample.index}" for sample in samples]


def test_abort_drops_these_requests_or_all(engine: EmbeddedEngine) -> None:
    wanted, stream = requests(2, Sampling(1.0, 4, (EOS,))), engine.stream()
    stream.submit(wanted)
    stream.abort([wanted[0].id, wanted[3].id])
    assert ids(stream.completed()) == [wanted[1].id, wanted[2].id]
    stream.submit(wanted)
    next(stream.completed())  # the others are generated, and not read yet
    stream.abort()
    assert ids(stream.completed()) == []


def test_streams_do_not_see_each_other(engine: EmbeddedEngine) -> None:
    """Both use the same request ids. Each gets the samples it gets alone; abort of one leaves the other."""
    long, short = requests(4, Sampling(1.0, 24, (EOS,))), requests(4, Sampling(1.0, 2, (EOS,)))
    alone = [generate(engine, wanted) for wanted in (long, short)]
    streams = [engine.stream(), engine.stream()]
    for stream, wanted in zip(streams, (long, short), strict=True):
        stream.submit(wanted)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda stream: list(stream.completed()), streams))
    for samples, expected in zip(found, alone, strict=True):
        assert ids(samples) == list(expected)
        for sample in samples:
            assert sample.tokens.tolist() == expected[f"{sample.group}.{sample.index}"].tokens.tolist()
    for stream in streams:
        stream.submit(long)
    assert engine.waiting() == "16 responses queued in this process"
    streams[0].abort()
    assert ids(streams[0].completed()) == [] and ids(streams[1].completed()) == [r.id for r in long]


def test_missing_weights_are_noticed(engine: EmbeddedEngine) -> None:
    weights = load_file(BASE / "model.safetensors")
    weights.pop("model.norm.weight")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
        engine.load_weights(weights.items(), version=8)


def test_of_a_stream_that_another_thread_asks_nothing_is_lost_or_comes_twice(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Urgent requests are put before those that are being taken from the queue."""

    def answer(batch: list[Request], *arguments: object) -> list[Sample]:
        return [Sample(r.group, r.index, EMPTY, EMPTY, EMPTY, (), "stop") for r in batch]

    monkeypatch.setattr(engine, "generate", answer)
    stream, sampling = engine.stream(), Sampling(1.0, 4, (EOS,))
    found: list[int] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set() or stream.queue or stream.finished:
            found.extend(sample.group for sample in stream.completed())

    reader = threading.Thread(target=read)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    reader.start()
    for i in range(2000):
        stream.submit([Request(i, 0, Prompt(0, EMPTY, ""), i, sampling, priority=i % 2)])
    is_over.set()
    reader.join(60)
    sys.setswitchinterval(interval)
    assert sorted(found) == list(range(2000))


def test_generation_that_nobody_wants_any_more_ends_and_leaves_nothing(engine: EmbeddedEngine) -> None:
    stream = engine.stream()
    stream.submit(requests(3, Sampling(1.0, 2000, ())))
    reader = threading.Thread(target=lambda: seen.extend(stream.completed()))
    seen: list[Sample] = []
    reader.start()
    while not engine.lock.locked():
        time.sleep(0.001)
    stream.abort()
    reader.join(60)
    assert not reader.is_alive() and not seen and not stream.finished


def test_idle_seconds_leave_out_a_generation_that_is_not_over(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(idle.time, "monotonic", lambda: now[0])
    watch = idle.Idle()
    for seconds, is_idle, expected in (
        (2.0, False, 2.0),
        (5.0, False, 0.0),
        (7.0, True, 0.0),
        (9.0, False, 2.0),
    ):
        now[0] = seconds
        watch.note(is_idle)
        assert watch.take() == expected
