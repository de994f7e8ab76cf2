"""dapo init: what it reads from a model and its data, what it writes, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dapo import config
from dapo.command import init
from dapo.config import ConfigError
from dapo.model.families import read_shape
from dapo.model.layout import check_layout, check_length
from dapo.plan.choose import Machine
from dapo.plan.plan import make_plan
from tests.dapo.model.models import write_model

ARITHMETIC = Path(__file__).parents[3] / "examples/arithmetic"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def make_model(folder: Path, name: str, **changed: int) -> Path:
    """Sizes of a known model, with the arithmetic example's tokenizer, which knows characters only."""
    model = write_model(folder / name, name, **changed)
    for file in TOKENIZER:
        shutil.copy(ARITHMETIC / "base" / file, model)
    return model


def make_data(folder: Path, *prompts: str) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": "1"}) + "\n" for text in prompts))
    return path


def written(folder: Path, model: Path, data: Path, machine: Machine) -> tuple[config.Config, list[str]]:
    lines = init.write(folder / "mine.yaml", init.look(model, data), machine)
    return config.load(folder / "mine.yaml"), lines


def test_on_a_cpu_it_is_a_small_run_of_one_rank(tmp_path: Path) -> None:
    found, lines = written(tmp_path, ARITHMETIC / "base", ARITHMETIC / "data/train.jsonl", Machine("cpu", 2))
    assert found.data.max_prompt_length == 16, "the longest has 12, in steps of 16"
    assert found.rollout.max_response_length == 256
    assert found.engine.kind == "embedded"
    assert (found.parallel.tensor, found.policy.dtype, found.optim.lr) == (1, "float32", 1e-4)
    assert str(found.run.dir) == "runs/mine"
    check_length(found)
    assert "half have at most 10 tokens, the longest has 12" in "\n".join(lines)
    assert lines[-1].endswith(f"dapo train {tmp_path}/mine.yaml")


def test_what_is_said_stands_in_the_file_too(tmp_path: Path) -> None:
    _, lines = written(tmp_path, ARITHMETIC / "base", ARITHMETIC / "data/train.jsonl", Machine("cpu", 2))
    comments = [line[2:] for line in (tmp_path / "mine.yaml").read_text().splitlines() if line[:2] == "# "]
    said = lines[: next(i for i, line in enumerate(lines) if line.startswith("written"))]
    assert comments[1:] == said
    kinds = ["model", "data", "prompts", "machine", "lengths", "layout", "note", "note"]
    assert [line.split()[0] for line in said] == kinds


@pytest.mark.parametrize(
    ("name", "machine", "ranks", "expected"),
    [
        ("Qwen2.5-7B", Machine("h100", 8), 4, {"parallel.tensor": 4, "engine.servers": 4}),
        ("Qwen2.5-7B", Machine("h200", 8), 4, {"parallel.tensor": 2, "engine.servers": 4}),
        ("Qwen2.5-7B", Machine("h100", 1), 1, {"parallel.tensor": 1, "engine.weight_sync": "tensor"}),
        ("Qwen2.5-32B", Machine("h100", 8), 4, {"parallel.tensor": 4, "engine.servers": 2}),
        ("Qwen2.5-7B", Machine("h100", 6), 4, {"parallel.tensor": 4, "engine.servers": 2}),
        ("Qwen2.5-32B", Machine("h100", 7), 4, {"parallel.tensor": 4, "engine.servers": 1}),
        ("Qwen3-30B-A3B", Machine("h200", 8), 4, {"parallel.expert": 4, "engine.servers": 4}),
    ],
    ids=str,
)  # fmt: skip
def test_the_layout_fits(
    name: str, machine: Machine, ranks: int, expected: dict[str, object], tmp_path: Path
) -> None:
    model, data = make_model(tmp_path, name), make_data(tmp_path, *map(str, range(2000)))
    found, lines = written(tmp_path, model, data, machine)
    for key, value in expected.items():
        section, option = key.split(".")
        assert getattr(getattr(found, section), option) == value, key
    check_layout(read_shape(model), found)
    check_length(found)
    assert make_plan(found, machine.gpu, ranks).fits
    assert lines[-1].endswith(f"dapo train {tmp_path}/mine.yaml" + (f" --nproc {ranks}" if ranks > 1 else ""))
    assert f"--gpu {machine.gpu} --world-size {ranks}" in lines[-2]


