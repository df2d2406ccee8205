"""What environments need of a run: the one protocol behind which the simulator and live engines stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from servegym.baselines.interface import FloatArray, QueueView
from servegym.envs.profiles.profile import Frontend
from servegym.envs.workloads.table import RequestTable


class RunSize(Protocol):
    """What environments ask of a cluster's configuration."""

    @property
    def size(self) -> int:
        """Number of engines."""


class RunMemory(Protocol):
    """Records of a run: of requests, of engines, and of the pending decision."""

    @property
    def requests(self) -> npt.NDArray[Any]:
        """Records with ``arrival_s``, ``first_s``, ``finish_s``, lengths and what became of them, shape (requests,)."""

    @property
    def engines(self) -> npt.NDArray[Any]:
        """Records with rates, queues and KV use, shape (engines,)."""

    @property
    def request_row(self) -> FloatArray:
        """``R_*`` entries of the request that needs an engine, shape (REQUEST_COLUMNS,)."""

    @property
    def engine_view(self) -> FloatArray:
        """``E_*`` columns at that decision, shape (engines, ENGINE_COLUMNS)."""

    @property
    def context_row(self) -> FloatArray:
        """``C_*`` entries of the engine that may admit, shape (CONTEXT_COLUMNS,)."""


class ServingRun(Protocol):
    """A run of a table of requests, simulated or live, that stops at decisions."""

    @property
    def config(self) -> RunSize:
        """The cluster."""

    @property
    def table(self) -> RequestTable:
        """The requests."""

    @property
    def memory(self) -> RunMemory:
        """Its records."""

    @property
    def frontend(self) -> Frontend | None:
        """What lies between a client and the times of the records; None: they are those of a client."""

    @property
    def expert_policies(self) -> Sequence[Any]:
        """The expert policy of each engine or group of them; empty where experts stay."""

    @property
    def totals(self) -> FloatArray:
        """Integrals of the reward's first parts up to ``decided_s``, shape (3,)."""

    @property
    def decided_s(self) -> float:
        """Time of the pending decision; at the end, the end."""

    @property
    def finished(self) -> int:
        """Requests that have ended."""

    @property
    def arrived(self) -> int:
        """Requests that have arrived."""

    def next_decision(self) -> bool:
        """Go on to the next request that needs an engine; False at the end."""

    def dispatch(self, engine: int) -> bool:
        """Answer, and go on."""

    def next_admission(self) -> int | None:
        """Go on to the next engine that may admit one of several requests; None at the end."""

    def admit(self, engine: int, request: int) -> None:
        """Answer."""

    def waiting_requests(self, engine: int) -> tuple[QueueView, npt.NDArray[np.int32]]:
        """Return the queue of an engine and which requests those are."""

    def run_until(self, time_s: float) -> bool:
        """Go on to a time; False if the run ended before."""

    def close(self) -> None:
        """Give back what the run holds."""
