"""Policies that are files of the user's, kept in the folder of an evaluation beside its cells.

A config names such a policy by its path, and the file may be edited, trained anew or moved later. A report, which runs
policies again, takes what was evaluated, and a second run adds no results of another version::

    policies/LABEL.LAYER/    the file of FILE.py:Class, or the files of a bundle

A module named without ``.py``, and what a file imports, are not kept.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from servegym.agents.evaluation.config import EvaluationConfig
from servegym.baselines.policy_spec import LAYERS, Layer, PolicySpec
from servegym.baselines.registry import names
from servegym.engine_bridge.bundle import bundle_files
from servegym.engine_bridge.shipped import PREFIX
from servegym.errors import InputError

_FOLDER = "policies"


def keep_policies(folder: Path, config: EvaluationConfig) -> None:
    """Copy the policies that are files; compare those that are there already.

    Args:
        folder: of the evaluation; it exists.
        config: what is evaluated.

    Raises:
        InputError: the folder holds results of another version of a policy.
    """
    for label, policies in config.policies.items():
        for layer in LAYERS:
            spec: PolicySpec = getattr(policies, layer)
            files, kept = _files(layer, spec.name), _kept(folder, label, layer)
            if not files:
                continue
            if not kept.is_dir():
                _copy(files, kept)
            elif not _same(files, kept):
                problem = f"has results of an earlier version of {spec.name}; allowed: a new or empty folder"
                raise InputError(str(folder), f"policies.{label}", problem)


def with_kept(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return a config whose policies are those that were evaluated: the kept ones where the originals are not.

    Args:
        folder: of the evaluation.
        content: its config, as plain data with all values resolved.
    """
    policies = {label: dict(layers) for label, layers in content.get("policies", {}).items()}
    for label, layers in policies.items():
        for layer in LAYERS:
            kept = _kept(folder, label, layer)
            if not kept.is_dir():
                continue
            name = str(layers[layer]["name"])
            try:
                unchanged = _same(_files(layer, name), kept)
            except InputError:  # no such bundle any more
                unchanged = False
            if not unchanged:
                attribute = name.rpartition(".py:")[2]
                file = next(kept.glob("*.py"), None)
                layers[layer] = layers[layer] | {"name": str(kept) if file is None else f"{file}:{attribute}"}
    return content | {"policies": policies}


def _kept(folder: Path, label: str, layer: Layer) -> Path:
    return folder / _FOLDER / f"{quote(label, safe=' ')}.{layer}"


def _files(layer: Layer, name: str) -> list[Path]:
    """The files that a policy's name leads to; none for one that comes with servegym, a plugin or a module."""
    if name in names(layer) or name.startswith(PREFIX):
        return []
    file, colon, _ = name.rpartition(".py:")
    if colon:
        path = Path(f"{file}.py")
        return [path] if path.is_file() else []
    return [] if ":" in name else bundle_files(name)


def _same(files: list[Path], kept: Path) -> bool:
    """Whether these files are the kept ones, byte by byte."""
    there = {file.name: file for file in kept.iterdir()}
    return {file.name for file in files} == there.keys() and all(
        file.read_bytes() == there[file.name].read_bytes() for file in files
    )


def _copy(files: list[Path], kept: Path) -> None:
    kept.parent.mkdir(exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".", dir=kept.parent))
    for file in files:
        shutil.copyfile(file, fresh / file.name)
    fresh.chmod(0o755)
    os.replace(fresh, kept)
