"""What installs admits no version with a published vulnerability in what is used here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# the first version without it
FIXED = {
    "aiohttp": "3.14.1",  # CVE-2025-69223, CVE-2026-22815, CVE-2026-34513, PYSEC-2026-2111
    "orjson": "3.11.6",  # CVE-2024-27454, CVE-2025-67221
    "pyarrow": "23.0.1",  # CVE-2023-47248, CVE-2026-25087
    "pydantic": "2.4.0",  # CVE-2024-3772
    "pyyaml": "5.4",  # CVE-2020-14343
    "setuptools": "78.1.1",  # CVE-2024-6345, CVE-2025-47273
    "transformers": "4.53.0",  # CVE-2025-5197 and others before it
}


def parts(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


@pytest.mark.parametrize("name", FIXED)
def test_the_oldest_version_that_is_admitted_has_the_fix(name: str) -> None:
    declared = (ROOT / "setup.py").read_text() + (ROOT / "pyproject.toml").read_text()
    [floor] = re.findall(rf'"{name}>=([0-9.]+)', declared)
    assert parts(floor) >= parts(FIXED[name])
