"""``servegym train --seeds``: one training run per seed, by the workers of a backend."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servegym.errors import InputError

if TYPE_CHECKING:
    from servegym.agents.training.config import TrainConfig


def train_seeds_command(config: TrainConfig, seeds: str | None, out: Path | None, *, quiet: bool) -> dict[str, Any]:
    """Train one policy per seed, print the results, and say which has the lowest objective.

    Args:
        config: what to train, and where.
        seeds: as in the option; default: the config's own.
        out: the folder; default: ``runs/NAME/seeds``.
        quiet: print nothing.

    Returns:
        The results as plain data.
    """
    from servegym.agents.runs import ROOT
    from servegym.agents.training.seeds import train_seeds

    chosen = [config.seed] if seeds is None else parse_seeds(seeds)
    folder = out or ROOT / config.name / "seeds"
    try:
        found = train_seeds(config, chosen, out=folder, progress=not quiet)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on with what {folder} holds", file=sys.stderr)
        raise
    for seed, result in found.items() if not quiet else ():
        print(f"seed {seed}: {result.steps:,} steps, objective {result.best_objective:.4f}: {result.folder}")
    if not quiet:
        print(f"lowest objective: {folder / 'best'} -> {(folder / 'best').readlink()}")
    return {"folder": str(folder), "runs": [{"seed": seed} | result.plain() for seed, result in found.items()]}


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of ``0-3`` or ``0,2,5``.

    >>> parse_seeds("0-2,7")
    [0, 1, 2, 7]

    Raises:
        InputError: something else, or a seed twice.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
        if last < first:
            raise InputError("--seeds", "", f"got {text}; allowed: 0-3, or 0,2,5")
        found.extend(range(first, last + 1))
    if len(set(found)) < len(found):
        raise InputError("--seeds", "", f"got {text}, a seed twice; allowed: each once")
    return found
