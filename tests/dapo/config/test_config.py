from itertools import pairwise

import pytest
import yaml

from dapo.config import PATHS, ConfigError, Engine, Parallel, load, plain_yaml
from dapo.reward import soft_overlong_penalty
from dapo.rollout import group_advantages
from dapo.rollout.pending import sample_seed
from dapo.rollout.prompts import PromptStream
from tests.conftest import make_config, make_prompt

REQUIRED = "run: {dir: runs/x}\ndata: {train: t.jsonl}\npolicy: {model: m}\n"


def load_text(tmp_path, text, *overrides):
    (tmp_path / "c.yaml").write_text(text)
    return load(tmp_path / "c.yaml", list(overrides))


PAPER = {  # section 4.1 for Qwen2.5-32B; where the paper is silent, the released script
    "rollout.prompts_per_step": 512,
    "rollout.group_size": 16,
    "rollout.prompts_per_round": 1536,
    "rollout.max_rounds": 10,
    "rollout.dynamic_sampling": True,
    "rollout.temperature": 1.0,
    "rollout.max_response_length": 20480,
    "reward.soft_overlong_punishment": True,
    "reward.overlong_cache": 4096,
    "objective.normaliser": "token_mean",
    "objective.clip_low": 0.2,
    "objective.clip_high": 0.28,
    "optim.lr": 1e-6,
    "optim.warmup_steps": 20,
    "optim.prompts_per_minibatch": 32,
    "optim.weight_decay": 0.1,
    "optim.clip_grad": 1.0,
    "data.max_prompt_length": 2048,
    "data.too_long": "truncate",
    "eval.every": 5,
    "eval.samples": 32,
    "eval.temperature": 1.0,
    "eval.top_p": 0.7,
}


@pytest.mark.parametrize("key", PAPER)
def test_defaults_are_the_papers_recipe(tmp_path, key):
    section, name = key.split(".")
    assert getattr(getattr(load_text(tmp_path, REQUIRED), section), name) == PAPER[key]


def test_a_step_of_the_paper_is_16_updates_of_512_responses(tmp_path):
    config = load_text(tmp_path, REQUIRED)
    assert config.updates_per_step == 16
    assert config.optim.prompts_per_minibatch * config.rollout.group_size == 512
    # where Eq. 13 begins to punish
    assert config.rollout.max_response_length - config.reward.overlong_cache == 16384


def test_later_overrides_win_and_reach_sections_that_the_file_leaves_out(tmp_path):
    config = load_text(
        tmp_path,
        REQUIRED,
        "optim.lr=1e-3",
        "eval.samples=4",
        "optim.lr=2e-6",
        "policy.megatron.num_layers=2",
        "eval.data=null",
    )
    assert (config.optim.lr, config.eval.samples, config.policy.megatron, config.eval.data) == (
        2e-6,
        4,
        {"num_layers": 2},
        None,
    )


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.e-6", "1.0e-6", "+1e-6", "0.000001"])
def test_exponents_are_numbers_in_files_and_overrides(tmp_path, text):
    assert load_text(tmp_path, REQUIRED + f"optim: {{lr: {text}}}\n").optim.lr == 1e-6
    assert load_text(tmp_path, REQUIRED, f"optim.lr={text}").optim.lr == 1e-6
    assert (
        load_text(tmp_path, REQUIRED, f"policy.megatron.layernorm_epsilon={text}").policy.megatron[
            "layernorm_epsilon"
        ]
        == 1e-6
    )


@pytest.mark.parametrize(
    "text", ["0123", "1:30", "1_000", "0x1F", "0b1", "0o17", "12e", "1" * 200, "1" * 5000]
)
def test_what_yaml_alone_takes_for_a_number_is_none(tmp_path, text):
    for load_seed in (
        lambda: load_text(tmp_path, REQUIRED, f"run.seed={text}"),
        lambda: load_text(tmp_path, REQUIRED.replace("dir:", f"seed: {text}, dir:")),
    ):
        with pytest.raises(ConfigError, match=f"run.seed='{text[:6]}.*valid integer") as error:
            load_seed()
        assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "text", ["yes", "no", "on", "Off", "y", "0123", "1:30", "2026-11-29", "1_000", "0x1F", "="]
)
def test_text_stays_text_where_text_is_meant(tmp_path, text):
    config = load_text(tmp_path, REQUIRED, f"run.wandb_project={text}", f"run.dir={text}")
    assert (config.run.wandb_project, str(config.run.dir)) == (text, text)
    assert load_text(tmp_path, config.dump()) == config