def test_a_few_long_prompts_do_not_take_the_model_s_positions(tmp_path: Path) -> None:
    data = make_data(tmp_path, "1+1=", *("1+" * 70 + f"{n}=" for n in range(9)), "1+" * 200 + "1=")
    found, lines = written(tmp_path, ARITHMETIC / "base", data, Machine("cpu", 1))
    assert found.data.max_prompt_length == 256, "half of 512"
    assert found.data.too_long == "drop"
    assert found.data.max_prompt_length + found.rollout.max_response_length == 512
    assert found.rollout.prompts_per_step == 2, "a third of the ten that are left, as a power of two"
    assert any("1 prompts of more than 256 tokens are left out" in line for line in lines)


def test_a_single_prompt_that_is_far_longer_than_all_is_left_out(tmp_path: Path) -> None:
    data = make_data(tmp_path, *(f"{n}+1=" for n in range(200)), "1+" * 100 + "1=")
    found, lines = written(tmp_path, ARITHMETIC / "base", data, Machine("cpu", 1))
    assert found.data.max_prompt_length == 16
    assert any("1 prompts of more than 16 tokens are left out" in line for line in lines)


@pytest.mark.parametrize("positions", [1, 3, 8])
def test_a_model_without_room_for_most_prompts_is_refused(positions: int, tmp_path: Path) -> None:
    model = make_model(tmp_path, "Qwen2.5-7B", max_position_embeddings=positions)
    with pytest.raises(ConfigError, match="2 of 2 prompts are longer than half of the model's"):
        init.look(model, make_data(tmp_path, "1+1=2+2=", "2+2=3+3="))


@pytest.mark.parametrize(
    ("count", "groups", "minibatch"), [(1, 1, 1), (3, 1, 1), (20, 4, 1), (100, 16, 4), (4000, 16, 4)]
)
def test_a_step_takes_no_more_than_a_third_of_the_prompts(
    count: int, groups: int, minibatch: int, tmp_path: Path
) -> None:
    data = make_data(tmp_path, *(f"{n}+1=" for n in range(count)))
    found, _ = written(tmp_path, ARITHMETIC / "base", data, Machine("cpu", 1))
    assert (found.rollout.prompts_per_step, found.optim.prompts_per_minibatch) == (groups, minibatch)


def test_rows_that_cannot_be_used_are_counted_and_left_out(tmp_path: Path) -> None:
    data = make_data(tmp_path, "1+1=", "2+2=")
    data.write_text(data.read_text() + "not JSON\n")
    found, lines = written(tmp_path, ARITHMETIC / "base", data, Machine("cpu", 1))
    assert found.data.on_error == "skip"
    assert any("1 rows cannot be used and are left out" in line for line in lines)


def test_a_data_set_of_several_files_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_data(tmp_path, *(f"{n}+1=" for n in range(6)))
    second = first.with_name("more.jsonl")
    second.write_text(json.dumps({"prompt": "77+1=", "answer": "78"}) + "\nnot JSON\n")
    monkeypatch.setattr(init.hub, "data_files", lambda path, option: [first, second])
    found, lines = written(tmp_path, ARITHMETIC / "base", Path("org/sums"), Machine("cpu", 1))
    assert found.data.train == Path("org/sums") and found.data.on_error == "skip"
    assert "data      org/sums: 2 files" in lines and "prompts: 7" in (tmp_path / "mine.yaml").read_text()
    assert f"data        {first.name}: 6 rows, 6 prompts" in lines


