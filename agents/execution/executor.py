"""The interface of all backends, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, Self, TypeVar

from servegym.agents.execution.config import BackendConfig

S = TypeVar("S")
U = TypeVar("U")
R = TypeVar("R")

LOSSES = 3
"""How often in a row workers may be lost before the work is given up."""


class Executor(Protocol):
    """Runs units of work; a context whose end leaves nothing running."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def run(self, function: Callable[[S, U], R], shared: S, units: Sequence[U]) -> Generator[tuple[U, R], None, None]:
        """Yield each unit with ``function(shared, unit)`` as it finishes, in any order.

        Args:
            function: of a module that workers can import; returns JSON-like data, the same one each time.
            shared: what all units share.
            units: what to run; units whose worker is lost run again.

        Raises:
            InputError: raised by a unit, or workers differ from this machine.
            WorkerError: workers were lost :data:`LOSSES` times in a row.
        """
        ...


def open_executor(backend: BackendConfig, workers: int | None = None, *, probe: bool = True) -> Executor:
    """Return the executor of a backend; it starts or connects when there is something to run.

    Args:
        backend: which one.
        workers: in place of ``backend.workers``.
        probe: in processes of this machine, run the first unit in this one: it reports bad input at once, and leaves
            compiled code on disk for the others.
    """
    backend = backend if workers is None else backend.model_copy(update={"workers": workers})
    executor: Any
    # Imported late: what they stand on comes with extras.
    if backend.name == "ray":
        from servegym.agents.execution.ray_cluster import RayExecutor

        executor = RayExecutor(backend)
    elif backend.name == "slurm":
        from servegym.agents.execution.slurm import SlurmExecutor

        executor = SlurmExecutor(backend)
    else:
        from servegym.agents.execution.local import LocalExecutor

        executor = LocalExecutor(backend.workers, probe=probe)
    return executor  # type: ignore[no-any-return]
