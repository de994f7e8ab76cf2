"""tools/hf_to_megatron.py, megatron_to_hf.py and check_checkpoint.py: what they refuse, and that nothing
half-written is left.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo.model.families import read_shape
from dapo.model.names import table
from dapo.policy import chunks, weight_files, write_weights
from dapo.policy.weight_files import open_weights

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import check_checkpoint
import hf_to_megatron
import megatron_to_hf

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples/arithmetic/base"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "megatron"
    assert hf_to_megatron.main([str(BASE), str(target), "--shard-size", "100KiB"]) == 0
    return target


@pytest.fixture
def megatron(converted: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(converted, tmp_path / "megatron")


def refusal(tool, *arguments: str | Path, capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """What the tool says when it refuses: one line."""
    capsys.readouterr()
    assert tool.main([str(argument) for argument in arguments]) == status
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def changed_base(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the base policy with `change` made to its tensors."""
    shutil.copytree(BASE, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_dtype_shards_tokenizer_and_generation_config_are_carried_over(
    converted: Path, tmp_path: Path
) -> None:
    assert (
        megatron_to_hf.main(
            [str(converted), str(tmp_path / "hf"), "--dtype", "bfloat16", "--shard-size", "50KiB"]
        )
        == 0
    )
    paths = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(paths) > 1 and max(path.stat().st_size for path in paths) < 50 * 1024 + 4096
    found = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    wanted = {name: tensor.bfloat16() for name, tensor in load_file(BASE / "model.safetensors").items()}
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == wanted.keys() and index["metadata"]["total_size"] == sum(
        t.nbytes for t in found.values()
    )
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (BASE / name).read_bytes()


def test_a_target_that_exists_is_not_overwritten(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    for tool, source in ((hf_to_megatron, BASE), (megatron_to_hf, converted)):
        assert "mine exists and is not overwritten" in refusal(tool, source, tmp_path / "mine", capsys=capsys)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_too_little_disk_is_noticed_before_anything_is_written(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    for tool, source in ((hf_to_megatron, BASE), (megatron_to_hf, converted)):
        assert "GiB are needed" in refusal(tool, source, tmp_path / "out", capsys=capsys, status=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 40}, "vocab_size=25 there, 40 here"),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "rope_theta=10000.0 there, 500000.0 here",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2}},
            "rope_scaling=None there, {'rope_type': 'linear', ",
        ),
        ({"model_type": "llama"}, "model_type='qwen2' there, 'llama' here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_what_differs(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], said: str
) -> None:
    other = shutil.copytree(BASE, tmp_path / "other")
    edit_json(other / "config.json", **changes)
    assert said in refusal(megatron_to_hf, megatron, tmp_path / "out", "--model", other, capsys=capsys)
    shutil.copy(other / "config.json", megatron)  # the checkpoint says otherwise
    assert said in refusal(megatron_to_hf, megatron, tmp_path / "out", capsys=capsys)
    assert said in refusal(check_checkpoint, megatron, other, capsys=capsys)
    assert not list(tmp_path.glob("*out*"))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_bit, "is not what was written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2000]), "cut short"),
        (lambda path: path.unlink(), "missing"),
    ],
)
def test_a_damaged_checkpoint_is_neither_converted_nor_compared_and_the_file_is_named(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, said: str
) -> None:
    damage(megatron / "policy" / "__0_1.distcp")
    line = refusal(megatron_to_hf, megatron, tmp_path / "out", capsys=capsys)
    assert said in line and "__0_1.distcp" in line
    line = refusal(check_checkpoint, BASE, megatron, capsys=capsys)
    assert said in line and "__0_1.distcp" in line
    assert not list(tmp_path.glob("*out*")), "a part of it was left"