@pytest.mark.parametrize(
    ("text", "answer_format", "is_noted"),
    [('1+1= End with "Answer: x".', "answer_line", False), (r"1+1= Put it in \boxed{}.", "boxed", False),
     (r'1+1= End with "Answer: \boxed{x}".', "answer_line", False), ("1+1=", "answer_line", True),
     ("1+1=\nAnswer: ", "answer_line", True), ("1+1= Put it in \\boxed{}.\nAnswer:", "boxed", False)],
    ids=["line", "boxed", "both", "neither", "begun", "boxed and begun"],
)  # fmt: skip
def test_the_reward_reads_what_the_prompts_ask_for(
    text: str, answer_format: str, is_noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tokenizer:  # the example's has no letters
        chat_template, eos_token_id = None, 1

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

        def decode(self, tokens: list[int]) -> str:
            return bytes(list(tokens)).decode()

    monkeypatch.setattr(init, "load_tokenizer", lambda model: Tokenizer())
    monkeypatch.setattr(init, "check_vocabulary", lambda model, tokenizer: None)
    found, lines = written(tmp_path, ARITHMETIC / "base", make_data(tmp_path, text), Machine("cpu", 1))
    assert found.reward.answer_format == answer_format
    assert any("name a reward.function" in line for line in lines) == is_noted


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine\.yaml is there: choose another name"):
        written(tmp_path, ARITHMETIC / "base", make_data(tmp_path, "1+1="), Machine("cpu", 1))
    assert (tmp_path / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize("machine", [Machine("h100", 1), Machine("a100", 2)], ids=str)
def test_a_model_that_is_too_large_is_refused_and_nothing_is_written(
    machine: Machine, tmp_path: Path
) -> None:
    seen = init.look(make_model(tmp_path, "Qwen2.5-32B"), make_data(tmp_path, "1+1="))
    with pytest.raises(ConfigError, match=rf"{machine.count} × .*no layout fits: name more"):
        init.write(tmp_path / "mine.yaml", seen, machine)
    assert not (tmp_path / "mine.yaml").exists()


def test_a_folder_that_is_not_there_is_named_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--out .*/none/mine\.yaml: there is no folder .*/none: make it first"
    ):
        init.check_new(tmp_path / "none/mine.yaml")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"empty\.jsonl: no prompts in it$"):
        (tmp_path / "empty.jsonl").touch()
        init.look(ARITHMETIC / "base", tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match=r"data file .* is a folder"):
        init.look(ARITHMETIC / "base", tmp_path)
    with pytest.raises(ConfigError, match="none: no config"):
        init.look(tmp_path / "none", make_data(tmp_path, "1+1="))
    with pytest.raises(ConfigError, match=r"none\.jsonl does not exist"):
        init.look(ARITHMETIC / "base", tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("gpu", "count", "expected"),
    [("h100", None, Machine("h100", 8)), ("h200", 4, Machine("h200", 4)), ("cpu", 1, Machine("cpu", 1)),
     (None, None, Machine("cpu", 2))],
)  # fmt: skip
def test_the_machine_is_what_is_asked_for(gpu: str | None, count: int | None, expected: Machine) -> None:
    assert init.machine_of(gpu, count) == expected


def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="--gpus 8: there is none on this machine: name one with --gpu"):
        init.machine_of(None, 8)


def test_more_gpus_than_a_machine_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="--gpus 9"):
        init.machine_of("h100", 9)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, name: str, gib: float) -> None:
    memory = SimpleNamespace(total_memory=int(gib * 2**30))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: memory)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H20", 95.1, "h20"),
        ("NVIDIA B200", 178.3, "b200"),
    ],
)
def test_this_machine_s_gpus_are_known_by_name(
    name: str, gib: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpus(monkeypatch, name, gib)
    assert init.machine_of(None, None) == Machine(expected, 4)


@pytest.mark.parametrize(("name", "gib"), [("Tesla T4", 14.6), ("NVIDIA A100-SXM4-40GB", 39.4)])
def test_a_gpu_that_is_not_known_is_named(name: str, gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, name, gib)
    with pytest.raises(ConfigError, match=f"this machine's {name} with {gib} GiB is not known"):
        init.machine_of(None, None)
