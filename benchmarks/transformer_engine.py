"""What Megatron-core hands to Transformer Engine, against what versions of it take: read from their sources.

    pip download --no-deps transformer-engine==2.20.2 && unzip -d te/2.20.2 transformer_engine-2.20.2-*.whl
    python benchmarks/transformer_engine.py te/2.20.2 te/2.11.0

With --record, the first one's signatures become those of the tests' stand-in.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import record

RECORDED = record.ROOT / "tests/transformer_engine/signatures.json"
ATTENTION = "attention/dot_product_attention/dot_product_attention.py"
CLASSES = {  # class → its files below transformer_engine/pytorch, and the parameters that it can register
    "Linear": (["module/linear.py"], "weight bias"),
    "LayerNormLinear": (["module/layernorm_linear.py"], "layer_norm_weight layer_norm_bias weight bias"),
    "GroupedLinear": (["module/grouped_linear.py"], "weight bias"),  # with a number each
    "RMSNorm": (["module/rmsnorm.py", "ops/basic/rmsnorm.py"], "weight"),
    "LayerNorm": (["module/layernorm.py", "ops/basic/layer_norm.py"], "weight bias"),
    "DotProductAttention": ([ATTENTION], "softmax_offset"),
}


def signatures(folder: Path) -> dict[str, dict[str, str]]:
    """Class → method → names of its arguments; a class that hands **kwargs on has those of both files."""
    found = {}
    for name, (files, parameters) in CLASSES.items():
        methods: dict[str, list[str]] = {"__init__": [], "forward": []}
        for file in files:
            for node in ast.walk(ast.parse((folder / "transformer_engine/pytorch" / file).read_text())):
                if isinstance(node, ast.ClassDef) and node.name == name:
                    for method in node.body:
                        if isinstance(method, ast.FunctionDef) and method.name in methods:
                            names = [arg.arg for arg in [*method.args.args, *method.args.kwonlyargs][1:]]
                            methods[method.name] += [n for n in names if n not in methods[method.name]]
        found[name] = {method: " ".join(names) for method, names in methods.items()}
        found[name]["parameters"] = parameters
    return found


def is_taken(test: ast.expr, version: tuple[int, ...]) -> bool | None:
    """Whether a condition on Transformer Engine's version holds; None of any other condition."""
    if isinstance(test, ast.Name) and test.id == "HAVE_TE":
        return True
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        parts = [is_taken(value, version) for value in test.values]
        return False if False in parts else None if None in parts else True
    if not (isinstance(test, ast.Call) and ast.unparse(test.func) == "is_te_min_version"):
        return None
    wanted = numbers(ast.literal_eval(test.args[0]))
    return version >= wanted if len(test.args) == 1 and not test.keywords else version > wanted


def reached(nodes: Sequence[ast.AST], version: tuple[int, ...]) -> Iterator[ast.AST]:
    """Yield what runs with this version of Transformer Engine."""
    for node in nodes:
        yield node
        if isinstance(node, ast.If) and (taken := is_taken(node.test, version)) is not None:
            yield from reached(node.body if taken else node.orelse, version)
        else:
            yield from reached(list(ast.iter_child_nodes(node)), version)


