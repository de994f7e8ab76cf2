"""Install what a machine without a GPU can of trainer and servers in one environment, and import there every
module that the sources import: `python check.py`, or `make env-check`.

The environment is all of constraints/, without what is compiled on a machine with a GPU. It lies in
$XDG_CACHE_HOME/dapo and is made once, of Python 3.12 if there is one. A line for each module; status 1 if
one cannot be imported. Then a step of the example is trained there, with a server of the same environment:
GPU kernels are stood in for (standins/), what needs a driver looks absent (hidden/).
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import build

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SOURCES = ("dapo", "kernels", "tools", "examples")
OURS = {"dapo", "dapo_kernels", "task", *(path.stem for path in (ROOT / "tools").glob("*.py"))}
ELSEWHERE = {"mkdocs"}  # the documentation has an environment of its own
COMPILED = "transformer-engine-torch"  # against the installed torch, by nvcc: left to a machine with a GPU
ENGINE = "transformer_engine.pytorch.fp8"
MEGATRON = "--no-deps", "--ignore-requires-python", "megatron-core==0.19.2"  # on Python 3.11
# what a server imports once it runs; `sglang.launch_server` does not show it
SERVER = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    *(f"sglang.srt.models.{name}" for name in ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral")),
)


def find_python() -> str:
    """A Python 3.12; else the one that runs this."""
    if sys.version_info[:2] == (3, 12):
        return sys.executable
    pyenv = sorted((Path.home() / ".pyenv/versions").glob("3.12*/bin/python3.12"))  # its shim may not run
    return str(pyenv[-1]) if pyenv else shutil.which("python3.12") or sys.executable


def install(python: str) -> Path:
    """The environment's Python; the environment is there when this returns."""
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = subprocess.check_output([python, "-c", ask], text=True).strip()
    folder = build.FOLDER.parent / f"all-python{version}"
    pins = Path(f"{folder}.txt")
    listed = (ROOT / f"constraints/python{version}.txt").read_text().splitlines()
    pins.parent.mkdir(parents=True, exist_ok=True)
    pins.write_text("\n".join(line for line in listed if not line.startswith(COMPILED)))
    installs = [["--no-deps", "--requirement", str(pins)]]  # every package is there: nothing to resolve
    if "megatron-core==" not in pins.read_text():
        installs.append([*MEGATRON])
    key = hashlib.sha256(pins.read_bytes()).hexdigest()[:16]
    build.make(folder, key, python, installs, "many minutes and 11 GB", anew=False)
    return folder / "bin/python"


def imported() -> dict[str, set[str]]:
    """Module → names that our sources import from it, wherever that stands, also in code that is text."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        for module, name in imports_of(ast.parse(path.read_text())):
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names | OURS | ELSEWHERE:
                found[module] |= {name} - {""}
    return found


def imports_of(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (module, name or "") of each import, and ("sglang.…", "") of a module that is named to be run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"sglang(_router)?(\.\w+)+", node.value):
                yield node.value, ""
            elif re.search(r"^(import|from) \w", node.value, re.MULTILINE):
                with contextlib.suppress(SyntaxError):  # prose
                    yield from imports_of(ast.parse(node.value))


def fault_of(module: str, names: set[str]) -> str:
    """Why a module, or a name in it, cannot be imported; "" if it can."""
    try:
        there = importlib.import_module(module)
        for name in sorted(names):
            if not hasattr(there, name):
                importlib.import_module(f"{module}.{name}")
    except Exception as error:  # noqa: BLE001  # a module of others raises anything: it gets its line
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


def check(modules: dict[str, set[str]]) -> int:
    """Import them in this process, with a line for each. Return how many cannot be."""
    faults = 0
    for module in sorted(modules):
        begin = time.monotonic()
        fault = fault_of(module, modules[module])
        faults += bool(fault)
        names = f" ({', '.join(sorted(modules[module]))})" if modules[module] else ""
        took = f"{time.monotonic() - begin:5.1f} s"
        print(f"FAIL {took}  {module}: {fault}" if fault else f"ok   {took}  {module}{names}", flush=True)
    return faults


def main(argv: list[str]) -> int:
    """In the environment, import one part; else make the environment and have both parts imported in it."""
    found = imported()
    servers = {name: found.pop(name) for name in list(found) if name.startswith("sglang")}
    if argv == ["trainer"]:
        import dapo.policy  # noqa: F401  # it adapts Megatron, so it comes first

        return int(check(found) > 0)
    if argv == ["servers"]:
        faults = check(servers | {name: set() for name in SERVER})
        print(f"left  {ENGINE}: {fault_of(ENGINE, set()) or 'it can be imported'}")
        return int(faults > 0)
    python = install(find_python())
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    has_servers = bool(list(python.parents[1].glob("lib/*/site-packages/sglang")))
    parts = ["trainer", "servers"] if has_servers else ["trainer"]
    faults = [subprocess.call([str(python), __file__, part], env=environment) for part in parts]
    return max(*faults, train(python, environment) if has_servers else 0)


def train(python: Path, environment: dict[str, str]) -> int:
    """Train a step in the environment, with a server. Return the exit status."""
    path = os.pathsep.join([str(HERE / "hidden"), str(HERE / "standins"), environment["PYTHONPATH"]])
    launch = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    with tempfile.TemporaryDirectory() as folder:
        options = ["parallel.tensor=1", "engine.kind=sglang", "run.steps=1", f"run.dir={folder}/run"]
        command = [*launch, "-m", "dapo", "train", "examples/arithmetic/config.yaml", *options]
        return subprocess.call(command, env=environment | {"PYTHONPATH": path}, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
