"""The folder of an evaluation, beside its cells: what it was made from, so that its report can be made later.

::

    config.yaml      the config with all values resolved
    config.sha256    its hash; the folder holds results of no other
    origin.json      command line, versions, machine and commit of the run that began it
    cells.jsonl      a line per finished cell
    policies/        the user's policies, see servegym.agents.evaluation.kept
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from servegym.agents.evaluation.config import Cell, EvaluationConfig, Row
from servegym.agents.evaluation.kept import keep_policies, with_kept
from servegym.agents.evaluation.report import Evaluation
from servegym.agents.runs import atomic_write, write_json
from servegym.agents.versions import environment_record
from servegym.configuration import load_mapping, validate
from servegym.errors import InputError

_CONFIG = "config.yaml"
_ORIGIN = "origin.json"


def origin(command: str | None = None) -> dict[str, Any]:
    """Return what a result is made with, here and now: command line, versions, machine and commit."""
    return {"command": command} | environment_record()


def record_evaluation(folder: Path, config: EvaluationConfig, command: str | None) -> None:
    """Write down what the results of a folder come from; one that says so already keeps what it says.

    Args:
        folder: of the evaluation; it exists.
        config: what is evaluated.
        command: the command line.

    Raises:
        InputError: the folder holds results of another version of a policy.
    """
    keep_policies(folder, config)
    if not (folder / _CONFIG).is_file():
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)
        atomic_write(folder / _CONFIG, lambda file: file.write(text.encode()))
    if not (folder / _ORIGIN).is_file():
        write_json(folder / _ORIGIN, origin(command))


def load_evaluation(folder: Path) -> tuple[Evaluation, dict[str, Any]]:
    """Read a finished evaluation, and what it was made with.

    Raises:
        InputError: not such a folder, or cells are missing.
    """
    for name in (_CONFIG, _ORIGIN):
        if not (folder / name).is_file():
            problem = f"has no {name}; allowed: the folder of `servegym evaluate CONFIG --out {folder}`"
            raise InputError(str(folder), "", f"{problem}, which adds it to finished cells in seconds")
    content = with_kept(folder, load_mapping(folder / _CONFIG))
    config = validate(EvaluationConfig, content, str(folder / _CONFIG))
    done = _read_cells(folder)
    missing = [cell for cell in config.cells if cell not in done]
    if missing:
        problem = f"{len(missing)} of {len(config.cells)} cells are missing; the same `servegym evaluate` goes on"
        raise InputError(str(folder), "cells.jsonl", problem)
    rows = [row for cell in config.cells for row in done[cell]]
    return Evaluation(config, rows), json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))


def finished_cells(config: EvaluationConfig, out: Path | None) -> dict[Cell, list[Row]]:
    """Read the cells that an earlier run of the same config has finished; a line cut short does not count.

    Raises:
        InputError: the folder holds another evaluation.
    """
    if out is None:
        return {}
    out.mkdir(parents=True, exist_ok=True)
    stamp = out / "config.sha256"
    if stamp.is_file() and stamp.read_text(encoding="utf-8").strip() != config.digest():
        raise InputError(str(out), "", "holds the results of another evaluation; allowed: a new or empty folder")
    stamp.write_text(config.digest() + "\n", encoding="utf-8")
    return _read_cells(out)


def append_cell(out: Path, cell: Cell, rows: list[Row]) -> None:
    """Add the rows of a finished cell."""
    with (out / "cells.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"cell": cell, "rows": rows}) + "\n")


def _read_cells(folder: Path) -> dict[Cell, list[Row]]:
    done: dict[Cell, list[Row]] = {}
    path = folder / "cells.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        index, load, seed = entry["cell"]
        done[index, load, seed] = entry["rows"]
    return done
