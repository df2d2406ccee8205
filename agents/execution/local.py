"""Units of work in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Self

from servegym.agents.execution.executor import LOSSES, R, S, U
from servegym.errors import WorkerError


class LocalExecutor:
    """Spawned processes, or this one where one is enough; they end with the context.

    Args:
        workers: how many; default: one per core. One: this process.
        probe: run the first unit here, before the processes start.
    """

    def __init__(self, workers: int | None = None, *, probe: bool = True) -> None:
        self._workers = workers or os.cpu_count() or 1
        self._probe = probe
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop(at_once=kind is not None)

    def run(self, function: Callable[[S, U], R], shared: S, units: Sequence[U]) -> Generator[tuple[U, R], None, None]:
        """Yield each unit with its result; see :class:`~servegym.agents.execution.executor.Executor`."""
        few = self._workers == 1 or len(units) <= 1
        here = len(units) if few else int(self._probe and self._pool is None)
        if here and not few:  # they import what the work needs while this process runs the first unit
            pool = self._started(len(units) - here)
            for _ in range(self._workers):
                pool.submit(_ready, function)
        for unit in units[:here]:
            yield unit, function(shared, unit)
        left = dict(enumerate(units[here:]))
        losses = 0
        while left:
            try:
                pool = self._started(len(left))
                futures: dict[Future[R], int] = {pool.submit(function, shared, left[at]): at for at in left}
                for future in as_completed(futures):
                    result = future.result()
                    losses = 0
                    yield left.pop(futures[future]), result
            except BrokenProcessPool:
                # One process died, and the pool with it; which unit it had is not known: all that are left run again.
                losses += 1
                self._stop(at_once=True)
                if losses > LOSSES:
                    raise WorkerError(
                        f"a worker process died {losses} times in a row (out of memory?); fewer need less: --workers"
                    ) from None

    def _started(self, units: int) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(min(self._workers, units), mp_context=context, initializer=_follow_parent)
        return self._pool

    def _stop(self, at_once: bool) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=not at_once, cancel_futures=at_once)
        for process in processes if at_once else ():
            process.terminate()


def _ready(function: Callable[..., object]) -> None:
    """Nothing more: a process that is handed a function has imported its module."""


def _follow_parent() -> None:
    """Ctrl-C is the parent's to handle: it ends the workers; they end by themselves where it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