@pytest.mark.parametrize("text", ["1e-6", "true", "null", "~", "12", "1.5", ".inf", ""])
def test_text_that_reads_as_something_else_is_quoted_in_a_dump(tmp_path, text):
    config = load_text(tmp_path, REQUIRED, f"run.wandb_project='{text}'")
    assert config.run.wandb_project == text
    assert load_text(tmp_path, config.dump()) == config


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=true",
        "run.steps=true",
        "run.steps=10.0",
        "run.steps='10'",
        "optim.lr='1e-6'",
        "optim.betas=[0.9, true]",
        "rollout.only=1",
        "rollout.only=yes",
        "rollout.only='true'",
        "run.wandb_project=7",
        "run.keep_every=false",
        "reward.function={'a:b': true}",
        "run.seed=-1",
        f"run.seed={2**70}",
        f"run.seed={2**63}",
        f"run.steps={2**70}",
        f"rollout.max_response_length={2**70}",
        "engine.urls=http://a:1",
        "data.train=5",
        "data.train={a.jsonl: true}",
        "run.dir=''",
        'run.dir="a\\0b"',
        "run.dir=true",
        "policy.model=12",
        "optim.betas=[0.9, 0.9, 0.9]",
        "data.train=[]",
        "data.train={}",
    ],
)
def test_a_value_of_another_type_or_size_is_refused_in_one_line_by_its_key(tmp_path, override):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"c\.yaml: {key}[.=]") as error:
        load_text(tmp_path, REQUIRED, override)
    assert (
        "\n" not in str(error.value) and "lambda" not in str(error.value) and "union" not in str(error.value)
    )


def test_the_largest_seed_draws(tmp_path):
    seed = load_text(tmp_path, REQUIRED, f"run.seed={2**63 - 1}").run.seed
    assert PromptStream([make_prompt(i) for i in range(3)], seed).take(3)
    assert sample_seed(seed, 1 << 62, 3) >= 0


def test_seeds_of_samples_are_those_of_earlier_versions():
    assert [sample_seed(0, 0, 0), sample_seed(1, 2, 3)] == [1445694884619442965, 6520558355739401531]


@pytest.mark.parametrize(("world", "data"), [(12, 1), (24, 2), (36, 3)])
def test_ranks_that_are_left_by_the_model_are_data_parallel(world, data):
    assert Parallel(tensor=2, pipeline=3, context=2).data(world) == data


def test_whole_numbers_are_numbers(tmp_path):
    config = load_text(
        tmp_path, REQUIRED, "rollout.temperature=1", "optim.betas=[0, 1]".replace("0,", "0.5,")
    )
    assert config.rollout.temperature == 1.0 and config.optim.betas == (0.5, 1.0)


def test_home_and_variables_in_paths_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    config = load_text(
        tmp_path,
        REQUIRED,
        "run.dir=~/runs",
        "data.train={~/a.jsonl: 1, $SCRATCH/b.jsonl: 2}",
        "policy.model=${SCRATCH}/m",
        "eval.data={aime: ~/aime.parquet}",
        "engine.python=~",  # null, not a home
    )
    assert (str(config.run.dir), str(config.policy.model)) == ("/home/me/runs", "/scratch/m")
    assert list(map(str, config.data.train)) == ["/home/me/a.jsonl", "/scratch/b.jsonl"]
    assert str(config.eval.data["aime"]) == "/home/me/aime.parquet"
    assert config.engine.python is None


