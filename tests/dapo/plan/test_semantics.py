import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dapo import config
from dapo.plan import semantics
from tests.conftest import make_config

ROOT = Path(__file__).parents[3]


def defaults(tmp_path: Path, **changed):
    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump(
            {"run": {"dir": "r"}, "data": {"train": "t.jsonl"}, "policy": {"model": "m"}} | changed
        )
    )
    return config.load(path)


def names(lines: list[str]) -> list[str]:
    return [line.partition(":")[0] for line in lines]


def test_the_defaults_depart_from_the_paper_where_the_released_code_does_and_in_overlong_filtering(tmp_path):
    assert names(semantics.diff(defaults(tmp_path), "paper")) == [
        "objective.normaliser",
        "objective.overlong_filtering",
        "unit of a step",
    ]


def test_the_defaults_depart_from_verl_in_what_is_documented(tmp_path):
    assert names(semantics.diff(defaults(tmp_path), "verl")) == [
        "objective.dual_clip",
        "surplus prompts",
        "rollout.at_cap",
        "copies of a prompt",
        "reward.function",
        "optim.warmup_steps",
        "policy.logits_dtype",
    ]


def test_every_option_that_changes_the_algorithm_is_a_choice(tmp_path):
    """Each option of these sections is a choice by its name, or stands in the name of one, or is named here
    as changing no result.
    """
    # "weights of data.train" names an option, too
    found = [choice.name for choice in semantics.choices(defaults(tmp_path))]
    named = {word for name in found for word in re.findall(r"[\w.]+", name)}
    silent = {
        "rollout.max_empty_steps",
        "rollout.turn_seconds",
        "rollout.dump_share",
        "rollout.only",
        "rollout.replay",
        "eval.data",
        "eval.every",
    }
    silent |= {
        "reward.shadow",
        "reward.workers",
        "reward.memory_limit",
        "reward.time_limit",
        "reward.soft_overlong_punishment",
        "reward.overlong_cache",
    }
    for section in ("rollout", "reward", "objective", "optim", "eval"):
        for option in type(getattr(defaults(tmp_path), section)).model_fields:
            assert f"{section}.{option}" in named or f"{section}.{option}" in silent, f"{section}.{option}"


PUBLISHED = {  # the options' values in the paper and in the released code
    "objective.kind": ("dapo", "dapo"),
    "objective.advantage": ("group_std", "group_std"),
    "objective.normaliser": ("group_token_mean", "token_mean"),
    "objective.clip_low": (0.2, 0.2),
    "objective.clip_high": (0.28, 0.28),
    "objective.dual_clip": (None, 10.0),
    "objective.overlong_filtering": (True, False),
    "rollout.dynamic_sampling": (True, True),
    "rollout.max_staleness": ("unsaid", 0),
    "rollout.at_cap": ("unsaid", "stop"),
    "rollout.prompts_per_step": (512, 512),
    "rollout.prompts_per_round": ("unsaid", 1536),
    "rollout.max_rounds": ("unsaid", 10),
    "rollout.group_size": (16, 16),
    "rollout.temperature": (1.0, 1.0),
    "rollout.max_response_length": (20480, 20480),
    "rollout.forecast": ("off", "off"),
    "rollout.forecast_floor": ("unsaid", "unsaid"),
    "rollout.forecast_sharpness": ("unsaid", "unsaid"),
    "rollout.first_wave": (0, 0),
    "rollout.stop_below": ("unsaid", "unsaid"),
    "rollout.drop_above": (None, None),
    "rollout.max_turns": ("unsaid", "unsaid"),
    "data.max_prompt_length": ("unsaid", 2048),
    "data.too_long": ("unsaid", "truncate"),
    "data.template_arguments": ("unsaid", "unsaid"),
    "reward.correct_above": ("unsaid", "unsaid"),
    "reward.answer_format": ("unsaid", "answer_line"),
    "reward.truncated_is_wrong": ("unsaid", False),
    "optim.lr": (1e-6, 1e-6),
    "optim.warmup_steps": (20, 10),
    "optim.prompts_per_minibatch": (32, 32),
    "optim.weight_decay": ("unsaid", 0.1),
    "optim.clip_grad": ("unsaid", 1.0),
    "optim.betas": ("unsaid", [0.9, 0.999]),
    "eval.samples": (32, 32),
    "eval.temperature": (1.0, 1.0),
    "eval.top_p": (0.7, 0.7),
    "policy.logits_dtype": ("unsaid", "bfloat16"),
    "policy.routing_replay": ("unsaid", "unsaid"),
}


