"""Delays outside of the engines: what a profile's frontend adds before a scheduler's queue and after a step.

They are constants of a request, so that the engines' part of a run needs no events of its own for them: requests arrive
at the queue as much later as the frontend takes, follow-up turns too, and latencies are longer by both parts. What the
router and rewards count lasts from the queue to the end of the step, the same for all policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from servegym.envs.profiles.profile import Frontend
from servegym.envs.simulator.config import EngineSpec
from servegym.envs.workloads.table import RequestTable
from servegym.errors import InputError


def common_frontend(engines: Sequence[EngineSpec]) -> Frontend | None:
    """Return the frontend of a cluster's engines; None if their profiles have none.

    Raises:
        InputError: engines whose frontends differ.
    """
    first = engines[0].profile
    for spec in engines[1:]:
        if spec.profile is not first and spec.profile.frontend != first.frontend:
            raise InputError(
                "cluster",
                "profile",
                f"got {first.name} and {spec.profile.name}, whose frontends differ; allowed: equal frontends",
            )
    return first.frontend


def delayed(table: RequestTable, frontend: Frontend | None) -> RequestTable:
    """Return the requests as they reach the queues of the engines.

    Args:
        table: as they are sent.
        frontend: what lies between; None for nothing.
    """
    if frontend is None:
        return table
    before = frontend.before_s(table.prompt_tokens)
    return replace(
        table,
        arrival_s=table.arrival_s + before,
        think_s=np.where(table.parent >= 0, table.think_s + frontend.after_s + before, table.think_s),
    )
