"""The examples' configs load, and their scripts are what bash and shellcheck accept."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dapo import config
from dapo.plan import methods, semantics

EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIGS = sorted(EXAMPLES.glob("*/config.yaml"))
SCRIPTS = sorted([*EXAMPLES.glob("*/*.sh"), *EXAMPLES.glob("*/*.sbatch")])
RECIPES = {  # what `dapo plan` calls them
    "paper": "DAPO (arXiv:2503.14476)",
    "grpo": "GRPO (arXiv:2402.03300), without its KL",
    "dr_grpo": "Dr. GRPO (arXiv:2503.20783)",
    "scalerl": "ScaleRL's CISPO (arXiv:2510.13786)",
    "gspo": "GSPO (arXiv:2507.18071)",
}
TRAINERS = [path for path in SCRIPTS if path.name in ("launch.sh", "trainer.sh")]


def test_there_are_examples() -> None:
    assert len(CONFIGS) >= 3 and len(SCRIPTS) >= 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_an_examples_config_loads(path: Path) -> None:
    assert config.load(path).warnings() == []


def test_every_recipe_has_a_name_and_a_row_in_the_table() -> None:
    recipes = EXAMPLES / "recipes"
    assert {path.stem for path in recipes.glob("*.yaml")} == set(RECIPES)
    rows = re.findall(r"^\| \[(\w+)\.yaml\]", (recipes / "README.md").read_text(), re.MULTILINE)
    assert set(rows) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_a_recipe_goes_on_top_of_every_example(path: Path, name: str) -> None:
    recipe = EXAMPLES / f"recipes/{name}.yaml"
    made = config.load(path, [str(recipe)])
    assert made.warnings() == []
    assert methods.name(made) == RECIPES[name]
    assert re.search(r"arXiv:\d{4}\.\d{5}", recipe.read_text()), "its source"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_leaves_nothing_of_another_one_below_it(name: str) -> None:
    base, recipe = EXAMPLES / "arithmetic/config.yaml", str(EXAMPLES / f"recipes/{name}.yaml")
    for other in RECIPES:
        below = str(EXAMPLES / f"recipes/{other}.yaml")
        assert config.load(base, [below, recipe]) == config.load(base, [recipe]), other
    assert config.load(base, ["objective.dual_clip=10", recipe]) == config.load(base, [recipe])


def shelf_row(name: str) -> set[str]:
    """Return what `dapo plan … RECIPE --diff paper` prints of the method, as the shelf's table has it."""
    made = config.load(EXAMPLES / "qwen2.5_32b_paper/config.yaml", [str(EXAMPLES / f"recipes/{name}.yaml")])
    rows = [line.partition("; paper: ")[0] for line in semantics.diff(made, "paper")]
    overlong = "soft overlong punishment (tokens of L_cache, 0: none): 0"
    rows = [row.replace(overlong, "reward.soft_overlong_punishment: false") for row in rows]
    sections = ("objective.", "rollout.", "reward.", "policy.")
    return {"`{}` {}".format(*row.split(": ")) for row in rows if row.startswith(sections)}