@pytest.mark.parametrize("path", ["$NOWHERE/x", "a/${NOWHERE}", "~nobody-of-that-name/x"])
def test_a_home_or_variable_that_does_not_exist_is_refused(tmp_path, path):
    with pytest.raises(ConfigError, match=r"run\.dir=.*no such user or environment variable"):
        load_text(tmp_path, REQUIRED, f"run.dir={path}")


def test_a_file_weighted_twice_under_two_names_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.train.*a\.jsonl is given twice"):
        load_text(tmp_path, REQUIRED, "data.train={a.jsonl: 1, ./a.jsonl: 2}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (REQUIRED + "optim: {lr: 1}\nrun: {dir: y}\n", ["'run'", "first in line 1", "line 5"]),
        (REQUIRED + "optim:\n  lr: 1\n  weight_decay: 0\n  lr: 2\n", ["'lr'", "first in line 5", "line 7"]),
        (REQUIRED + "optim: {lr: 1, 'lr': 2}\n", ["'lr'", "first in line 4"]),
        (REQUIRED + "engine: {sglang: {tp-size: 1, tp-size: 2}}\n", ["'tp-size'", "line 4"]),
        (REQUIRED + "optim: {lr: !!float 1}\n", ["tag", "line 4"]),
        (REQUIRED + "optim: {lr: !!int x}\n", ["tag", "line 4"]),
        (REQUIRED + 'eval: {data: "\\ud800"}\n', ["surrogate", "line 4"]),
        (REQUIRED + f"engine: {{sglang: {'[' * 5000}}}\n", ["nested too deeply"]),
    ],
)
def test_a_file_that_says_two_things_is_refused_with_its_lines(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        load_text(tmp_path, text)
    assert all(word in str(error.value) for word in ["c.yaml", *words]), error.value
    assert "\n" not in str(error.value)


def test_a_key_given_twice_in_an_override_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"override 'engine\.sglang=.*'a' is given twice"):
        load_text(tmp_path, REQUIRED, "engine.sglang={a: 1, a: 2}")


def test_merged_keys_may_be_set_again(tmp_path):
    text = REQUIRED + "engine: {kind: sglang, sglang: {<<: &a {x: 1, y: 2}, x: 3}}\n"
    assert load_text(tmp_path, text).engine.sglang == {"x": 3, "y": 2}