FIXED = {  # the same of choices that the code has fixed, or that are made of several options
    "the log-ratio is clamped to": ("unsaid", 20.0),
    "KL to a reference": ("none", "none"),
    "advantage: ddof of the std": ("unsaid", 1),
    "advantage: added to the std": ("unsaid", 1e-6),
    "old log-probs": ("unsaid", "recomputed by the policy"),
    "groups are filtered on": ("correctness", "correctness"),
    "groups are admitted": ("unsaid", "in asking order"),
    "surplus prompts": ("unsaid", "dropped"),
    "method": ("unsaid", "unsaid"),
    "objective.importance and objective.importance_of": ("unsaid", "none"),
    "objective.importance_cap": ("unsaid", "none"),
    "objective.importance_band": ("unsaid", "none"),
    "the engine's logits (engine.sglang.enable-fp32-lm-head)": ("unsaid", "as policy.dtype"),
    "copies of a prompt": ("unsaid", "kept"),
    "reward: right, wrong": ("+1, −1", "+1, −1"),
    "reward.function": ("unsaid", "the last 300 characters, compared as text"),
    "soft overlong punishment (tokens of L_cache, 0: none)": (4096, 4096),
    "soft overlong punishment is at least": (-1.0, "unsaid"),
    "unit of a step": ("update", "rollout step"),
    "run.seed": ("unsaid", "unsaid"),
    "run.deterministic": ("unsaid", "unsaid"),
    "weights of data.train": ("none", "none"),
    "weights of reward.function": ("none", "none"),
    "rollout.environment": ("none", "none"),
    "rollout.tools": ("none", "none"),
    "rollout.replay": ("none", "none"),
    "policy.dtype": ("unsaid", "bfloat16"),
    "policy.megatron": ("unsaid", "unsaid"),
    "eval.data": ("unsaid", "unsaid"),
}


def test_the_published_values_of_other_choices_are_pinned_too(tmp_path):
    found = {c.name: (c.paper, c.verl) for c in semantics.choices(defaults(tmp_path))}
    assert {name: found[name] for name in found.keys() - PUBLISHED.keys()} == FIXED


@pytest.mark.parametrize(
    ("changed", "departs", "agrees"),
    [
        ({"objective": {"dual_clip": 10.0}}, "paper", "verl"),
        ({"objective": {"overlong_filtering": True}}, "verl", "paper"),
        ({"objective": {"normaliser": "group_token_mean"}}, "verl", "paper"),
        ({"optim": {"warmup_steps": 10}}, "paper", "verl"),
    ],
)
def test_away_from_the_defaults_a_choice_departs_from_one_source_and_not_from_the_other(
    tmp_path, changed, departs, agrees
):
    [(section, options)] = changed.items()
    [name] = options
    config = defaults(tmp_path, **changed)
    assert f"{section}.{name}" in names(semantics.diff(config, departs))
    assert f"{section}.{name}" not in names(semantics.diff(config, agrees))


def test_the_published_values_of_options_are_pinned_and_their_order_too(tmp_path):
    """An option's default may change; what the paper and the released code have does not."""
    found = semantics.choices(defaults(tmp_path))
    assert [(c.name, (c.paper, c.verl)) for c in found if c.name in PUBLISHED] == list(PUBLISHED.items())
    declared = {
        f"{section}.{name}"
        for section, field in config.Config.model_fields.items()
        for name, option in field.annotation.model_fields.items()
        if option.json_schema_extra
    }
    assert declared == set(PUBLISHED) and all(c.reason for c in found)
    assert len(found) == len({c.name for c in found}) == 69


def test_a_departure_says_both_values_and_why(tmp_path):
    [line] = [
        line
        for line in semantics.diff(defaults(tmp_path, objective={"clip_high": 0.2}), "paper")
        if "clip_high" in line
    ]
    why = "Clip-Higher: room for unlikely tokens keeps the entropy up"
    assert line == f"objective.clip_high: 0.2; paper: 0.28. Why one would: {why}"


