"""Builders of small inputs. Token ids, log-probabilities and advantages are all different, so that one at a
wrong place is seen.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dapo import config
from dapo.types import Group, Prompt, Sample

# the processes that tests start find the functions in tests/ too
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
)

SLOW = (  # start torchrun, a server, a browser or Triton's interpreter: not part of `make test-fast`
    "tests/benchmarks/test_gpu_check.py::test_the_rehearsal",
    "tests/dapo/command/test_bench.py::test_the_phases",
    "tests/dapo/command/test_bench.py::test_what_cannot",
    "tests/dapo/model/test_hub.py::test_a_run_of_names",
    "tests/dapo/model/test_hub.py::test_a_plan_needs",
    "tests/dapo/model/test_hub.py::test_init_looks",
    "tests/dapo/model/test_hub.py::test_what_is_neither",
    "tests/dapo/plan/test_plan.py::test_the_paper_s_layout_is_built",
    "tests/dapo/plan/test_plan.py::test_the_mixture_of_experts_layout_is_built",
    "tests/dapo/report/test_page.py",
    "tests/dapo/test_watch.py",
    "tests/dapo/episodes/test_faults.py",
    "tests/dapo/episodes/test_workers.py",
    "tests/dapo/reward/test_pool.py",
    "tests/dapo/rollout/test_evaluate.py::test_the_eval_command",
    "tests/distributed/",
    "tests/pretend_cuda/",
    "tests/sglang/",
    "tests/kernels/test_linear_policy_loss.py",
    "tests/kernels/test_policy_loss.py",
    "tests/kernels/test_kernel_report.py",
    "tests/kernels/test_tensor_parallel.py",
    "tests/tools/test_convert.py",
    "tests/tools/test_megatron_lm.py",
    "tests/tools/test_verify_resume.py",
    "tests/fixtures/test_fixtures.py::test_a_run_of_then_goes_on_as_it_would_have",
    "tests/transformer_engine/",
    "tests/test_commands.py",
    "tests/test_docs.py::test_the_python_page",
    "tests/test_docs.py::test_a_closure",
    "tests/test_examples.py",
    "tests/test_servers_apart.py",
)

LONGEST = "tests/test_commands.py"  # seven minutes in one process

TOGETHER = {  # file → what it shares with other files, in one process; every other file is on its own
    "tests/distributed/test_traces.py": "traces",
    "tests/distributed/test_nodes.py": "traces",
    "tests/sglang/test_real_client.py": "a real server",
    "tests/sglang/test_real_servers.py": "a real server",
    "tests/sglang/test_weight_sync.py": "a real server",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests. They come first, the longest file before all: no process waits long for the other."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)

    def order(item: pytest.Item) -> tuple[bool, bool]:
        return item.get_closest_marker("slow") is None, not item.nodeid.startswith(LONGEST)

    items.sort(key=order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Run a file's tests in one process. (The groups of pytest-xdist 3.8 do nothing under pytest 9.2.)"""
    from xdist.scheduler import LoadFileScheduling  # a GPU machine may lack it

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

    return Together(config, log)


SMALL_RUN = """
run: {dir: DIR/run, steps: 2}
data: {train: DIR/train.jsonl, max_prompt_length: 16}
rollout: {prompts_per_step: 4, group_size: 2, prompts_per_round: 4, max_rounds: 3, max_response_length: 32}
reward: {overlong_cache: 8}
optim: {prompts_per_minibatch: 2}
parallel: {tensor: 1}
policy: {model: DIR/model, tokens_per_microbatch: 64}
"""


def make_config(folder: Path, *overrides: str) -> config.Config:
    """A run of four groups of two: `make_config(tmp_path, "rollout.group_size=4")`."""
    path = folder / "small.yaml"
    path.write_text(SMALL_RUN.replace("DIR", str(folder)))
    return config.load(path, list(overrides))


def make_prompt(index: int = 0, length: int = 3, answer: str = "1") -> Prompt:
    return Prompt(index, np.arange(length, dtype=np.int32) + 100 * (index + 1), answer)


def make_sample(
    length: int = 4, group: int = 0, index: int = 0, *, is_correct=False, is_truncated=False, text: str = ""
) -> Sample:
    rng = np.random.default_rng([group, index, length])
    return Sample(
        group=group,
        index=index,
        tokens=rng.integers(1_000, 1_000_000, length, dtype=np.int32),
        behavior_logprobs=-rng.random(length, dtype=np.float32),
        loss_mask=np.ones(length, bool),
        versions=((0, 0, length),),
        finish_reason="length" if is_truncated else "stop",
        text=text,
        is_correct=is_correct,
        reward=1.0 if is_correct else -1.0,
        advantage=float(rng.normal()),
    )


def make_group(
    correct: Sequence[int],
    lengths: Sequence[int] = (),
    *,
    truncated: Sequence[int] = (),
    id: int = 0,
    prompt_length: int = 3,
) -> Group:
    """`make_group([1, 0, 0], [5, 7, 9], truncated=[2])`: three samples, the first one correct, the last one
    cut off.
    """
    lengths = lengths or [4] * len(correct)
    samples = [
        make_sample(length, id, i, is_correct=bool(is_correct), is_truncated=i in truncated)
        for i, (is_correct, length) in enumerate(zip(correct, lengths, strict=True))
    ]
    return Group(id, make_prompt(id, prompt_length), samples)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One sequence, causal: [n, h, d] with [n, g, d] → [n, h·d]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
