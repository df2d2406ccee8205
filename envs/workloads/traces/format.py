"""What a trace format consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from servegym.envs.workloads.table import RequestTable
from servegym.envs.workloads.traces.files import TraceFile

if TYPE_CHECKING:
    from servegym.envs.workloads.traces.config import TraceConfig


@dataclass(frozen=True, slots=True)
class Trace:
    """What a file held.

    Attributes:
        table: open-loop requests in order of arrival.
        dropped: number of rows left out, by reason.
        cut: whether the reader has seen to the window and the rate itself.
    """

    table: RequestTable
    dropped: dict[str, int] = field(default_factory=dict)
    cut: bool = False


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """A format.

    Attributes:
        name: as in ``format`` of a trace's config.
        description: one line.
        source: where such traces come from, with their licence.
        columns: sets of columns, any of which identifies the format.
        read: reads a file.
    """

    name: str
    description: str
    source: str
    columns: tuple[tuple[str, ...], ...]
    read: Callable[[TraceFile, TraceConfig], Trace]


def in_order(
    arrival_s: npt.ArrayLike, prompt_tokens: npt.ArrayLike, output_tokens: npt.ArrayLike, **columns: npt.ArrayLike
) -> RequestTable:
    """Build a table sorted by arrival; rows of equal time keep their order. Shape (requests,) each."""
    arrival = np.asarray(arrival_s, dtype=np.float64)
    order = np.argsort(arrival, kind="stable")
    given: dict[str, Any] = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, **columns}
    return RequestTable.build(arrival[order], **{name: np.asarray(values)[order] for name, values in given.items()})


def drop(keep: npt.NDArray[np.bool_], columns: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Return the rows of all columns where ``keep`` holds."""
    return {name: values[keep] for name, values in columns.items()}
