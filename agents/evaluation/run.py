"""Run the cells of an evaluation, in worker processes, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import servegym.engine_bridge.bundle  # noqa: F401 - makes bundles available by path
from servegym.agents.evaluation.config import EvaluationConfig
from servegym.agents.evaluation.report import Evaluation
from servegym.envs.requests import RequestSource
from servegym.envs.simulation import SimulationConfig, simulate
from servegym.errors import InputError

Cell = tuple[int, float, int]
Row = dict[str, Any]

_sources: dict[str, RequestSource] = {}


def run_cell(config: EvaluationConfig, cell: Cell) -> list[Row]:
    """Run all policies on the requests of one cell, (index of the workload, load or rate, seed): a row per policy."""
    index, level, seed = cell
    choice = config.workloads[index].model_copy(update={"load": None, "rate_rps": None})
    key = config.cluster.model_dump_json() + choice.model_dump_json()
    source = _sources.setdefault(key, RequestSource(choice, config.cluster))
    table = source.table(seed, rate_rps=level) if config.rates_rps else source.table(seed, load=level)
    rows = []
    for label, policies in config.policies.items():
        simulation = SimulationConfig(
            cluster=config.cluster,
            workload=choice,
            policies=policies,
            slo=config.slo,
            warmup_share=config.warmup_share,
            seed=seed,
        )
        metrics = simulate(simulation, table=table).metrics()
        del metrics["wall_s"]
        rows.append({"workload": choice.label, config.level_name: level, "seed": seed, "policy": label} | metrics)
    return rows


def evaluate(
    config: EvaluationConfig, *, processes: int | None = None, out: Path | None = None, progress: bool = True
) -> Evaluation:
    """Run an evaluation.

    Args:
        config: what to evaluate.
        processes: worker processes; default: one per core. The result does not depend on it. Live engines have one.
        out: folder for the results of finished cells; a second run with the same config goes on from there.
        progress: show a bar on stderr, where that is a terminal.

    Raises:
        InputError: unknown names, a bad trace, or ``out`` holds another evaluation.
        EngineError: live engines do not answer.
    """
    cells: list[Cell] = [
        (index, level, seed)
        for index in range(len(config.workloads))
        for level in config.levels
        for seed in config.seed_list
    ]
    done = _finished(config, out)
    missing = [cell for cell in cells if cell not in done]
    with _bar(progress, len(cells), len(cells) - len(missing)) as advance:
        for cell, rows in _runner(config, missing, processes):
            done[cell] = rows
            if out is not None:
                _append(out, cell, rows)
            advance()
    return Evaluation(config=config, rows=[row for cell in cells for row in done[cell]])


def _runner(config: EvaluationConfig, cells: list[Cell], processes: int | None) -> Iterator[tuple[Cell, list[Row]]]:
    if config.live is None:
        return _run(config, cells, processes or os.cpu_count() or 1)
    # Only here: it needs the extra "live".
    from servegym.agents.evaluation.live import run_live

    return run_live(config, config.live, cells)


def _run(config: EvaluationConfig, cells: list[Cell], processes: int) -> Iterator[tuple[Cell, list[Row]]]:
    if processes == 1 or len(cells) <= 1:
        for cell in cells:
            yield cell, run_cell(config, cell)
        return
    # The first cell here: it reports bad input at once and leaves the compiled kernel on disk for the workers.
    yield cells[0], run_cell(config, cells[0])
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(cells) - 1), mp_context=context, initializer=_ignore_interrupts)
    try:
        pending: dict[Future[list[Row]], Cell] = {pool.submit(run_cell, config, cell): cell for cell in cells[1:]}
        while pending:
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                yield pending.pop(future), future.result()
    except BaseException:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise
    pool.shutdown()


def _ignore_interrupts() -> None:
    """Ctrl-C is the parent's to handle: it ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _finished(config: EvaluationConfig, out: Path | None) -> dict[Cell, list[Row]]:
    """Read the cells that an earlier run of the same config has finished; a line cut short does not count."""
    done: dict[Cell, list[Row]] = {}
    if out is None:
        return done
    out.mkdir(parents=True, exist_ok=True)
    stamp = out / "config.sha256"
    if stamp.is_file() and stamp.read_text(encoding="utf-8").strip() != config.digest():
        raise InputError(str(out), "", "holds the results of another evaluation; allowed: a new or empty folder")
    stamp.write_text(config.digest() + "\n", encoding="utf-8")
    path = out / "cells.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        index, load, seed = entry["cell"]
        done[index, load, seed] = entry["rows"]
    return done


def _append(out: Path, cell: Cell, rows: list[Row]) -> None:
    with (out / "cells.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"cell": cell, "rows": rows}) + "\n")


@contextmanager
def _bar(show: bool, total: int, done: int) -> Iterator[Any]:
    if not (show and sys.stderr.isatty()):
        yield lambda: None
        return
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda: bar.advance(task)