def test_a_damaged_table_of_contents_is_not_even_opened(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_a_bit(megatron / "policy" / ".metadata")
    assert "policy/.metadata is not what was written" in refusal(
        megatron_to_hf, megatron, tmp_path / "out", capsys=capsys
    )


def own_head(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The embedding but for one value."""
    head = tensors["model.embed_tokens.weight"].clone()
    head[7, 3] += 1e-3
    return head


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors["model.norm.weight"].fill_(torch.nan), "model.norm.weight holds NaN"),
        (
            lambda tensors: tensors["model.norm.weight"][3:4].fill_(-torch.inf),
            "model.norm.weight holds NaN or infinite",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}),
            "model.norm.weight has shape (65,)",
        ),
        (lambda tensors: tensors.pop("model.norm.weight"), "1 tensors are missing, first model.norm.weight"),
        (
            lambda tensors: tensors.update({"model.surprise": torch.ones(2)}),
            "1 tensors have no place in this architecture, first model.surprise",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": own_head(tensors)}),
            "lm_head.weight is not model.embed_tokens.weight, though config.json says tie_word",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": own_head(tensors)[:24]}),
            "lm_head.weight is not model.embed_tokens.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_neither_converted_nor_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change, said: str
) -> None:
    source = changed_base(tmp_path / "source", change)
    assert said in refusal(hf_to_megatron, source, tmp_path / "out", capsys=capsys)
    assert not list(tmp_path.glob("*out*")), "a part of it was left"
    for models in ((source, BASE), (BASE, source)):
        assert said in refusal(check_checkpoint, *models, capsys=capsys)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_tensors_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype
) -> None:
    quantized = {"model.norm.weight": torch.ones(64).to(dtype)}
    source = changed_base(tmp_path / "source", lambda tensors: tensors.update(quantized))
    said = f"tensor model.norm.weight is {str(dtype)[6:]}; expected float32, bfloat16, float16, float64"
    line = refusal(hf_to_megatron, source, tmp_path / "out", "--dtype", "float32", capsys=capsys)
    assert said in line
    assert said in refusal(check_checkpoint, source, BASE, capsys=capsys)


def test_a_copy_of_the_tied_embedding_and_tensors_that_config_json_implies_are_left_out(
    tmp_path: Path,
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    source = changed_base(
        tmp_path / "source",
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), name: torch.ones(8)}
        ),
    )
    assert hf_to_megatron.main([str(source), str(tmp_path / "megatron")]) == 0
    assert check_checkpoint.main([str(source), str(tmp_path / "megatron")]) == 0
    assert megatron_to_hf.main([str(tmp_path / "megatron"), str(tmp_path / "hf")]) == 0
    assert (
        load_file(tmp_path / "hf" / "model.safetensors").keys()
        == load_file(BASE / "model.safetensors").keys()
    )


def changed_megatron(directory: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    """What the base policy is as a Megatron directory, but for its tensors, which are as `change` has them;
    None: left out.
    """
    write = chunks.Writer.write

    def write_changed(self: chunks.Writer, name: str, tensor: torch.Tensor, *place: Any) -> None:
        if (changed := change(name, tensor)) is not None:
            write(self, name, changed, *place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks.Writer, "write", write_changed)
        assert hf_to_megatron.main([str(BASE), str(directory)]) == 0
    return directory


NORM = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, tensor: tensor * torch.nan if name == NORM else tensor, "model.norm.weight holds NaN"),
        (
            lambda name, tensor: torch.ones(65) if name == NORM else tensor,
            f"{NORM} has shape (65,), the model's config.json means (64,)",
        ),
        (lambda name, tensor: None if name == NORM else tensor, f"1 tensors are missing, first {NORM}"),
        (
            lambda name, tensor: tensor[:20] if "embedding" in name else tensor,
            "embeddings.weight has shape (20, 64), the model's config",
        ),
    ],
)
def test_megatron_weights_that_do_not_fit_are_neither_converted_nor_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change, said: str
) -> None:
    source = changed_megatron(tmp_path / "megatron", change)
    assert said in refusal(megatron_to_hf, source, tmp_path / "out", capsys=capsys)
    assert not list(tmp_path.glob("*out*")), "a part of it was left"
    for models in ((source, BASE), (BASE, source)):
        assert said in refusal(check_checkpoint, *models, capsys=capsys)


@pytest.mark.parametrize("value", [65520.0, -1e6])  # from 65,520 on, float16 rounds to infinity
def test_a_value_beyond_the_range_of_the_dtype_is_not_written_as_infinite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = changed_base(tmp_path / "source", lambda tensors: tensors[name][5, 7:8].fill_(value))
    assert hf_to_megatron.main([str(source), str(tmp_path / "megatron")]) == 0
    for tool, whence in ((hf_to_megatron, source), (megatron_to_hf, tmp_path / "megatron")):
        line = refusal(tool, whence, tmp_path / "out", "--dtype", "float16", capsys=capsys)
        assert f"tensor {name} holds {value:.9g}, but float16 ends at 65504" in line
    assert not list(tmp_path.glob("*out*")), "a part of it was left"


def test_the_largest_value_of_the_dtype_is_written(tmp_path: Path) -> None:
    source = changed_base(
        tmp_path / "source", lambda tensors: tensors["model.norm.weight"][3:4].fill_(-65504.0)
    )
    assert hf_to_megatron.main([str(source), str(tmp_path / "megatron"), "--dtype", "float16"]) == 0


def narrow_all_but_the_norms(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items() if "norm" not in name})


def test_mixed_dtypes_are_converted_only_where_one_is_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = changed_base(tmp_path / "source", narrow_all_but_the_norms)
    line = refusal(hf_to_megatron, source, tmp_path / "out", capsys=capsys)
    first, other = "model.embed_tokens.weight is bfloat16", "model.layers.0.input_layernorm.weight is float32"
    assert f"tensor {first}, {other}: choose one for all of them with --dtype" in line
    assert not list(tmp_path.glob("*out*")), "a part of it was left"
    assert hf_to_megatron.main([str(source), str(tmp_path / "megatron"), "--dtype", "float32"]) == 0
    assert check_checkpoint.main([str(source), str(tmp_path / "megatron")]) == 0


def test_mixed_dtypes_of_a_megatron_checkpoint_are_converted_only_where_one_is_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = changed_megatron(
        tmp_path / "megatron", lambda name, tensor: tensor.bfloat16() if name == NORM else tensor
    )
    line = refusal(megatron_to_hf, source, tmp_path / "out", capsys=capsys)
    assert (
        f"tensor {NORM} is bfloat16, decoder.layers.mlp.linear_fc1.layer_norm_weight is float32: choose one"
        in line
    )
    assert megatron_to_hf.main([str(source), str(tmp_path / "out"), "--dtype", "float32"]) == 0


def test_mixed_dtypes_are_read_as_they_are_for_a_run_to_start_from(tmp_path: Path) -> None:
    source, shape = changed_base(tmp_path / "source", narrow_all_but_the_norms), read_shape(BASE)
    stored = load_file(source / "model.safetensors")
    read = {
        name: t
        for e in table(shape, is_fused=True)
        for name, t in zip(e.hf, open_weights(source, shape).read(e), strict=True)
    }
    assert all(
        read[name].dtype == stored[name].dtype and torch.equal(read[name], stored[name]) for name in read
    )


def test_a_dtype_that_is_not_written_wants_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = changed_base(
        tmp_path / "source", lambda tensors: tensors.update({name: t.double() for name, t in tensors.items()})
    )
    line = refusal(hf_to_megatron, source, tmp_path / "out", capsys=capsys)
    assert "the tensors are F64: choose float32, bfloat16, float16 with --dtype" in line


def test_a_missing_shard_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, second = shutil.copytree(BASE, tmp_path / "source"), "model-00002-of-00002.safetensors"
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    names = load_file(BASE / "model.safetensors")
    places = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {"model.norm.weight": second}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for tool, arguments in ((hf_to_megatron, (source, tmp_path / "out")), (check_checkpoint, (source, BASE))):
        assert f"{second} is missing, one of 2 files that" in refusal(tool, *arguments, capsys=capsys)
    assert not list(tmp_path.glob("*out*"))


def test_a_directory_that_holds_no_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no config.json" in refusal(megatron_to_hf, tmp_path, tmp_path / "out", capsys=capsys)
    assert "has no config.json" in refusal(check_checkpoint, tmp_path, BASE, capsys=capsys)
    (tmp_path / "policy").mkdir()
    assert "no Megatron checkpoint" in refusal(
        megatron_to_hf, tmp_path, tmp_path / "out", "--model", BASE, capsys=capsys
    )


@pytest.mark.parametrize("tool", [hf_to_megatron, megatron_to_hf])
def test_a_conversion_that_is_interrupted_leaves_nothing(
    converted: Path, tmp_path: Path, monkeypatch, tool
) -> None:
    reads, number, checked = [], itertools.count(1), weight_files._checked

    def interrupted(*arguments):
        reads.append(list(tmp_path.rglob("*.distcp")) + list(tmp_path.rglob("*.safetensors")))
        if next(number) == 12:
            raise KeyboardInterrupt
        return checked(*arguments)

    monkeypatch.setattr(weight_files, "_checked", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tool.main([str(BASE if tool is hf_to_megatron else converted), str(tmp_path / "out")])
    assert reads[-1], "nothing had been written yet, so nothing was tested"
    assert list(tmp_path.iterdir()) == []


def test_when_one_thread_fails_the_others_stop() -> None:
    items = iter(range(1000))

    def work(part):
        for item in part:
            if item < 0:
                raise KeyboardInterrupt
            time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        write_weights._in_threads(work, [items, iter([-1])])
    assert next(items, 1000) < 1000


def test_a_conversion_that_is_killed_leaves_no_target_and_the_next_one_succeeds(tmp_path: Path) -> None:
    slow = "import sys, time; sys.path.insert(0, 'tools'); "
    slow += "from dapo.policy import weight_files; import hf_to_megatron; checked = weight_files._checked; "
    slow += "weight_files._checked = lambda *a: time.sleep(0.5) or checked(*a); "
    slow += f"hf_to_megatron.main([{str(BASE)!r}, {str(tmp_path / 'out')!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", slow], cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("*.distcp")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert hf_to_megatron.main([str(BASE), str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_check_checkpoint_distinguishes_equal_from_different(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("12+34=46 7+8=15")
    assert check_checkpoint.main([str(converted), str(BASE), "--text", str(tmp_path / "text")]) == 0
    assert "log-probs of 14 tokens" in capsys.readouterr().out
    other = changed_base(
        tmp_path / "other", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][5, 7].add_(0.25)
    )
    assert check_checkpoint.main([str(converted), str(other)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == "model.layers.1.mlp.up_proj.weight: differs by up to 0.25"
    assert second == "tensors: the largest difference is 0.25"
    assert check_checkpoint.main([str(converted), str(other), "--tolerance", "0.3"]) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rms_norm_eps": 1e-5}, "norm_eps: 1e-06 against 1e-05"),
        ({"vocab_size": 30}, "vocab_size: 25 against 30"),
        ({"model_type": "llama"}, "model_type: 'qwen2' against 'llama'"),
    ],
)
def test_models_of_unlike_architectures_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes, said: str
) -> None:
    other = shutil.copytree(BASE, tmp_path / "other")
    edit_json(other / "config.json", **changes)
    assert f"the architectures differ: {said}" in refusal(check_checkpoint, BASE, other, capsys=capsys)


def swap_two_digits(model: Path) -> None:
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["3"], vocab["4"] = vocab["4"], vocab["3"]
    path.write_text(json.dumps(tokenizer))


def shrink_vocabulary(model: Path) -> None:
    """The tokenizer keeps its 25 tokens, the model has 10 of them."""
    edit_json(model / "config.json", vocab_size=10)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:10].clone()
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        (None, (), "text cannot be read: [Errno 2] No such file"),
        (b"1\xff2", (), "text cannot be read: 'utf-8' codec"),
        (b"", (), "text has too few tokens, 0"),
        (b"7", (), "text has too few tokens, 1"),
        (b"12+34=46", (swap_two_digits,), "the tokenizers differ: --text"),
        (b"12+34=46", (swap_two_digits,), "is 8 tokens to one, 8 to the other, unlike from 3 on"),
        (
            b"12+34=46",
            (lambda model: (model / "tokenizer.json").unlink(),),
            "other: no usable tokenizer there",
        ),
        (
            b"12+34=46",
            (lambda model: [path.unlink() for path in model.glob("tokenizer*")],),
            "other: no usable tokenizer there",
        ),
        (
            b"12+34=46",
            (lambda model: (model / "tokenizer.json").write_text("{}"),),
            "other: no usable tokenizer there",
        ),
        (
            b"12+34=46",
            (shrink_vocabulary, shrink_vocabulary),
            "text has token 14, the models have a vocabulary of 10",
        ),
    ],
)
def test_a_text_that_is_not_the_same_tokens_to_both_models_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes | None, changes, said: str
) -> None:
    models = [shutil.copytree(BASE, tmp_path / name) for name in ("other", "one")]
    for model, change in zip(models, changes, strict=False):
        change(model)
    if text is not None:
        (tmp_path / "text").write_bytes(text)
    assert said in refusal(check_checkpoint, *models, "--text", tmp_path / "text", capsys=capsys)


@pytest.mark.parametrize("run", ["runs/x", "{home}/project/runs/x"])
def test_the_model_of_a_run_is_found_from_another_directory(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """policy.model is relative to where the run was started, or, if run.dir does not show where, to here."""
    folder, checkpoint = tmp_path / "project/runs/x", tmp_path / "project/runs/x/checkpoints/step-000001"
    checkpoint.mkdir(parents=True)
    shutil.copytree(BASE, tmp_path / "project/models/base")
    named = run.format(home=tmp_path)
    (folder / "config.yaml").write_text(
        f"{{run: {{dir: {named}}}, data: {{train: t}}, policy: {{model: models/base}}}}"
    )
    for place in (tmp_path / "project", folder, tmp_path):
        monkeypatch.chdir(place)
        if run == "runs/x" or place == tmp_path / "project":
            assert hf_to_megatron.model_of(checkpoint).resolve() == tmp_path / "project/models/base"
        else:
            said = refusal(megatron_to_hf, checkpoint, tmp_path / "out", capsys=capsys)
            assert "policy.model=models/base" in said and "--model" in said
