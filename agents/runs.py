"""Run folders: one training run, everything that it came from and all that it left behind.

::

    runs/NAME/TIMESTAMP/            runs/NAME/latest points at the newest
        config.yaml                 the config with all values resolved
        versions.json               Python, packages, machine and git commit
        tensorboard/                scalars over time
        checkpoints/step_*.pt       the newest few states to resume from
        evaluations.jsonl           one JSON object per evaluation
        policy/                     bundle of the best policy so far
        policy_last/                bundle of the newest policy
        done.json                   the result, once the run is complete
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from servegym.agents.versions import environment_record
from servegym.errors import InputError

ROOT = Path("runs")
KEPT_CHECKPOINTS = 3


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name and rename it, so that its reader never sees half of it.

    Args:
        path: the file.
        write: called with the open file.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """Return plain data with None in place of numbers that do not exist, for JSON.

    >>> finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON, atomically."""
    atomic_write(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


class RunFolder:
    """Paths and files of one run.

    Args:
        path: the folder; it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.evaluations = path / "evaluations.jsonl"
        self.policy = path / "policy"
        self.policy_last = path / "policy_last"
        self.done = path / "done.json"

    @classmethod
    def create(cls, name: str, out: str | Path | None, config: Mapping[str, Any]) -> RunFolder:
        """Make the folder of a new run and write down what it starts from.

        Args:
            name: of the run.
            out: the folder; default ``runs/NAME/TIMESTAMP``, which ``runs/NAME/latest`` then points at.
            config: resolved config, as plain data.

        Raises:
            InputError: ``out`` is there and not empty, or cannot be made.
        """
        try:
            if out is None:
                path = fresh_folder(ROOT / name)
                point(ROOT / name / "latest", path.name)
            else:
                path = Path(out)
                path.mkdir(parents=True, exist_ok=True)
                if any(path.iterdir()):
                    raise InputError("--out", str(path), "is not empty; to go on with a run, resume it")
            run = cls(path)
            run.checkpoints.mkdir()
        except OSError as error:
            raise InputError("--out", str(out or ROOT / name), f"cannot be written: {error.strerror}") from None
        run.write_config(config)
        write_json(path / "versions.json", environment_record())
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Return an existing run.

        Raises:
            InputError: not a run folder.
        """
        run = cls(Path(path).resolve())
        if not run.config.is_file():
            raise InputError(str(path), "", f"not a run folder: it has no {run.config.name}")
        return run

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved config, plain data."""
        text = yaml.safe_dump(dict(config), sort_keys=False, width=100)
        atomic_write(self.config, lambda file: file.write(text.encode()))

    def newest_checkpoint(self) -> Path:
        """Return the checkpoint with the most steps.

        Raises:
            InputError: there is none.
        """
        found = sorted(self.checkpoints.glob("step_*.pt"))
        if not found:
            raise InputError(str(self.path), "checkpoints", "empty: the run cannot be resumed")
        return found[-1]

    def add_checkpoint(self, steps: int, write: Callable[[BinaryIO], object]) -> Path:
        """Write a checkpoint and drop the oldest beyond :data:`KEPT_CHECKPOINTS`."""
        path = self.checkpoints / f"step_{steps:012d}.pt"
        atomic_write(path, write)
        for old in sorted(self.checkpoints.glob("step_*.pt"))[:-KEPT_CHECKPOINTS]:
            old.unlink(missing_ok=True)
        return path

    def add_evaluation(self, row: Mapping[str, Any]) -> None:
        """Append one evaluation."""
        with self.evaluations.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def evaluated_steps(self) -> int:
        """Return the steps at the last evaluation; 0 before the first."""
        try:
            return int(json.loads(self.evaluations.read_text(encoding="utf-8").splitlines()[-1])["steps"])
        except (OSError, IndexError, json.JSONDecodeError):
            return 0

    def forget_after(self, steps: int) -> None:
        """Drop evaluations later than a checkpoint that the run goes back to."""
        if self.evaluations.is_file():
            lines = self.evaluations.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["steps"] <= steps]
            atomic_write(self.evaluations, lambda file: file.write("".join(line + "\n" for line in kept).encode()))


def fresh_folder(parent: Path) -> Path:
    """Make a folder named by the time; a second one within the same second gets a suffix."""
    parent.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        path = parent / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise OSError(0, f"too many runs at {stamp}")


def point(link: Path, target: str) -> None:
    """Make ``link`` a symbolic link to ``target``, replacing an older one in one step."""
    fresh = link.with_name(f".{link.name}-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, link)