def test_only_our_own_loader_reads_exponents_as_numbers():
    assert yaml.safe_load("1e-6") == "1e-6"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean lr?"]),
        ("rolout.group_size=8", ["rolout", "did you mean rollout?"]),
        ("rollout.group_sise=8", ["rollout.group_sise", "did you mean group_size?"]),
        ("optim.zzzzzz=8", ["optim.zzzzzz", "known:", "warmup_steps"]),
        ("rollout.group_size=many", ["rollout.group_size='many'", "integer"]),
        ("rollout.group_size=1", ["rollout.group_size=1", "greater than or equal to 2"]),
        ("optim.lr=fast", ["optim.lr='fast'", "number"]),
        ("optim.lr=-1e-6", ["optim.lr=-1e-06"]),
        ("optim.lr=.nan", ["optim.lr=nan", "finite"]),
        ("rollout.temperature=0", ["rollout.temperature=0"]),
        ("eval.top_p=1.1", ["eval.top_p=1.1"]),
        ("objective.dual_clip=1.0", ["objective.dual_clip=1.0"]),
        ("objective.clip_low=1.5", ["objective.clip_low=1.5", "less than or equal to 1"]),
        ("objective.normaliser=mean", ["objective.normaliser='mean'", "group_token_mean"]),
        ("run.dir=null", ["run.dir=None"]),
        ("rollout=8", ["rollout=8"]),
        ("rollout.group_size", ["override 'rollout.group_size'", "section.key=value"]),
        ("rollout.=8", ["override 'rollout.=8'"]),
        ("run.dir.name=x", ["override 'run.dir.name=x'", "dir is not a section"]),
        ("optim.lr=[", ["override 'optim.lr=['"]),
    ],
)
def test_a_wrong_override_is_refused_in_one_line_that_names_it(tmp_path, override, words):
    with pytest.raises(ConfigError) as error:
        load_text(tmp_path, REQUIRED, override)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.betas=[0.9]", "missing key optim.betas.1"),
        ("data.train=[a, 3]", "data.train.1=3: expected a path, in quotes if it looks like a number"),
        ("data.train={a: 0}", "data.train.a=0: input should be greater than 0"),
        ("eval.data={a: 5}", "eval.data.a=5: expected a path, in quotes if it looks like a number"),
    ],
)
def test_of_a_wrong_item_of_a_list_nothing_else_is_said(tmp_path, override, said):
    with pytest.raises(ConfigError) as error:
        load_text(tmp_path, REQUIRED, override)
    assert str(error.value).partition(".yaml: ")[2] == said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.importance_band=[5, 0.5]"], "objective.importance_band=[5.0, 0.5] is empty"),
        (["objective.importance_band=[1, 1]"], "objective.importance_band=[1.0, 1.0] is empty"),
        (["objective.importance_band=[-1, 1]"], "objective.importance_band.0=-1"),
        (
            ["objective.importance_cap=0.9"],
            "objective.importance_cap=0.9: input should be greater than or equal",
        ),
        (["objective.kind=ppo"], "objective.kind='ppo': input should be 'dapo', 'cispo' or 'gspo'"),
        (
            ["objective.kind=gspo", "objective.dual_clip=3"],
            "objective.dual_clip=3.0 with objective.kind=gspo",
        ),
        (
            ["objective.kind=cispo", "objective.dual_clip=3"],
            "objective.dual_clip=3.0 with objective.kind=cispo",
        ),
        (
            ["objective.kind=gspo", "rollout.max_staleness=1"],
            "objective.importance=tis with objective.kind=gspo: it weighs single tokens",
        ),
        (
            ["objective.kind=gspo", "objective.importance=band", "objective.importance_of=all"],
            "objective.importance=band with objective.kind=gspo: it weighs single tokens",
        ),
        (
            ["objective.importance=none", "objective.importance_of=all"],
            "objective.importance_of=all with objective.importance=none: no token is corrected",
        ),
        (
            ["policy.logits_dtype=bfloat16", "policy.dtype=float32"],
            "policy.logits_dtype=bfloat16 with policy.dtype=float32",
        ),
        (
            ["run.deterministic=true", "rollout.max_staleness=1"],
            "run.deterministic=true with rollout.max_staleness=1: which weights write a token",
        ),
    ],
)
def test_an_objective_that_means_nothing_is_refused_in_one_line(tmp_path, overrides, said):
    with pytest.raises(ConfigError) as error:
        load_text(tmp_path, REQUIRED, *overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.kind=gspo", "objective.importance=sequence_mask", "rollout.max_staleness=1"],
        ["objective.kind=gspo", "objective.importance=none", "rollout.max_staleness=1"],
        ["objective.kind=gspo"],  # no token is stale
        ["objective.kind=cispo", "objective.importance=band", "objective.importance_of=all"],
    ],
)
def test_other_combinations_are_allowed(tmp_path, overrides):
    load_text(tmp_path, REQUIRED, *overrides)


def test_gspo_with_the_clips_of_tokens_is_warned_of(tmp_path):
    [warning] = load_text(tmp_path, REQUIRED, "objective.kind=gspo").warnings()
    assert "clip_low=0.2, clip_high=0.28" in warning and "0.0003 and 0.0004" in warning
    narrow = "objective.clip_low=0.0003", "objective.clip_high=0.0004"
    assert not load_text(tmp_path, REQUIRED, "objective.kind=gspo", *narrow).warnings()
    assert load_text(tmp_path, REQUIRED, "objective.kind=gspo", narrow[1]).warnings()