def test_the_manifest_holds_choices_data_checker_and_versions_and_reports_what_changed(tmp_path):
    first = semantics.manifest(make_config(tmp_path), data="d1")
    assert first["choices"]["groups are filtered on"] == "correctness"
    assert first["choices"]["advantage: ddof of the std"] == 1
    assert {"python", "torch", "megatron-core", "transformers", "dapo"} <= set(first["versions"])
    assert len(first["reward functions"]["dapo.reward:is_correct"]) == 16
    path = tmp_path / "semantics.json"
    assert semantics.changes(first, path) == [], "of a new run"
    path.write_text(semantics.dump(first))
    assert semantics.changes(first, path) == []
    later = semantics.manifest(make_config(tmp_path, "objective.clip_high=0.3"), data="d2")
    assert semantics.changes(later, path) == [
        "objective.clip_high was 0.28 and is 0.3 from here on",
        "data was d1 and is d2 from here on",
    ]
    assert json.loads(semantics.dump(later)) == later
    assert json.loads(path.read_text()) == first, "only the run's record is written, and later"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.seed=1", "run.seed was 0 and is 1 from here on"),
        ("run.deterministic=true", "run.deterministic was false and is true from here on"),
        (
            "data.train={a.jsonl: 1, b.jsonl: 2}",
            "weights of data.train was none and is [1.0, 2.0] from here on",
        ),
        ("policy.dtype=float32", "policy.dtype was bfloat16 and is float32 from here on"),
        ("policy.megatron.adam_eps=1.0e-6", 'policy.megatron was {} and is {"adam_eps": 1e-06} from here on'),
        ("eval.data=held.jsonl", "eval.data was none and is held.jsonl from here on"),
    ],
)
def test_an_option_that_would_change_a_resumed_run_silently_is_named(tmp_path, override, line):
    path = tmp_path / "semantics.json"
    path.write_text(semantics.dump(semantics.manifest(make_config(tmp_path), data="d")))
    assert semantics.changes(semantics.manifest(make_config(tmp_path, override), data="d"), path) == [line]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"choices": 3, "reward functions": {}}', "\0"])
def test_a_damaged_record_of_the_choices_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "semantics.json"
    path.write_text(text)
    with pytest.raises(config.ConfigError, match=r"semantics.json is damaged \(.+\): restore it, or remove"):
        semantics.changes(semantics.manifest(make_config(tmp_path), data="d"), path)


def test_weights_of_reward_functions_that_change_are_named(tmp_path):
    weighted = [
        f"reward.function={{'dapo.reward:is_correct': 1.0, 'my:f': {weight}}}" for weight in (0.1, 0.2)
    ]
    path = tmp_path / "semantics.json"
    first, second = (semantics.manifest(make_config(tmp_path, option), data="d") for option in weighted)
    path.write_text(semantics.dump(first))
    assert semantics.changes(second, path) == [
        "weights of reward.function was [1.0, 0.1] and is [1.0, 0.2] from here on"
    ]


def test_what_an_older_manifest_does_not_hold_has_not_changed(tmp_path):
    found = semantics.manifest(make_config(tmp_path, "run.seed=7"), data="d")
    del found["choices"]["run.seed"]
    path = tmp_path / "semantics.json"
    path.write_text(semantics.dump(found))
    assert semantics.changes(semantics.manifest(make_config(tmp_path), data="d"), path) == []


FIXTURE = ROOT / "tests/fixtures/0.1.0/tensor2/run"


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        ([], []),
        (
            ["objective.kind=cispo", "objective.advantage=batch_std"],
            [
                "objective.kind was dapo and is cispo from here on",
                "objective.advantage was group_std and is batch_std from here on",
            ],
        ),
        (
            ["objective.importance=band", "objective.importance_of=all"],
            [
                "objective.importance and objective.importance_of was tis, older weights' tokens "
                "and is band, all tokens from here on",
                "objective.importance_cap was 2.0 and is none from here on",
                "objective.importance_band was none and is [0.5, 5.0] from here on",
            ],
        ),
        (["objective.importance_cap=3"], ["objective.importance_cap was 2.0 and is 3.0 from here on"]),
    ],
)
def test_what_was_no_option_in_an_older_version_had_a_value(overrides, lines):
    text = (FIXTURE / "config.yaml").read_text()
    made = config.load(FIXTURE / "config.yaml", overrides)
    found = semantics.manifest(
        made, data=json.loads((FIXTURE / "semantics.json").read_text()).get("prompts", "d")
    )
    changes = semantics.changes(found, FIXTURE / "semantics.json")
    assert "max_staleness" in text
    assert [line for line in changes if line.startswith("objective.")] == lines


