"""Servers on the trainer's GPUs: what `dapo plan` counts of both, what it refuses, and what it advises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dapo.config import ConfigError
from dapo.model.parameters import num_parameters
from dapo.plan.memory import GIB
from dapo.plan.plan import Plan, describe
from dapo.plan.servers import CONTEXT, FRACTION, WORKING, Servers
from tests.dapo.model.models import plan_of

SHARED = ["parallel.tensor=4", "policy.tokens_per_microbatch=22528"]
SHARED += ["engine.sglang.enable-memory-saver=true", "engine.sglang.tp-size=4"]


def shared(folder: Path, *overrides: str, model: str = "Qwen2.5-7B") -> Plan:
    return plan_of(folder, model, *SHARED, *overrides, gpu="h100", world=8)


def test_while_servers_generate_the_trainer_keeps_its_parameters(tmp_path: Path) -> None:
    plan = shared(tmp_path, f"{FRACTION}=0.6")
    servers, rank, memory = plan.servers, plan.worst, plan.hardware.memory
    assert servers
    assert servers.trainer == rank.params / GIB + plan.hardware.runtime
    assert servers.page_locked == rank.optimizer / GIB > rank.params / GIB
    assert servers.static == 0.6 * (memory - plan.hardware.runtime)
    room = memory - WORKING - servers.trainer
    assert plan.fits and servers.static < room
    line = next(line for line in describe(plan) if line.startswith("while servers generate"))
    assert f"{8 * rank.optimizer / GIB:.0f} GiB of page-locked main memory of a machine with 8" in line
    assert f"hold {servers.static:.1f} GiB" in line and f"trainer {servers.trainer:.1f};" in line
    apart = plan_of(tmp_path, "Qwen2.5-7B", *SHARED[:2], world=8)
    assert apart.servers is None and plan.room == apart.room - CONTEXT
    assert not [text for text in describe(apart) if "servers" in text]


@pytest.mark.parametrize("saver", ["enable_memory_saver=true", "enable-memory-saver=false"])
def test_an_argument_counts_as_sglang_reads_it(saver: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "Qwen2.5-7B", "parallel.tensor=4", f"engine.sglang.{saver}", world=8)
    assert (plan.servers is not None) == saver.endswith("true")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], f"({FRACTION}=0.97, which SGLang takes if it is not set), the trainer"),
        ([f"{FRACTION}=0.95"], f"({FRACTION}=0.95), the trainer"),
    ],
)
def test_servers_that_leave_too_little_to_the_trainer_do_not_fit_and_a_fraction_does(
    overrides: list[str], says: str, tmp_path: Path
) -> None:
    plan = shared(tmp_path, *overrides)
    assert not plan.fits and plan.worst.peak / GIB < plan.room
    lines = describe(plan)
    wrong = next(line for line in lines if line.startswith("out of memory"))
    assert says in wrong and re.search(r"while servers generate: .*: \d+\.\d GiB too much$", wrong)
    advised = next(line for line in lines if line.startswith("fits with "))
    override = advised.removeprefix("fits with ").partition(":")[0]
    assert override.startswith(f"{FRACTION}=0.") and shared(tmp_path, override).fits
    fraction = float(override.partition("=")[2])
    nearer = f"{FRACTION}={fraction + 0.05:.2f}"
    assert not shared(tmp_path, nearer).fits, "the nearest that fits"


def test_servers_with_too_little_for_their_weights_do_not_fit(tmp_path: Path) -> None:
    plan = shared(tmp_path, f"{FRACTION}=0.04")
    assert plan.servers and not plan.fits
    gives, takes = f"{plan.servers.static:.1f} GiB of a GPU", f"take {plan.servers.least:.1f}"
    assert plan.problems == [
        f"{FRACTION}=0.04 gives a server {gives}: its weights and one sample's cache {takes}"
    ]
    one = shared(tmp_path, f"{FRACTION}=0.04", "engine.sglang.tp-size=1").servers
    assert one and 3.5 < one.least / plan.servers.least < 4.5, "weights and KV heads are split"


@pytest.mark.parametrize(
    ("model", "values"),
    [
        ("Qwen3-Next-80B-A3B", 12 * 2 * 2 * 256),  # keys and values of every fourth layer
        ("DeepSeek-V3", 61 * (512 + 64)),
    ],
)
def test_the_cache_has_what_each_layer_keeps_of_a_token(model: str, values: int, tmp_path: Path) -> None:
    layout = "parallel.tensor=2", "parallel.expert=8", "engine.sglang.tp-size=1"

    def servers(length: int) -> Servers | None:
        return shared(tmp_path, *layout, f"rollout.max_response_length={length}", model=model).servers

    short, long = servers(8192), servers(9216)
    assert short and long
    assert (long.least - short.least) * GIB == pytest.approx(1024 * 2 * values)
    if model.startswith("Qwen"):  # a state of each DeltaNet, whatever the length
        rank = short.ranks[0]
        state = 36 * 4 * 32 * 128 * 128
        weights, cache = 2 * num_parameters(rank.shape), 2 * values * rank.longest
        assert short.least * GIB == pytest.approx(weights + cache + state, rel=1e-9)


@pytest.mark.parametrize("value", ["1.5", "0", "half", "true"])
def test_a_fraction_that_is_none_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{FRACTION}=.*: expected a number between 0 and 1"):
        describe(shared(tmp_path, f"{FRACTION}={value}"))


def test_both_that_do_not_fit_are_named(tmp_path: Path) -> None:
    plan = shared(tmp_path, "parallel.tensor=2", model="Qwen2.5-32B")
    assert [problem.partition(":")[0].partition(" on stage")[0] for problem in plan.problems] == [
        "out of memory during the loss",
        "out of memory while servers generate",
    ]


def test_on_a_cpu_no_memory_is_shared(tmp_path: Path) -> None:
    assert plan_of(tmp_path, "Qwen2.5-0.5B", *SHARED, "parallel.tensor=1", gpu="cpu").servers is None


def test_servers_of_others_are_said_not_to_be_counted(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "Qwen2.5-7B", "parallel.tensor=4", "engine.urls=[http://a:1]", world=8)
    assert "note      servers in engine.urls are taken to be on other devices" in describe(plan)