def test_a_recipe_is_a_file_of_overrides_and_later_wins(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("objective: {clip_high: 0.2}\nengine: {kind: sglang, sglang: {a: 1}}\n")
    text = REQUIRED + "engine: {kind: sglang, sglang: {b: 2}}\nobjective: {clip_low: 0.1}\n"
    config = load_text(tmp_path, text, "objective.clip_high=0.3", str(recipe), "engine.sglang.b=3")
    assert (config.objective.clip_low, config.objective.clip_high) == (0.1, 0.2)
    assert config.engine.sglang == {"a": 1, "b": 3}
    assert load_text(tmp_path, REQUIRED, str(recipe), "objective.clip_high=0.3").objective.clip_high == 0.3


def test_a_recipes_mapping_is_an_options_value_but_for_other_programs_options(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("reward: {function: {b: 1.0}}\npolicy: {megatron: {x: 1}}\n")
    text = REQUIRED.replace("{model: m}", "{model: m, megatron: &a {y: 2}}")
    text += "reward: {function: {a: 1.0}}\nengine: {kind: sglang, sglang: *a}\n"
    config = load_text(tmp_path, text, str(recipe))
    assert config.reward.function == {"b": 1.0}
    assert config.policy.megatron == {"x": 1, "y": 2} and config.engine.sglang == {"y": 2}


def test_importance_that_corrects_nothing_is_warned_of(tmp_path):
    [warning] = load_text(tmp_path, REQUIRED, "objective.importance=band").warnings()
    assert "objective.importance=band with rollout.max_staleness=0 corrects nothing" in warning
    for other in ("rollout.max_staleness=1", "objective.importance_of=all", "objective.importance=tis"):
        assert not load_text(tmp_path, REQUIRED, "objective.importance=band", other).warnings()


def test_arguments_of_servers_that_someone_else_starts_are_refused(tmp_path):
    options = "engine.kind=sglang", "engine.urls=[http://a:1]", "engine.sglang={tp-size: 2}"
    with pytest.raises(
        ConfigError, match=r"engine\.sglang=\{'tp-size': 2\} is for servers that the run starts"
    ):
        load_text(tmp_path, REQUIRED, *options)


def test_a_recipe_that_is_wrong_is_named(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("objective: {clip_hi: 0.2}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml with .*r\.yaml: unknown key objective\.clip_hi: did you"):
        load_text(tmp_path, REQUIRED, str(recipe))
    with pytest.raises(ConfigError, match=r"config nowhere\.yaml: No such file"):
        load_text(tmp_path, REQUIRED, "nowhere.yaml")
    for text in ("- a\n", "[]\n", "0\n"):
        recipe.write_text(text)
        with pytest.raises(ConfigError, match=r"config .*r\.yaml: expected sections"):
            load_text(tmp_path, REQUIRED, str(recipe))
    with pytest.raises(ConfigError, match=r"override 'grpo': expected section.key=value, or a file"):
        load_text(tmp_path, REQUIRED, "grpo")


def test_an_error_is_short_however_large_the_value_is(tmp_path):
    names = "abcdefghijkl"
    levels = [f"&{name} [{', '.join(8 * ['*' + before])}]" for before, name in pairwise(names)]
    with pytest.raises(ConfigError) as error:
        load_text(tmp_path, f"run: [&a [x, x], {', '.join(levels)}]")
    assert len(str(error.value)) < 2000
    with pytest.raises(ConfigError) as error:
        load_text(tmp_path, REQUIRED, "run.steps=" + "[" * 5000)
    assert len(str(error.value)) < 1000


def test_every_mistake_of_a_file_is_told_at_once(tmp_path):
    with pytest.raises(
        ConfigError, match=r"c\.yaml: .*missing key run\.dir.*missing key policy.*unknown key lr"
    ):
        load_text(tmp_path, "run: {}\ndata: {train: t}\nlr: 1\n")


@pytest.mark.parametrize("text", ["- a\n", "just text", "run: [", "run: {dir: x}}"])
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path, text):
    with pytest.raises(ConfigError, match=r"c\.yaml: (expected sections|not YAML)"):
        load_text(tmp_path, text)


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"run: {dir: \xff}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load(tmp_path / "c.yaml")


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.prompts_per_step=500"], ["prompts_per_step=500", "prompts_per_minibatch=32"]),
        (
            ["policy.tokens_per_microbatch=22527"],
            ["tokens_per_microbatch=22527", "max_response_length=20480", "= 22528 tokens"],
        ),
        (["reward.overlong_cache=20480"], ["overlong_cache=20480", "max_response_length=20480"]),
        (["run.keep_every=15"], ["keep_every=15", "save_every=10"]),
        (
            ["reward.answer_format=boxed", "reward.function=a:b"],
            ["reward.answer_format=boxed is for dapo.reward:is_correct, which is not in reward.function=a:b"],
        ),
    ],
)
def test_contradicting_options_are_refused_with_their_values(tmp_path, overrides, words):
    with pytest.raises(ConfigError) as error:
        load_text(tmp_path, REQUIRED, *overrides)
    assert all(word in str(error.value) for word in words), error.value