def test_the_engines_logits_are_known_by_either_spelling_and_of_ones_own_servers_only(tmp_path):
    name = "the engine's logits (engine.sglang.enable-fp32-lm-head)"
    for options, value in [
        ({"kind": "sglang"}, "as policy.dtype"),
        ({"kind": "sglang", "sglang": {"enable-fp32-lm-head": True}}, "float32"),
        ({"kind": "sglang", "sglang": {"enable_fp32_lm_head": True}}, "float32"),
        ({"kind": "sglang", "urls": ["http://a:1"]}, "unsaid"),
    ]:
        found = {c.name: c.value for c in semantics.choices(defaults(tmp_path, engine=options))}
        assert found[name] == value


def test_a_replayed_dump_may_hold_tokens_to_correct(tmp_path):
    path = tmp_path / "semantics.json"
    path.write_text(semantics.dump(semantics.manifest(make_config(tmp_path), data="d")))
    replaying = semantics.manifest(make_config(tmp_path, "rollout.replay=elsewhere"), data="d")
    importance = "objective.importance and objective.importance_of"
    assert semantics.changes(replaying, path) == [
        f"{importance} was none and is tis, older weights' tokens from here on",
        "objective.importance_cap was none and is 2.0 from here on",
        "rollout.replay was none and is elsewhere from here on",
    ]
    with pytest.raises(config.ConfigError, match=r"objective\.importance=tis with objective\.kind=gspo"):
        make_config(tmp_path, "rollout.replay=elsewhere", "objective.kind=gspo")


@pytest.mark.parametrize("function", ["rw.kwargs:f", "path.py:f", "__main__:f", "no_such:f", "http://h/p"])
def test_a_function_without_a_file_has_no_fingerprint(function):
    assert semantics.fingerprint(function) == "unknown"


def test_the_fingerprint_follows_the_reward_function_s_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_checker.py").write_text("def f(response, answer): return True\n")
    before = semantics.fingerprint("my_checker:f")
    (tmp_path / "my_checker.py").write_text("def f(response, answer): return False\n")
    assert semantics.fingerprint("my_checker:f") != before
    assert semantics.fingerprint("http://host/path") == "unknown"


def test_the_plan_command_prints_a_line_a_departure_and_loads_no_torch():
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "dapo",
        "plan",
        "examples/arithmetic/config.yaml",
        "--diff",
        "verl",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert (
        "optim.lr: 0.0002; verl: 1e-06. Why one would: a smaller model bears more" in done.stdout.splitlines()
    )
    assert "pydantic" in done.stderr and not re.search(r"\| +torch\n", done.stderr)


def test_an_old_runs_hash_of_tokens_is_not_taken_for_other_data(tmp_path):
    path = tmp_path / "semantics.json"
    first = semantics.manifest(make_config(tmp_path), data="of rows")
    old = {name: value for name, value in first.items() if name != "prompts"} | {"data": "of tokens"}
    path.write_text(semantics.dump(old))
    assert semantics.changes(first, path) == []


def test_a_fingerprint_is_of_all_files_of_our_room_and_of_one_file_elsewhere(tmp_path, monkeypatch):
    files = [path.read_bytes() for path in sorted((ROOT / "dapo/reward").glob("*.py"))]
    of_room = hashlib.blake2b(b"".join(files), digest_size=8).hexdigest()
    assert semantics.fingerprint("dapo.reward:is_correct") == of_room
    assert semantics.fingerprint("dapo.reward.answer:is_correct") == of_room

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "checker_a.py").write_text("def f(response, answer): return True\n")
    (tmp_path / "checker_b.py").write_text("def g(response, answer): return True\n")
    of_file = hashlib.blake2b((tmp_path / "checker_a.py").read_bytes(), digest_size=8).hexdigest()
    assert semantics.fingerprint("checker_a:f") == of_file
