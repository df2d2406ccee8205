"""Options of the command line that say where work runs: those of `evaluate`, `tune` and `train`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

Backend = Annotated[str | None, typer.Option(help="Where the work runs: local (this machine), ray, slurm.")]
Address = Annotated[
    str | None, typer.Option(help="Of a Ray cluster: auto, or HOST:PORT; default: a Ray of its own. Slurm: local.")
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", "--processes", min=1, help="Worker processes; default: one per core. Slurm: jobs."),
]


def backend_overrides(backend: str | None, address: str | None, workers: int | None) -> list[str]:
    """Return the options as overrides of a config's ``backend``; another backend takes nothing over from it.

    >>> backend_overrides("ray", None, 2)
    ['backend={"name": "ray"}', 'backend.workers=2']
    """
    found = [f"backend={json.dumps({'name': backend})}"] if backend is not None else []
    found += [f"backend.address={json.dumps(address)}"] if address is not None else []
    return found + ([f"backend.workers={workers}"] if workers is not None else [])