OF_SERVERS = {
    "urls": ["http://a:1"],
    "servers": 2,
    "python": "/opt/bin/python",
    "sglang": {"tp-size": 2},
    "weight_sync": "disk",
    "bucket_mib": 64,
    "verify_weights": True,
}


@pytest.mark.parametrize("option", OF_SERVERS)
def test_an_option_of_servers_is_refused_without_servers(tmp_path, option):
    value = OF_SERVERS[option]
    override = f"engine.{option}={plain_yaml.inline(value)}"
    with pytest.raises(ConfigError) as error:
        load_text(tmp_path, REQUIRED, override)
    assert str(error.value) == (
        f"engine.{option}={value!r} is for servers, and engine.kind=embedded has none: "
        "set engine.kind=sglang, or leave it out"
    )
    load_text(tmp_path, REQUIRED, override, "engine.kind=sglang")


def test_the_options_of_servers_at_their_defaults_are_taken_without_servers(tmp_path):
    values = {name: field.default for name, field in Engine.model_fields.items() if name in OF_SERVERS}
    assert load_text(tmp_path, REQUIRED, f"engine={plain_yaml.inline(values)}").engine == Engine()


@pytest.mark.parametrize(
    "overrides",
    [
        ["policy.tokens_per_microbatch=22528"],
        ["reward.overlong_cache=99999", "reward.soft_overlong_punishment=false"],
    ],
)
def test_options_that_just_agree_are_taken(tmp_path, overrides):
    load_text(tmp_path, REQUIRED, *overrides)


def test_what_is_dumped_loads_to_an_equal_config(tmp_path):
    config = make_config(
        tmp_path,
        "optim.lr=3e-7",
        "objective.dual_clip=10",
        "policy.megatron={num_layers: 2, eps: 1e-6}",
        "eval.data=held.jsonl",
    )
    assert load_text(tmp_path, config.dump()) == config


def test_a_config_cannot_be_changed_once_loaded(tmp_path):
    with pytest.raises(ValueError, match="frozen"):
        make_config(tmp_path).optim.lr = 1.0


def test_soft_punishment_without_dynamic_sampling_is_warned_of(tmp_path):
    off, on = "rollout.dynamic_sampling=false", "reward.soft_overlong_punishment=true"
    [warning] = make_config(tmp_path, off, on).warnings()
    assert "soft_overlong_punishment without rollout.dynamic_sampling" in warning
    assert make_config(tmp_path, on).warnings() == []
    assert make_config(tmp_path, off, "reward.soft_overlong_punishment=false").warnings() == []


def test_why_a_hair_of_length_penalty_becomes_a_full_size_advantage_in_an_all_correct_group():
    lengths = [30, 30, 30, 49]  # one response reaches one token into the punished range of 48 … 64
    rewards = [1.0 + soft_overlong_penalty(length, 64, 16) for length in lengths]
    assert max(rewards) - min(rewards) == 1 / 16
    assert group_advantages(rewards)[3] == pytest.approx(-1.5, abs=1e-3), (
        "as large as that of the one wrong answer among four"
    )
    assert group_advantages([1.0, 1.0, 1.0, -1.0])[3] == pytest.approx(-1.5, abs=1e-3)


