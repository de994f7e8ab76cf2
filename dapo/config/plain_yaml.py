"""YAML whose numbers are JSON's: 1e-6 is one, and 0123, 1:30, 1_000, yes and dates are text.

YAML 1.1 takes them for 83, 90, 1000, true and a date, and 1e-6 for text. A key that is given twice, and tags
such as !!int, are refused.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

import yaml


class NotYAML(ValueError):
    """A text is not YAML, or not as plain as it has to be. The message is one line."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  # YAML 1.1's own: 0123 is 83 there, and 1:30 is 90

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if not self.check_event(yaml.AliasEvent) and event.tag:
            problem = f"the tag {event.tag} is not understood: remove it"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor: Any) -> Any:
        node: Any = super().compose_scalar_node(anchor)
        try:
            node.value.encode()
        except UnicodeEncodeError:
            problem = "half of a surrogate pair is no text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            if (other := first.setdefault((key.tag, str(key.value)), key)) is not key:
                twice = f"key {key.value!r} is given twice, first in line {other.start_mark.line + 1}; again"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


for _kind, _first, _pattern in [
    ("null", ["~", "n", "N", ""], "~|null|Null|NULL|"),
    ("bool", "tTfF", "true|True|TRUE|false|False|FALSE"),
    ("int", "-+0123456789", "[-+]?(0|[1-9][0-9]{0,99})"),
    ("float", "-+.0123456789",
     r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
     r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    ("merge", "<", "<<"),
]:  # fmt: skip
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), _first)


def load(text: str) -> Any:
    """Return the value of a YAML text. Raise NotYAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        said = str(error).replace('in "<unicode string>", ', "in ")
        raise NotYAML(f"not YAML: {' '.join(said.split())}") from error
    except RecursionError as error:
        raise NotYAML("not YAML: nested too deeply") from error


def override(values: dict[str, Any], text: str) -> None:
    """Set one value below `values`: "optim.lr=2e-6". Raise NotYAML."""
    key, equals, value = text.partition("=")
    text = text if len(text) <= 200 else text[:200] + "…"
    if not equals or not all(key.split(".")):
        raise NotYAML(f"override {text!r}: expected section.key=value, or a file whose name ends in .yaml")
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise NotYAML(f"override {text!r}: {section} is not a section")
    try:
        values[name] = load(value)
    except NotYAML as error:
        raise NotYAML(f"override {text!r}: {error}") from error


class _Shown(reprlib.Repr):
    """Shortens values, but no URL: a secret in a part of one could not be found and removed."""

    def repr_str(self, x: str, level: int) -> str:
        return repr(x) if "://" in x else super().repr_str(x, level)


_SHOWN = _Shown()
_SHOWN.maxlevel = 3


def shown(value: Any) -> str:
    """Return a value as an error shows it: in short, however large it is."""
    return _SHOWN.repr(value)


def dump(value: Any) -> str:
    """Return a YAML text that `load` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def inline(value: Any) -> str:
    """Return a YAML text of one line, as an override gives it: `{tp-size: 2}`."""
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=10**6, allow_unicode=True
    )
    return re.sub(r"\.0e([-+])0*", r"e\1", text.removesuffix("\n").removesuffix("\n..."))