def handed(tree: ast.Module, version: tuple[int, ...]) -> dict[tuple[str, str], set[str]]:
    """(Megatron's class, Transformer Engine's) → keywords that the first can hand to the second."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    [common] = [keys_set_in(node, version) for node in functions if node.name == "_get_extra_te_kwargs"]
    found = {}
    for node in reached([tree], version):
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base).removeprefix("te.pytorch.") for base in node.bases]
            if bases and bases[0] in CLASSES:
                calls = [c for c in reached([node], version) if isinstance(c, ast.Call)]
                made = [call for call in calls if ast.unparse(call.func) == "super().__init__"]
                keywords = {keyword.arg for call in made for keyword in call.keywords if keyword.arg}
                extra = common if "Attention" not in node.name else set()
                found[node.name, bases[0]] = keywords | keys_set_in(node, version) | extra
            elif node.name == "TENorm":
                calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
                [made] = [call for call in calls if ast.unparse(call.func) == "norm_module"]
                keywords = {keyword.arg for keyword in made.keywords if keyword.arg}
                found[node.name, "RMSNorm"] = keywords | common
    return found


def keys_set_in(node: ast.AST, version: tuple[int, ...]) -> set[str]:
    """Keys that are set in its dictionary of extra keywords."""
    names = ("extra_kwargs", "extra_te_kwargs", "extra_transformer_engine_kwargs")
    keys = set()
    for inner in reached([node], version):
        if isinstance(inner, ast.Subscript) and ast.unparse(inner.value) in names:
            keys.add(ast.literal_eval(inner.slice))
        elif isinstance(inner, ast.Assign) and ast.unparse(inner.targets[0]) in names:
            keys |= {ast.literal_eval(key) for key in getattr(inner.value, "keys", []) if key}
    return keys


def imports(core: Path, version: tuple[int, ...]) -> dict[str, bool]:
    """ "module.name" of Transformer Engine that Megatron imports → whether it goes on without."""
    found: dict[str, bool] = {}
    for path in sorted(core.rglob("*.py")):
        tree = ast.parse(path.read_text())
        tried = {id(n) for t in ast.walk(tree) if isinstance(t, ast.Try) for b in t.body for n in ast.walk(b)}
        inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        for node in reached([tree], version):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformer_engine."):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    found[name] = found.get(name, True) and (id(node) in tried or id(node) in inside)
    return found


def has(folder: Path, name: str) -> bool:
    """True if "transformer_engine.pytorch.x.y" is a file, or a name that the file of its module mentions."""
    if any((folder / (name.replace(".", "/") + end)).is_file() for end in (".py", "/__init__.py")):
        return True
    module, _, last = name.rpartition(".")
    files = [folder / (module.replace(".", "/") + end) for end in (".py", "/__init__.py")]
    texts = [file.read_text() for file in files if file.is_file()]
    return any(last in {*_names(ast.parse(text))} for text in texts)


def _names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from ((alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="unpacked wheels of transformer-engine")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    versions = {}
    for folder in args.folders:
        [about] = folder.glob("*.dist-info/METADATA")
        [line] = [line for line in about.read_text().splitlines() if line.startswith("Version: ")]
        versions[line.removeprefix("Version: ")] = folder
    core = Path(str(importlib.metadata.distribution("megatron-core").locate_file("megatron/core")))
    tree = ast.parse((core / "extensions/transformer_engine.py").read_text())
    newest = next(iter(versions))
    found = {"version": newest, "classes": signatures(versions[newest])}
    if args.record:
        RECORDED.write_text(json.dumps(found, indent=1) + "\n")
    rows = []
    for ours, theirs in handed(tree, numbers(newest)):
        row: list[object] = [ours, theirs]
        for version, folder in versions.items():
            given = handed(tree, numbers(version))[ours, theirs]
            unknown = given - set(signatures(folder)[theirs]["__init__"].split())
            row.append(f"{len(given)}, unknown: {', '.join(sorted(unknown)) or 'none'}")
        rows.append(row)
    lines = []
    for version, folder in versions.items():
        wanted = imports(core, numbers(version))
        absent = {name: goes_on for name, goes_on in wanted.items() if not has(folder, name)}
        fatal = [name for name, goes_on in absent.items() if not goes_on]
        lines.append(
            f"Of {len(wanted)} names that Megatron-core imports, Transformer Engine {version} lacks "
            f"{len(absent)}. Without these Megatron-core cannot be imported: {', '.join(fatal) or 'none'}."
        )
    is_recorded = json.loads(RECORDED.read_text()) == found
    megatron = importlib.metadata.version("megatron-core")
    text = (
        record.heading(f"Megatron-core {megatron} and Transformer Engine, read and not run")
        + "\nKeywords that Megatron's classes can hand to the constructors of Transformer Engine's.\n\n"
        + record.table(["Megatron-core", "Transformer Engine", *versions], rows)
        + "\n" + "\n\n".join(lines) + "\n\n"
        + f"The tests' stand-in has the signatures of {newest}: {'yes' if is_recorded else 'NO'}.\n"
    )  # fmt: skip
    record.save("transformer_engine.md", text)


if __name__ == "__main__":
    main()
