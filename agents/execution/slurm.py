"""Units of work by Slurm jobs, with submitit.

A job takes one unit after the other until none is left: it claims a unit by a file in a folder that all machines share,
and leaves the result there. A unit that a lost job had claimed is free again, and another job takes its place.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, Self

import submitit

from servegym.agents.execution.config import BackendConfig
from servegym.agents.execution.executor import LOSSES, R, S, U
from servegym.agents.execution.origin import Origin
from servegym.agents.runs import ROOT, fresh_folder, write_json
from servegym.errors import InputError, WorkerError

_JOBS = 8
_DEFAULTS = {"timeout_min": 240, "cpus_per_task": 1}
_CANCEL_S = 10.0


class SlurmExecutor:
    """Jobs of Slurm, or processes that submitit runs in their place; they end with the context.

    Args:
        backend: number and options of the jobs.
    """

    def __init__(self, backend: BackendConfig) -> None:
        self._backend = backend
        self._period_s = 0.1 if backend.address == "local" else 1.0
        self._jobs: dict[str, submitit.Job[None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for job in self._jobs.values():
            job.cancel(check=False)
        # Processes end at once; of jobs that are cancelled, Slurm takes care.
        deadline = time.monotonic() + (_CANCEL_S if self._backend.address == "local" else 0)
        while not all(job.done() for job in self._jobs.values()) and time.monotonic() < deadline:
            time.sleep(self._period_s)

    def run(self, function: Callable[[S, U], R], shared: S, units: Sequence[U]) -> Generator[tuple[U, R], None, None]:
        """Yield each unit with its result; see :class:`~servegym.agents.execution.executor.Executor`."""
        if not units:
            return
        folder = fresh_folder(ROOT / "slurm").resolve()
        submitter = self._submitter(folder)
        work = (_work, Origin.here(), function, shared, list(units), folder)
        left, losses, number = dict(enumerate(units)), 0, 0
        while left:
            # In this order: the results of a job that has ended are all there.
            ended = [name for name, job in self._jobs.items() if job.done()]
            for at in [at for at in left if (folder / f"{at}.json").is_file()]:
                losses = 0
                yield left.pop(at), _result(folder / f"{at}.json")
            for name in ended:
                del self._jobs[name]
            free = self._free(folder, list(left))
            losses += len(ended) if free else 0
            if losses > LOSSES:
                raise WorkerError(f"{losses} jobs in a row ended without a result; their logs: {folder / 'jobs'}")
            for _ in range(min(len(free), (self._backend.workers or _JOBS) - len(self._jobs))):
                self._jobs[str(number)] = submitter.submit(*work, str(number))
                number += 1
            time.sleep(self._period_s if left else 0)
        self._jobs.clear()
        shutil.rmtree(folder, ignore_errors=True)

    def _free(self, folder: Path, left: list[int]) -> list[int]:
        """Return the units that no running job has claimed."""
        found = []
        for at in left:
            claim = folder / f"{at}.claim"
            try:
                owner = claim.read_text()
            except FileNotFoundError:
                found.append(at)
                continue
            if owner not in self._jobs:
                claim.unlink()
                found.append(at)
        return found

    def _submitter(self, folder: Path) -> submitit.AutoExecutor:
        try:
            submitter = submitit.AutoExecutor(folder / "jobs", cluster=self._backend.address or "slurm")
            submitter.update_parameters(name="servegym", **_DEFAULTS | self._backend.options)
        except (RuntimeError, NameError, ValueError, AssertionError, TypeError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            reason = " ".join(str(error).split())
            raise InputError(
                "backend", "slurm", f"{reason}; allowed: a machine that submits jobs, or --address local to try it"
            ) from None
        return submitter


def _work(
    origin: Origin, function: Callable[[S, U], R], shared: S, units: Sequence[U], folder: Path, name: str
) -> None:
    """Run all units that nobody else has claimed."""
    mark = folder / f"{name}.job"
    mark.write_text(name)
    for at, unit in enumerate(units):
        try:
            os.link(mark, folder / f"{at}.claim")  # at once with its content, or not at all
        except FileExistsError:
            continue
        outcome: dict[str, Any]
        try:
            origin.enter()
            outcome = {"result": function(shared, unit)}
        except InputError as error:
            outcome = {"input": [error.source, error.field, error.problem]}
        except Exception:
            outcome = {"error": traceback.format_exc()}
        write_json(folder / f"{at}.json", outcome)


def _result(path: Path) -> Any:
    outcome = json.loads(path.read_text(encoding="utf-8"))
    if "input" in outcome:
        raise InputError(*outcome["input"])
    if "error" in outcome:
        raise RuntimeError(f"a unit of work failed\n{outcome['error']}")
    return outcome["result"]
