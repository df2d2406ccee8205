"""Units of work as tasks of a Ray cluster, which runs those of lost workers and machines again."""

from __future__ import annotations

import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, redirect_stdout
from typing import Any, Self
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError, RayTaskError

from servegym.agents.execution.config import BackendConfig
from servegym.agents.execution.executor import LOSSES, R, S, U
from servegym.agents.execution.origin import Origin
from servegym.errors import InputError, WorkerError

_IN_FLIGHT = 1000
_OBJECT_STORE_BYTES = 100_000_000
_CONNECT_S, _CANCEL_S = 5.0, 5.0
# What an HTTP/2 client says first, here with empty settings; a server's first words are its own settings.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
_SETTINGS = 4


class RayExecutor:
    """Tasks of one CPU each, on a cluster or on a Ray of its own, which ends with the context.

    Args:
        backend: address, and units at a time.
    """

    def __init__(self, backend: BackendConfig) -> None:
        self._backend = backend
        self._connected = False
        self._redirected = ExitStack()
        self._running: dict[Any, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._connected:
            return
        if self._running and kind is not None:
            for task in self._running:
                ray.cancel(task)  # as Ctrl-C, so that training writes a checkpoint
            ray.wait(list(self._running), num_returns=len(self._running), timeout=_CANCEL_S)
        ray.shutdown()
        self._redirected.close()

    def run(self, function: Callable[[S, U], R], shared: S, units: Sequence[U]) -> Generator[tuple[U, R], None, None]:
        """Yield each unit with its result; see :class:`~servegym.agents.execution.executor.Executor`."""
        if not units:
            return
        self._connect()
        task = ray.remote(num_cpus=1, max_retries=LOSSES)(_unit)
        common = ray.put((Origin.here(), function, shared))
        waiting = deque(units)
        while waiting or self._running:
            while waiting and len(self._running) < (self._backend.workers or _IN_FLIGHT):
                unit = waiting.popleft()
                self._running[task.remote(common, unit)] = unit
            (done, *_), _ = ray.wait(list(self._running))
            unit = self._running.pop(done)
            yield unit, _result(done)

    def _connect(self) -> None:
        if self._connected:
            return
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        address = self._backend.address or os.environ.get("RAY_ADDRESS")
        if address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(
                address="local",
                num_cpus=self._backend.workers,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                **quiet,
            )
        else:
            _reach(address)
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise _refused(address, str(error)) from None
        self._connected = True
        # Where Ray tells of lost workers; stdout is for results.
        self._redirected.enter_context(redirect_stdout(sys.stderr))


def _unit(common: tuple[Origin, Callable[[S, U], R], S], unit: U) -> R:
    origin, function, shared = common
    origin.enter()
    return function(shared, unit)


def _result(task: Any) -> Any:
    try:
        return ray.get(task)
    except RayTaskError as error:
        # What the unit raised, without Ray's words around it.
        raise (error.cause if isinstance(error.cause, InputError) else error) from None
    except RayError as error:
        raise WorkerError(f"a unit of work lost its worker {LOSSES + 1} times: {_line(error)}") from None


def _reach(address: str) -> None:
    """Make sure that a gRPC server answers, as Ray itself would try for minutes."""
    if address == "auto":
        return
    try:
        place = urlsplit(f"//{address}")
        with socket.create_connection((place.hostname, place.port), timeout=_CONNECT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
                connection.sendall(_GREETING)
                if connection.recv(9)[3:4] != bytes([_SETTINGS]):
                    raise OSError("what answers there is no Ray cluster")
    except (OSError, ValueError) as error:
        raise _refused(address, getattr(error, "strerror", None) or str(error)) from None


def _refused(address: str, reason: str) -> InputError:
    return InputError(
        "backend",
        "address",
        f"got {address}: {_line(reason)}; allowed: HOST:PORT of a Ray cluster that runs (ray start --head)",
    )


def _line(error: object) -> str:
    return str(error).strip().partition("\n")[0]
