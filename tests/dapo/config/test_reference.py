"""What `dapo config` prints is what sections.py declares, and what docs/ holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dapo.config import Config, plain_yaml, reference

ROOT = Path(__file__).parents[3]
OPTIONS = {option.name: option for option in reference.options()}


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_every_option_explains_itself(option: reference.Option) -> None:
    assert option.meaning.endswith(".") and option.meaning[0] not in " \n"
    assert option.kind
    if option.default in (None, "null", "{}", "[]") and option.name != "objective.dual_clip":
        assert option.examples, "its default does not show what a value looks like"


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_every_value_that_is_shown_is_accepted(option: reference.Option) -> None:
    *sections, name = option.name.split(".")
    kind = Config
    for section in sections:
        kind = kind.model_fields[section].annotation
    required = {"dir": "d", "train": "t", "model": "m"}
    for value in map(plain_yaml.load, filter(None, [option.default, *option.examples])):
        given = {key: each for key, each in required.items() if key in kind.model_fields} | {name: value}
        assert kind.model_validate(given).model_dump(mode="json")[name] == value


@pytest.mark.parametrize(
    ("name", "kind", "default", "sources"),
    [
        ("rollout.group_size", "whole number ≥ 2", "16", "paper 16, verl 16"),
        ("optim.lr", "number ≥ 0", "1e-6", "paper 1e-6, verl 1e-6"),
        ("optim.betas", "list of 2, each number > 0, ≤ 1", "[0.9, 0.999]", "verl [0.9, 0.999]"),
        ("run.resume", "auto or never or whole number ≥ 1", "auto", ""),
        ("objective.dual_clip", "number > 1 or null", "null", "paper null, verl 10.0"),
        ("data.train", "path or list, each path or mapping to number > 0", None, ""),
        ("policy.megatron", "mapping", "{}", ""),
        ("run.profile.ranks", "list, each whole number ≥ 0", "[0]", ""),
        ("engine.verify_weights", "true or false", "false", ""),
    ],
)
def test_kinds_defaults_and_sources_are_said(name: str, kind: str, default: str | None, sources: str) -> None:
    found = OPTIONS[name]
    assert (found.kind, found.default, found.sources) == (kind, default, sources)


def test_text_holds_each_option_once_and_fits_its_width() -> None:
    lines = reference.text(reference.options(), width=80).splitlines()
    assert [line for line in lines if line and line[0] != " "] == list(OPTIONS)
    assert max(len(line) for line in lines if "example:" not in line) <= 80


def test_the_documentation_has_the_reference_of_this_code() -> None:
    remedy = "dapo config --markdown > docs/config.md; dapo config --schema > docs/config.schema.json"
    assert (ROOT / "docs/config.md").read_text() == reference.markdown(), remedy
    assert (ROOT / "docs/config.schema.json").read_text() == reference.schema(), remedy


def test_a_table_of_markdown_has_as_many_cells_in_every_row() -> None:
    rows = [line for line in reference.markdown().splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {6}
    assert len([line for line in rows if line.startswith("| `")]) == len(OPTIONS)


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("examples/*/config.yaml")), ids=lambda path: path.parent.name
)
def test_the_schema_knows_every_key_of_an_example_and_the_example_names_it(path: Path) -> None:
    schema = json.loads(reference.schema())
    first, _, _ = path.read_text().partition("\n")
    assert (path.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve() == (
        ROOT / "docs/config.schema.json"
    )
    for section, values in yaml.safe_load(path.read_text()).items():
        definition = schema["$defs"][schema["properties"][section]["$ref"].rpartition("/")[2]]
        assert set(values) <= set(definition["properties"])
        assert not definition["additionalProperties"]


def test_the_schema_holds_what_editors_show() -> None:
    found = json.loads(reference.schema())["$defs"]["Rollout"]["properties"]["group_size"]
    assert found == {"default": 16, "description": "G: samples per prompt.", "exclusiveMaximum": 2**31,
                     "minimum": 2, "type": "integer"}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-6, "1e-6"), (2.5e-10, "2.5e-10"), (0.1, "0.1"), ({"tp-size": 2}, "{tp-size: 2}"), ("1e-6", "'1e-6'"),
     ([], "[]"), (None, "null"), (1e16, "1e+16"), ("a: b", "'a: b'")],
)  # fmt: skip
def test_a_value_on_one_line_is_what_an_override_reads(value: object, text: str) -> None:
    assert plain_yaml.inline(value) == text
    assert plain_yaml.load(text) == value