@pytest.mark.parametrize("name", RECIPES)
def test_the_shelf_says_where_a_recipe_departs_from_the_paper(name: str) -> None:
    shelf = (EXAMPLES / "recipes/README.md").read_text()
    [row] = [line for line in shelf.splitlines() if line.startswith(f"| [{name}.yaml]")]
    said = row.split(" | ")[2].removesuffix(" |")
    assert set(said.split(", ")) == (shelf_row(name) or {"nothing of the method"})


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_an_examples_script_is_sound(path: Path) -> None:
    checkers = [["bash", "-n"], *([["shellcheck"]] if shutil.which("shellcheck") else [])]
    for checker in checkers:
        checked = subprocess.run([*checker, str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    assert path.stat().st_mode & 0o100, "not executable"
    assert "set -euo pipefail" in path.read_text()


@pytest.mark.parametrize("path", TRAINERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_trainers_environment_is_set_in_one_place(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert "source examples/environment.sh" in lines
    assert not [line for line in lines if line.startswith("export ")]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/launch.sh")), ids=lambda path: path.parent.name)
def test_a_launch_script_names_one_number_of_machines(path: Path) -> None:
    told = re.findall(
        r"\b(?:--nodes|NODES)=(\d+)", path.read_text() + (path.parent / "README.md").read_text()
    )
    assert len(set(told)) <= 1, told


def test_scripts_call_servers_without_a_proxy() -> None:
    lines = [line.strip() for path in SCRIPTS for line in path.read_text().splitlines()]
    calls = [line for line in lines if re.search(r"\bcurl\b", line)]
    assert calls and all("--noproxy '*'" in call for call in calls)
    for path in SCRIPTS:
        if "sglang.launch_server" in path.read_text():
            assert "\nexport no_proxy='*' NO_PROXY='*'" in path.read_text(), path


APART = {
    "PATH": "/usr/bin:/bin",
    "HEAD": "node0",
    "NODES": "2",
    "NODE_RANK": "1",
    "DAPO_ENGINE_KEY": "key",
    "SERVERS": "node2:30000 node3:30001",
}


def launched(path: Path, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a checkout of its own, whose programs only say what they were called with, and
    on stderr how long torchrun would leave the ranks to save.
    """
    script, programs = folder / path.relative_to(EXAMPLES.parent), folder / ".venv/bin"
    script.parent.mkdir(parents=True)
    programs.mkdir(parents=True)  # the script takes these first
    shutil.copy(path, script)
    shutil.copy(EXAMPLES / "environment.sh", script.parents[1])
    says = 'printf "%s\\n" "$@"; echo "seconds to save: $TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >&2'
    for name, body in {"torchrun": says, "dapo": says, "curl": "true"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    command = ["bash", script, "optim.lr=2e-6"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("own", [None, "my.yaml"])
@pytest.mark.parametrize("path", TRAINERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_trainers_script_takes_the_clones_programs_and_another_config(
    path: Path, own: str | None, tmp_path: Path
) -> None:
    done = launched(path, tmp_path, **APART, **({"CONFIG": own} if own else {}))
    trained, *overrides = f"\n{done.stdout}".partition("\ntrain\n")[2].splitlines()
    assert trained == (own or f"examples/{path.parent.name}/config.yaml"), done.stderr
    assert overrides[-1] == "optim.lr=2e-6"
    assert int(done.stderr.partition("seconds to save: ")[2]) >= 120


def test_make_leaves_ranks_as_long_to_save() -> None:
    makefile = (EXAMPLES.parent / "Makefile").read_text()
    seconds = re.search(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT \?= (\d+)$", makefile, re.MULTILINE)
    assert seconds and int(seconds[1]) >= 120


def test_on_one_machine_dapo_launches_the_ranks_itself(tmp_path: Path) -> None:
    """Its last line is then the error's."""
    given = launched(EXAMPLES / "qwen2.5_7b/launch.sh", tmp_path, **APART).stdout.splitlines()
    assert given[0] == "train" and given[given.index("--nproc") + 1] == "4"


def test_a_trainer_apart_is_given_its_servers_urls(tmp_path: Path) -> None:
    script = EXAMPLES / "qwen2.5_7b/trainer.sh"
    given = launched(script, tmp_path / "given", **APART).stdout.splitlines()
    path, *overrides = given[given.index("train") + 1 :]
    loaded = config.load(EXAMPLES.parent / path, overrides)
    assert loaded.engine.urls == ["http://node2:30000", "http://node3:30001"] and loaded.optim.lr == 2e-6
    assert given[given.index("--node-rank") + 1] == "1"
    without = {name: value for name, value in APART.items() if name != "SERVERS"}
    assert "SERVERS" in launched(script, tmp_path / "without", **without).stderr
