"""The package's shape: links, the one direction of dependencies, what importing it loads."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("baselines", "engine_bridge", "envs", "agents")
# The files whose functions handle vLLM's own tensors, inside its workers; importing the modules needs no torch.
TENSORS = {f"engine_bridge/vllm_plugin/{name}.py" for name in ("worker", "plugin", "eplb")}
HEAVY = {"torch", "stable_baselines3", "sb3_contrib", "tensorboard"}


@pytest.mark.parametrize("name", [*LAYERS, "configs"])
def test_links_lead_to_the_top_level_folders(name: str) -> None:
    link = ROOT / "src" / "servegym" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{name}"
    assert link.resolve() == ROOT / name


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    outside = path.relative_to(ROOT).as_posix() in TENSORS
    for node in tree.body if outside else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


@pytest.mark.parametrize("layer", LAYERS)
def test_dependencies_point_one_way(layer: str) -> None:
    later = LAYERS[LAYERS.index(layer) + 1 :]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / layer).rglob("*.py"))
        for name in _imports(path)
        if name.split(".")[0] in LAYERS
        or (name.startswith("servegym.") and name.split(".")[1] in later)
        or (layer != "agents" and name.split(".")[0] in HEAVY)
    ]
    assert not wrong


def test_the_simulator_knows_nothing_of_gymnasium() -> None:
    for path in sorted((ROOT / "envs" / "simulator").rglob("*.py")):
        assert not {name.split(".")[0] for name in _imports(path)} & {"gymnasium", *HEAVY}, path


@pytest.mark.parametrize("module", ["servegym", "servegym.engine_bridge.bundle", "servegym.agents.cli"])
def test_imports_are_light(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.split() == []


def test_no_pickle_is_loaded_where_policies_are_deployed() -> None:
    for layer in ("baselines", "engine_bridge"):
        for path in sorted((ROOT / layer).rglob("*.py")):
            assert not _imports(path) & {"pickle", "cloudpickle", "joblib", "dill"}, path
