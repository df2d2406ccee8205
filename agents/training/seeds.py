"""Training runs as units of work: (config, seed) -> run folder.

A unit whose run is finished returns its result; one that was interrupted, or whose worker was lost, goes on from its
newest checkpoint. So a unit may run as often as it likes, anywhere where the folder is.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from servegym.agents.execution import open_executor
from servegym.agents.runs import ROOT, RunFolder, point
from servegym.agents.training.config import TrainConfig
from servegym.agents.training.progress import TrainingProgress
from servegym.agents.training.trainer import TrainResult, continuation, read_result, train
from servegym.errors import InputError

_LOOK_S = 2.0


def train_seeds(
    config: TrainConfig,
    seeds: Sequence[int],
    *,
    out: Path | None = None,
    progress: bool = True,
) -> dict[int, TrainResult]:
    """Train once per seed, by the workers of ``config.backend``; runs that are finished already are not repeated.

    Args:
        config: what to train; its own seed is not used.
        seeds: of the runs.
        out: the folder; the run of a seed is in ``seed-N``, and ``best`` points at the one with the lowest objective.
            Default: ``runs/NAME/seeds``.
        progress: show the steps of all runs on stderr, as far as their evaluations tell.

    Raises:
        InputError: a wrong config, or the folder holds runs of another one.
        WorkerError: workers were lost again and again.
    """
    out = out or ROOT / config.name / "seeds"
    folders = {seed: out / f"seed-{seed}" for seed in seeds}
    units = [(seed, str(folder)) for seed, folder in folders.items()]
    found: dict[int, TrainResult] = {}
    runs = [RunFolder(folder) for folder in folders.values()]
    with (
        _watched(runs, config.total_steps, progress) as shown,
        open_executor(config.backend, probe=False) as executor,
        closing(executor.run(train_seed, config, units)) as finished,
    ):
        for (seed, folder), _ in finished:
            run = RunFolder(Path(folder))
            if not run.done.is_file():
                raise InputError(
                    folder, "", "is not here, though its run has ended; allowed: a folder that workers share"
                )
            found[seed] = read_result(run)
            shown.say(f"seed {seed}: {found[seed].steps:,} steps, objective {found[seed].best_objective:.4f}")
    ordered = {seed: found[seed] for seed in seeds}
    point(out / "best", folders[min(ordered, key=lambda seed: ordered[seed].best_objective)].name)
    return ordered


def train_seed(config: TrainConfig, unit: tuple[int, str]) -> float:
    """Bring a run to its end: start it, go on with it, or find that it is there already.

    Args:
        config: of the run, its seed apart.
        unit: seed and run folder.

    Returns:
        The lowest objective.

    Raises:
        InputError: a wrong config, or the folder holds another run.
    """
    seed, folder = unit
    config = config.model_copy(update={"seed": seed})
    path = Path(folder)
    with _termination_interrupts():
        run = RunFolder(path)
        if run.done.is_file() or any(run.checkpoints.glob("step_*.pt")):
            return train(config, resume=path, progress=False).best_objective
        if run.config.is_file():  # lost before its first checkpoint
            continuation(config, run)
            shutil.rmtree(path)
        return train(config, out=path, progress=False).best_objective


@contextmanager
def _watched(runs: Sequence[RunFolder], steps: int, show: bool) -> Iterator[TrainingProgress]:
    """Show how far runs of so many steps are, wherever they run."""

    def done() -> int:
        return sum(min(run.evaluated_steps(), steps) for run in runs)

    def watch() -> None:
        while not over.wait(_LOOK_S):
            if (now := done()) > start:
                shown.trained(now, None, None)

    over, start = threading.Event(), done()
    with TrainingProgress(steps * len(runs), start, show) as shown:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield shown
        finally:
            over.set()
            watcher.join()


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Let SIGTERM, by which workers are ended, act as Ctrl-C, which writes a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
