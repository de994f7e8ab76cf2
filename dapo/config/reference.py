"""The reference of every option, generated from sections.py: text, markdown, or a JSON schema for editors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from dapo.config import UNSAID, Config
from dapo.config.plain_yaml import inline

INTRODUCTION = """# Configuration reference

A run is described by one YAML file. Any option can be given on the command line too, and wins there:
`dapo train run.yaml optim.lr=2e-6`. An option that is not given has its default. `dapo config` prints this
page, `dapo config lr clip` the options with these words in their names.

An editor completes and checks a config whose first line names the schema, which `dapo config --schema`
prints:

    # yaml-language-server: $schema=../docs/config.schema.json
"""


@dataclass(frozen=True)
class Option:
    """One option as its reader sees it."""

    name: str  # "rollout.group_size"
    kind: str  # "whole number ≥ 2"
    default: str | None  # as YAML on one line; None: it has to be given
    examples: list[str]
    meaning: str
    sources: str  # "paper 16, verl 16", or empty


def options() -> list[Option]:
    """Return every option, in the order of sections.py."""
    definitions = Config.model_json_schema()["$defs"]
    return [
        option
        for section, field in Config.model_fields.items()
        for option in _options_below(section, field.annotation.__name__, definitions)  # type: ignore[union-attr]
    ]


def _options_below(prefix: str, kind: str, definitions: dict[str, Any]) -> Iterator[Option]:
    """Yield the options of a section, and of sections in it."""
    for name, schema in definitions[kind]["properties"].items():
        if inner := schema.get("$ref"):
            yield from _options_below(f"{prefix}.{name}", inner.rpartition("/")[2], definitions)
            continue
        yield Option(
            f"{prefix}.{name}",
            kind_of(schema),
            inline(schema["default"]) if "default" in schema else None,
            [inline(value) for value in schema.get("examples", [])],
            " ".join(schema["description"].split()),
            _sources(schema),
        )


def kind_of(schema: dict[str, Any]) -> str:
    """Describe the values that a JSON schema allows: "whole number ≥ 1"."""
    if kinds := schema.get("anyOf"):
        return " or ".join(kind_of(each) for each in kinds)
    if values := schema.get("enum"):
        return " or ".join(map(str, values))
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "array":
        if items := schema.get("prefixItems"):
            return f"list of {len(items)}, each {kind_of(items[0])}"
        return f"list, each {kind_of(schema['items'])}"
    if schema["type"] == "object":
        each = schema["additionalProperties"]
        return "mapping" if each is True else f"mapping to {kind_of(each)}"
    if schema.get("format") == "path":
        return "path"
    names = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    bounds = [f"{sign} {inline(schema[limit])}" for limit, sign in limits.items() if limit in schema]
    return " ".join([names.get(schema["type"], schema["type"]), ", ".join(bounds)]).strip()


def _sources(schema: dict[str, Any]) -> str:
    said = {name: schema.get(name, UNSAID) for name in ("paper", "verl")}
    return ", ".join(f"{name} {inline(value)}" for name, value in said.items() if value != UNSAID)


def text(found: list[Option], width: int = 100) -> str:
    """Return the options as a terminal shows them."""
    blocks = []
    for each in found:
        default = "has to be given" if each.default is None else f"default {each.default}"
        facts = "; ".join(filter(None, [each.kind, default, each.sources]))
        lines = [*wrap(facts, width - 4), *wrap(each.meaning, width - 4)]
        lines += [f"example: {example}" for example in each.examples]
        blocks.append("\n    ".join([each.name, *lines]))
    return "\n\n".join(blocks) + "\n"


def markdown() -> str:
    """Return docs/config.md."""
    parts, found = [INTRODUCTION], options()
    for section, field in Config.model_fields.items():
        about = (field.annotation.__doc__ or "").strip()  # type: ignore[union-attr]
        rows = [
            f"| `{each.name.partition('.')[2]}` | {_cell(each.default)} | {_escape(each.kind)} | "
            f"{_escape(each.meaning)}{_examples(each)} | {each.sources} |"
            for each in found
            if each.name.startswith(f"{section}.")
        ]
        head = "| option | default | values | meaning | paper, verl's recipe |\n" + "| --- " * 5 + "|"
        parts.append("\n".join([f"## {section}\n", f"{about}\n", head, *rows]) + "\n")
    return "\n".join(parts)


def _cell(value: str | None) -> str:
    return "*required*" if value is None else f"`{value}`"


def _examples(option: Option) -> str:
    shown = ", ".join(f"`{example}`" for example in option.examples)
    return f" Example: {shown}" if shown else ""


def _escape(words: str) -> str:
    return words.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def schema() -> str:
    """Return docs/config.schema.json: what an editor needs to complete and check a config."""
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(_plain(whole), indent=1, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """Return a schema without what editors do not read: titles, and an option's sources."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    left_out = {"title", "paper", "verl", "reason"}
    return {
        key: {name: _plain(each) for name, each in found.items()}
        if key in ("properties", "$defs") and isinstance(found, dict)
        else " ".join(found.split())
        if key == "description" and isinstance(found, str)
        else _plain(found)
        for key, found in value.items()
        if key not in left_out
    }
