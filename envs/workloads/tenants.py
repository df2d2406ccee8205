"""Several workloads at once on one cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from pydantic import Field

from servegym.configuration import Config
from servegym.envs.workloads.distributions import Positive
from servegym.envs.workloads.table import RequestTable
from servegym.envs.workloads.users import Deadline

# Identities that tenants do not share.
_OWN = ("user", "session", "stream", "template")


class Tenant(Config):
    """One of the workloads that a cluster serves together."""

    workload: str = Field(description="shipped workload or path of a workload file, not of a trace")
    share: Positive = Field(description="of the requests; only the ratios count")
    priority: int | None = Field(default=None, description="of all its requests, smaller runs first; default: its own")
    deadline: Deadline | None = Field(default=None, description="of its requests; default: its own")

    def stamped(self, table: RequestTable) -> dict[str, Any]:
        """Return the columns of the tenant's requests with its priority and its deadlines."""
        columns = {item.name: getattr(table, item.name) for item in fields(table) if item.name not in _PREFIX}
        if self.priority is not None:
            columns["priority"] = np.full(len(table), self.priority, dtype=np.int32)
        if self.deadline is not None:
            columns["deadline_s"] = self.deadline.of(table.prompt_tokens)
        return columns


_PREFIX = ("prefix_start", "prefix_ids", "prefix_block_tokens")


def superpose(parts: Sequence[dict[str, Any]]) -> RequestTable:
    """Merge the requests of several tenants in the order of their arrival.

    Args:
        parts: columns of a :class:`RequestTable` each, without block hashes; arrivals in order. Users, sessions,
            streams and templates of different parts are different ones, whatever their numbers.
    """
    merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    sizes = [len(part["arrival_s"]) for part in parts]
    for name in _OWN:
        offset, shifted = 0, []
        for part in parts:
            shifted.append(np.where(part[name] < 0, -1, part[name] + offset))
            offset += int(part[name].max()) + 1
        merged[name] = np.concatenate(shifted)
    firsts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    parent = np.where(merged["parent"] < 0, -1, merged["parent"] + firsts)
    order = np.argsort(merged["arrival_s"], kind="stable")
    position = np.empty(len(order) + 1, dtype=np.int64)  # the last entry is where parent -1 looks
    position[order], position[-1] = np.arange(len(order)), -1
    merged["parent"] = position[parent]
    return RequestTable.build(**{name: column[order] for name, column in merged.items()})
