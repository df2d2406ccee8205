"""Run the cells of an evaluation, by workers, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

import servegym.engine_bridge.bundle  # noqa: F401 - makes bundles available by path
from servegym.agents.evaluation.config import Cell, EvaluationConfig, Row
from servegym.agents.evaluation.folder import append_cell, finished_cells, record_evaluation
from servegym.agents.evaluation.report import Evaluation
from servegym.agents.execution import open_executor
from servegym.agents.progress import Bar
from servegym.baselines.user_code import user_errors
from servegym.envs.requests import RequestSource
from servegym.envs.simulation import SimulationConfig, simulate

_sources: dict[str, RequestSource] = {}


def run_cell(config: EvaluationConfig, cell: Cell) -> list[Row]:
    """Run all policies on the requests of one cell: a row per policy."""
    index, level, seed = cell
    condition = config.conditions[index]
    key = condition.cluster.model_dump_json() + condition.workload.model_dump_json()
    if key not in _sources:
        _sources[key] = RequestSource(condition.workload, condition.cluster)
    source = _sources[key]
    table = source.table(seed, rate_rps=level) if config.rates_rps else source.table(seed, load=level)
    rows = []
    for label, policies in config.policies.items():
        simulation = SimulationConfig(
            cluster=condition.cluster,
            workload=condition.workload,
            policies=policies,
            slo=config.slo,
            warmup_share=config.warmup_share,
            seed=seed,
        )
        with user_errors():  # where the traceback is: it does not reach the parent process
            metrics = simulate(simulation, table=table).metrics()
        del metrics["wall_s"]
        rows.append({"workload": condition.label, config.level_name: level, "seed": seed, "policy": label} | metrics)
    return rows


def evaluate(
    config: EvaluationConfig,
    *,
    processes: int | None = None,
    out: Path | None = None,
    progress: bool = True,
    command: str | None = None,
) -> Evaluation:
    """Run an evaluation.

    Args:
        config: what to evaluate.
        processes: in place of the workers of ``config.backend``. The result does not depend on it. Live engines have
            one.
        out: folder for the results of finished cells; a second run with the same config goes on from there.
        progress: show a bar on stderr, where that is a terminal.
        command: the command line, which ``out`` remembers.

    Raises:
        InputError: unknown names, a bad trace, or ``out`` holds another evaluation.
        EngineError: live engines do not answer.
        WorkerError: workers were lost again and again.
    """
    cells = config.cells
    done = finished_cells(config, out)
    if out is not None:
        record_evaluation(out, config, command)
    missing = [cell for cell in cells if cell not in done]
    with (
        Bar("evaluating", len(cells), unit="cells", done=len(cells) - len(missing), quiet=not progress) as bar,
        closing(_runner(config, missing, processes, lambda share: bar.update(len(done) + share))) as finished,
    ):
        for cell, rows in finished:
            done[cell] = rows
            if out is not None:
                append_cell(out, cell, rows)
            bar.update(len(done))
    return Evaluation(config=config, rows=[row for cell in cells for row in done[cell]])


def _runner(
    config: EvaluationConfig, cells: list[Cell], processes: int | None, progress: Callable[[float], None]
) -> Generator[tuple[Cell, list[Row]], None, None]:
    if config.live is not None:
        # Only here: it needs the extra "live".
        from servegym.agents.evaluation.live import run_live

        yield from run_live(config, config.live, cells, progress)
        return
    with open_executor(config.backend, processes) as executor:
        yield from executor.run(run_cell, config, cells)
