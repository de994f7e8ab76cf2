"""Who may import whom. Read from the source, so that a lazy import inside a function counts too."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    path.relative_to(ROOT)
    for folder in ("dapo", "kernels/dapo_kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

# Floors from the ground up. A room sees its own files and the rooms of lower floors, never another room of
# its own floor.
FLOORS = [
    {"types", "config", "clock"},
    {"joining"},
    {"files", "http", "mesh"},
    {"watch"},
    {"model"},
    {"learn"},
    {"reward", "plan"},
    {"rollout"},
    {"report", "measure"},
    {"episodes"},
    {"engine", "policy"},
    {"checkpoint", "log", "recorder", "verify"},
    {"sampler"},
    {"assemble"},
    {"train"},
    {"command"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# no process groups: testable in milliseconds
PURE = {room for rooms in FLOORS[:8] for room in rooms} - {"mesh"}
ROOT_MODULES = 14


def imports_of(source: str, package: str) -> set[str]:
    """Dotted names of what a file imports, and torch.distributed where it is reached as an attribute.

    `from dapo import config` → {"dapo", "dapo.config"}. `package` is where the file lies, for relative
    imports.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return names


def imports_in(path: Path) -> set[str]:
    return imports_of((ROOT / path).read_text(), ".".join(path.parent.parts))


def room_of(path: Path) -> str:
    """A module or subpackage of dapo: dapo/reward/pool.py → "reward"."""
    return path.stem if len(path.parts) == 2 else path.parts[1]


ROOMS = {room_of(path) for path in FILES if path.parts[0] == "dapo"}


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def in_rooms(rooms) -> list[Path]:
    return [path for path in FILES if path.parts[0] == "dapo" and room_of(path) in rooms]


def test_imports_are_read_wherever_they_stand():
    source = """
import a.b
from dapo import config
from . import x
from ..y import z
def f():
    import lazy
    torch.distributed.barrier()
"""
    ours = {"dapo", "dapo.config", "dapo.policy", "dapo.policy.x", "dapo.y", "dapo.y.z"}
    assert imports_of(source, "dapo.policy") == ours | {"a.b", "lazy", "torch.distributed"}


def test_every_room_has_its_floor():
    assert {"__init__", "__main__", *FLOOR} == ROOMS


def test_the_root_holds_few_modules():
    assert len(list((ROOT / "dapo").glob("*.py"))) - 1 <= ROOT_MODULES  # __init__.py says what the package is


@pytest.mark.parametrize("path", in_rooms(FLOOR), ids=str)
def test_a_room_imports_only_from_the_floors_below(path):
    room = room_of(path)
    seen = {name.split(".")[1] for name in imports_in(path) if name.startswith("dapo.")} & ROOMS - {room}
    assert not [other for other in seen if FLOOR[other] >= FLOOR[room]]


@pytest.mark.parametrize("path", in_rooms(PURE), ids=str)
def test_pure_modules_know_nothing_of_process_groups(path):
    assert not [name for name in imports_in(path) if is_below(name, "torch.distributed")]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_only_the_policy_imports_megatron(path):
    megatron = [name for name in imports_in(path) if is_below(name, "megatron")]
    assert not megatron or path.is_relative_to("dapo/policy")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_only_http_imports_an_http_client(path):
    clients = ("aiohttp", "http.client", "urllib.request", "urllib3", "requests", "httpx")
    found = [name for name in imports_in(path) if any(is_below(name, client) for client in clients)]
    assert not found or path == Path("dapo/http.py")


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "kernels"], ids=str)
def test_the_kernels_know_nothing_of_the_trainer(path):
    assert not [name for name in imports_in(path) if is_below(name, "dapo")]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_that_installs_imports_what_does_not(path):
    outside = ("examples", "benchmarks", "tools", "tests", "kernels")
    assert not [name for name in imports_in(path) if name.split(".")[0] in outside]


def test_the_kernels_folder_is_not_importable():  # it would shadow Hugging Face's package of that name
    assert not (ROOT / "kernels/__init__.py").exists()


def test_no_files_import_each_other_in_a_circle():
    # a package's face only hands names on
    modules = {module_of(path): path for path in FILES if path.name != "__init__.py"}
    assert {"dapo.policy.megatron", "dapo_kernels.rows"} <= set(modules)
    order = TopologicalSorter({module: imports_in(path) & set(modules) for module, path in modules.items()})
    order.prepare()  # raises CycleError, which names them


def module_of(path: Path) -> str:
    """kernels/dapo_kernels/rows.py → "dapo_kernels.rows"."""
    return ".".join(path.relative_to("kernels" if path.parts[0] == "kernels" else "").with_suffix("").parts)


def test_every_wing_is_installed() -> None:
    """setup.py installs the folders that are packages."""
    folders = {ROOT / file.parent for file in FILES}
    assert {folder.name for folder in folders} >= {"dapo", "watch", "engine", "dapo_kernels"}
    assert all((folder / "__init__.py").is_file() for folder in folders)