def test_an_override_that_is_not_valid_is_refused_by_changed_as_by_load(tmp_path):
    made = make_config(tmp_path)
    assert made.changed(["optim.lr=1e-3"]).optim.lr == 1e-3
    with pytest.raises(ConfigError, match=r"config: unknown key optim\.lrr: did you mean lr\?"):
        made.changed(["optim.lrr=1"])
    with pytest.raises(ConfigError, match=r"config: optim\.lr='fast'"):
        made.changed(["optim.lr=fast"])


# secrets

SECRET = "hunter2"


@pytest.mark.parametrize(
    "url", [f"http://me:{SECRET}@host/score", f"HTTPS://{SECRET}@host", f"http://host/score?token={SECRET}",
            f"http://me:a/{SECRET}@host/", f"http://host/score#{SECRET}", f"http://me:x {SECRET}@host/"],
)  # fmt: skip
@pytest.mark.parametrize(
    "override",
    ["reward.function='{}'", "reward.function={{'{}': 1.0}}", "reward.shadow=['{}']", "engine.urls=['{}']"],
)
def test_a_url_with_a_secret_is_refused_and_the_secret_is_not_shown(tmp_path, url, override):
    with pytest.raises(ConfigError, match=r"DAPO_REWARD_KEY or DAPO_ENGINE_KEY") as caught:
        make_config(tmp_path, override.format(url))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    ["reward.shadow='{}'", "reward.function=['{}']", "reward.function={{'{}': one}}", "reward.fnction='{}'",
     "reward.function={{'{}'", "engine.urls='{}'", "engine.urls={{'{}': 1}}", "{}"],
)  # fmt: skip
@pytest.mark.parametrize("url", [f"http://me:{SECRET}@host/score", f"http://host/score?token={SECRET}"])
def test_no_error_of_a_config_shows_the_secret_of_a_url(tmp_path, url, override):
    with pytest.raises(ConfigError) as caught:
        make_config(tmp_path, override.format(url))
    assert SECRET not in str(caught.value)


def test_urls_without_a_secret_are_kept_as_they_are(tmp_path):
    servers = ["engine.kind=sglang", "engine.urls=['https://[::1]:2/']"]
    config = make_config(tmp_path, "reward.function=http://host:1/score", *servers)
    assert (config.reward.function, config.engine.urls) == ("http://host:1/score", ["https://[::1]:2/"])


def test_rounds_that_can_just_hold_a_steps_prompts_are_enough(tmp_path):
    sizes = ["rollout.prompts_per_step=12", "rollout.prompts_per_round=4"]
    assert make_config(tmp_path, *sizes, "rollout.max_rounds=3").rollout.max_rounds == 3
    with pytest.raises(ConfigError, match=r"max_rounds=2"):
        make_config(tmp_path, *sizes, "rollout.max_rounds=2")


def test_ranks_have_all_options_in_common_but_for_paths(tmp_path):
    def common(*overrides):
        return load_text(tmp_path, REQUIRED, *overrides).in_common()

    before = common()
    assert before["optim.lr"] == "1e-06" and before["optim.betas"] == "[0.9, 0.999]"
    paths = ["run.dir=/b", "data.train=/b", "policy.model=/b", "eval.data=/b", "rollout.replay=/b"]
    assert common(*paths, "engine.kind=sglang", "engine.python=/b") == before | {"engine.kind": '"sglang"'}
    config = load_text(tmp_path, REQUIRED)
    options = {f"{section}.{key}" for section, values in config for key in type(values).model_fields}
    assert set(before) == options - PATHS and options > PATHS


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.forecast_floor=0"], "rollout.forecast_floor=0: .* would never come back"),
        (["rollout.first_wave=16"], "rollout.first_wave=16 leaves nothing of rollout.group_size=16"),
        (
            ["rollout.first_wave=2", "rollout.dynamic_sampling=false"],
            "rollout.first_wave=2 without rollout.dyn",
        ),
        (
            ["rollout.forecast=skip", "rollout.dynamic_sampling=false"],
            "rollout.forecast=skip without rollout.d",
        ),
    ],
)
def test_a_forecast_that_has_nothing_to_save_is_refused(tmp_path, overrides, said):
    with pytest.raises(ConfigError, match=said):
        make_config(tmp_path, "rollout.group_size=16", *overrides)
