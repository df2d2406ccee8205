"""Units of work for tests of executors: workers import them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from servegym.errors import InputError


def doubled_once_lost(folder: str, unit: int) -> dict[str, float]:
    """Die with the first worker that takes unit 2, and note each attempt."""
    with (Path(folder) / f"attempts-{unit}").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if unit == 2 and len((Path(folder) / "attempts-2").read_text().split()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"twice": 2 * unit, "share": unit / 3}


def always_lost(shared: None, unit: int) -> None:
    """Die with every worker."""
    os.kill(os.getpid(), signal.SIGKILL)


def refused(shared: None, unit: int) -> None:
    """Find bad input."""
    raise InputError("some.yaml", "a.b", f"got {unit}; allowed: nothing")


def place(shared: None, unit: int) -> str:
    """Where a worker is."""
    return os.getcwd()
