"""Says which versions go together: what is installed, what is needed, and the command that mends it.

It imports the standard library only: it runs before anything else can fail, and in a server's Python too.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from importlib import metadata

PYTHON = ">=3.11"
TRAINER = {"torch": ">=2.11", "megatron-core": "==0.19.2", "transformers": ">=5,<6"}
TRANSFORMER_ENGINE = ">=2.11"  # optional
SGLANG = "0.5.23"  # the version that the tests run
HOW = {  # where plain pip would not do
    "torch": "torch==2.14.1",
    # its metadata asks for Python 3.12; it runs on 3.11 too
    "megatron-core": "megatron-core==0.19.2"
    if sys.version_info >= (3, 12)
    else "--no-deps --ignore-requires-python megatron-core==0.19.2",
    # compiled against the torch that is there; without core_cu13 it is CUDA 12's
    "transformer-engine": "--no-build-isolation 'transformer-engine[core_cu13,pytorch]==2.20.2'",
    "sglang": f"sglang=={SGLANG}",
}


def installed(package: str) -> str | None:
    """Return the version of an installed package, None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def mend(package: str, needed: str = "", python: str = sys.executable) -> str:
    """Return the command that installs a package as it is needed."""
    return f"{python} -m pip install {HOW.get(package) or repr(package + needed)}"


def fits(version: str, needed: str) -> bool:
    """Return True if a version is one of `needed`: "2.11.0a0+nv" is one of ">=2.11", as vendors mean it."""
    number = _numbers(version)
    for sign, bound in re.findall(r"(==|>=|<)([\d.]+)", needed):
        limit = _numbers(bound)
        if not {"==": number == limit, ">=": number >= limit, "<": number < limit}[sign]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(number) for number in re.match(r"[\d.]*", version)[0].split(".") if number]  # type: ignore[index]
    return tuple([*numbers, 0, 0, 0][: max(3, len(numbers))])


def fault(package: str, needed: str) -> str | None:
    """Return one line about a package that is missing or of another version; None if it fits."""
    found = installed(package)
    if found and fits(found, needed):
        return None
    there = f"{package} {found}" if found else f"no {package}"
    return f"{there} is installed, dapo needs {package}{needed}: {mend(package, needed)}"


def trainer_fault() -> str | None:
    """Return one line about the first package that the trainer misses; None if all fit."""
    return next(filter(None, (fault(package, needed) for package, needed in TRAINER.items())), None)


def engine_fault(is_server: bool = False) -> str | None:
    """Return one line about a Transformer Engine that is there, but old or not whole.

    Its Python comes without the part that is compiled. In a server only other errors than ImportError matter:
    after one Megatron-core goes on without Transformer Engine.
    """
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None:
        return None
    if spec.origin is None:  # pip leaves folders in which a shared file lay
        folder = next(iter(spec.submodule_search_locations or ()))
        return f"{folder} is left of a removed package, and Megatron-core would use it: rm -r {folder}"
    found = installed("transformer-engine")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("transformer_engine.pytorch.fp8")  # as Megatron-core does
    except (ImportError, OSError, RuntimeError, AssertionError, AttributeError) as error:
        if is_server and isinstance(error, ImportError):
            return None
        why = " ".join(str(error).split()) or type(error).__name__
        pair = f"transformer-engine {found or '(unknown)'} cannot be imported with torch {installed('torch')}"
        return f"{pair} ({why}): {mend('transformer-engine')}"
    return fault("transformer-engine", TRANSFORMER_ENGINE) if found and not is_server else None


def server_fault(has_cuda: bool) -> str | None:
    """Return one line about this Python's SGLang: there is none, others are installed than it pins, or it
    would end with Transformer Engine's error: a server imports Megatron-core if that is there.

    Without CUDA pins do not matter, because they are for SGLang's GPU kernels.
    """
    found = installed("sglang")
    if not found:
        return f"no sglang is installed: {mend('sglang')}"
    listed = "\n".join(metadata.requires("sglang") or [])
    pins = re.findall(r"^(torch|transformers|sglang-kernel) ?\(?==([\w.]+)", listed, re.MULTILINE)
    for package, pin in pins if has_cuda else []:
        if not fits(there := installed(package) or "", f"=={pin}"):
            there = f"{package} {there}" if there else f"no {package}"
            return f"{there} is installed, sglang {found} needs {package}=={pin}: {mend('sglang')}"
    return engine_fault(is_server=True) if installed("megatron-core") else None


if __name__ == "__main__":
    print(server_fault(has_cuda=sys.argv[1:] == ["cuda"]) or "")
