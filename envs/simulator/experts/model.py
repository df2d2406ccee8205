"""The expert model of a cluster: its groups, and which tokens its requests bring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.baselines.interface import FloatArray
from servegym.envs.profiles.profile import ExpertShape, Profile
from servegym.envs.simulator.experts.config import ExpertsConfig
from servegym.envs.simulator.experts.costs import expert_costs
from servegym.envs.simulator.experts.group import ExpertGroup, new_groups
from servegym.envs.simulator.experts.routing.config import make_bank
from servegym.envs.workloads.table import RequestTable
from servegym.errors import InputError


class ExpertModel:
    """The expert-parallel groups of a cluster: one of all engines in lockstep, else one of each engine.

    Attributes:
        groups: one entry per group.
        records: their EXPERTS records, shape (groups,).
        task: what each request's tokens are about, shape (requests,), int32.
        bank: the routing of tokens.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        profiles: Sequence[Profile],
        table: RequestTable,
        *,
        lockstep: bool,
        seed: int,
    ) -> None:
        """Lay out the groups.

        Raises:
            InputError: a profile without experts, slots or ranks that do not divide, a routing of another shape.
        """
        shape = _common_shape(profiles)
        engines = len(profiles) if lockstep else 1
        ranks = config.ranks or engines
        check_ranks(config, shape, ranks, engines)
        self.config = config
        self.bank = make_bank(config.routing, shape.layers, shape.experts, shape.top_k)
        self.task = config.task_mix.assign(table.arrival_s, table.session, seed, self.bank.task_names)
        self.records = new_groups(1 if lockstep else len(profiles))
        budget = max(profile.engine.max_num_batched_tokens for profile in profiles) * engines
        mix = self.weights_at(0.0)
        self.groups = [
            ExpertGroup(
                self.records,
                index,
                config,
                shape,
                expert_costs(profiles[index], ranks, engines, budget),
                self.bank,
                ranks=ranks,
                engines=engines,
                first_engine=index,
                mix=mix,
                seed=seed,
            )
            for index in range(len(self.records))
        ]

    def weights_at(self, time_s: float) -> FloatArray:
        """Return the shares of tasks among the requests that arrive at a time, shape (tasks,)."""
        return np.asarray(self.config.task_mix.weights_at(np.array([time_s]), self.bank.task_names)[0])

    def sequences(self, seed: int) -> tuple[npt.NDArray[Any], ...]:
        """Draw the sequence of the bank that each request follows: its start, its length, and where it begins.

        Each of shape (requests,); int64, int32 and int32.
        """
        rng = np.random.default_rng((seed, 0x5E9))
        starts, tasks = self.bank.sequence_start, self.bank.task
        chosen = np.empty(len(self.task), dtype=np.int64)
        for task in range(len(self.bank.task_names)):
            mine = self.task == task
            chosen[mine] = rng.choice(np.flatnonzero(tasks == task), size=int(mine.sum()))
        lengths = (starts[chosen + 1] - starts[chosen]).astype(np.int32)
        offsets = (rng.random(len(chosen)) * lengths).astype(np.int32)
        return starts[chosen], lengths, offsets


def _common_shape(profiles: Sequence[Profile]) -> ExpertShape:
    shapes = {profile.experts for profile in profiles}
    for profile in profiles:
        if profile.experts is None:
            raise InputError(
                "cluster", "experts", f"profile {profile.name} has no section experts; allowed: a profile with one"
            )
    if len(shapes) > 1:
        raise InputError("cluster", "experts", "engines of different experts; allowed: the same in all profiles")
    shape = shapes.pop()
    assert shape is not None
    return shape


def check_ranks(config: ExpertsConfig, shape: ExpertShape, ranks: int, engines: int) -> None:
    """Make sure that experts, ranks and engines divide.

    Raises:
        InputError: names the field, the value and what is allowed.
    """
    slots = shape.experts + config.redundant_experts
    if slots % ranks:
        raise InputError(
            "cluster",
            "experts.ranks",
            f"{slots} slots ({shape.experts} experts + {config.redundant_experts} redundant) on {ranks} ranks;"
            " allowed: slots that are a multiple of ranks",
        )
    if ranks % engines:
        raise InputError(
            "cluster", "experts.ranks", f"got {ranks} on {engines} engines in lockstep; allowed: a multiple of engines"
        )
