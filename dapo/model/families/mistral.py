"""Mistral, without a window: as Llama."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapo.config import ConfigError
from dapo.model.families.family import Family


class Mistral(Family):
    def check(self, path: Path, raw: Mapping[str, Any]) -> None:
        """See Family. A window is in force unless the file says null."""
        super().check(path, raw)
        if (window := raw.get("sliding_window", 4096)) is not None:  # Hugging Face's default
            raise ConfigError(f"{path}: sliding_window={window} is not supported; supported: null")


MISTRAL = Mistral("mistral")
