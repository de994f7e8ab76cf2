"""An option is declared with its type, its description, and its value in the paper and the released code."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
UpToOne = Annotated[float, Field(ge=0, le=1)]
AboveZero = Annotated[float, Field(gt=0)]
AtLeastTwo = Annotated[int, Field(ge=2, lt=2**31)]


class ConfigError(ValueError):
    """The user's input cannot be used. The message is one line: the thing, its value, and the remedy."""

    def __init__(self, message: str):
        without_user = re.sub(r"(://)[^\s'\"]*@", r"\1***@", message)  # of a URL
        super().__init__(re.sub(r"(://[^\s'\"?#]*)[?#][^\s'\"]*", r"\1?***", without_user))


UNSAID = "unsaid"  # the source leaves it open: nothing departs from it


def option(
    default: Any,
    why: str,
    paper: Any = UNSAID,
    verl: Any = UNSAID,
    both: Any = UNSAID,
    examples: list[Any] | None = None,
) -> Any:
    """Declare an option that decides what a run's numbers mean; `dapo plan --diff` compares it with these.

    `paper`, `verl`, `both`: its value in the paper, in the released code, in both; `why`: a reason for
    another.
    """
    sources = {"paper": paper, "verl": verl} if both == UNSAID else {"paper": both, "verl": both}
    return Field(default, examples=examples, json_schema_extra=sources | {"reason": why})


def example(*values: Any, default: Any = ...) -> Any:
    """Declare an option whose default, if it has one, does not show what a value looks like."""
    return Field(default, examples=list(values))


def expanded(path: Any) -> Path:
    """Return the path with its ~ and $NAMEs replaced."""
    if not isinstance(path, str | Path) or not str(path).strip() or "\0" in str(path):
        raise ValueError("expected a path, in quotes if it looks like a number")
    found = os.path.expandvars(os.path.expanduser(path))
    if re.match(r"~|.*\$[\w{]", found):
        raise ValueError("no such user or environment variable")
    return Path(found)


Location = Annotated[Path, BeforeValidator(expanded)]


class Section(BaseModel):
    """Types are taken strictly: true is no number, 1 is not true, and 10.0 is no whole number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, strict=True, use_attribute_docstrings=True
    )
