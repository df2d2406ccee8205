"""Moving experts: the expert policy is asked, and its placement comes into force layer by layer or in one stall."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import simpy

from servegym.baselines.expert.loads import check_placement
from servegym.baselines.interface import ExpertLoad, ExpertPolicy, FloatArray, Placement
from servegym.envs.simulator.experts.group import ExpertGroup
from servegym.errors import InputError


class Replacer:
    """Re-placements of one group.

    Attributes:
        count: re-placements begun.
        transfer_s: time that transfers took, seconds.
        busy: a transfer is under way; the policy is not asked meanwhile.
    """

    def __init__(self, group: ExpertGroup, environment: simpy.Environment) -> None:
        self.group = group
        self.count = 0
        self.transfer_s = 0.0
        self.busy = False
        self._environment = environment

    def postpone(self) -> None:
        """Set the next question one interval later."""
        self.group.record["next_placement"] += self.group.config.replacement.interval_steps

    def ask(self, policy: ExpertPolicy, now_s: float, future: FloatArray | None = None) -> None:
        """Ask the policy, unless a transfer is under way, and begin what it wants.

        Raises:
            InputError: the policy's placement loses an expert or has another shape.
        """
        self.postpone()
        if self.busy:
            return
        wanted = policy.place(self.load(policy, future), self.group.placement)
        if wanted is not None:
            self.begin(wanted, now_s)

    def load(self, policy: ExpertPolicy, future: FloatArray | None = None) -> ExpertLoad:
        """Return the load of the last window, with what a policy needs of it."""
        return self.group.load(
            sources=getattr(policy, "needs_sources", False),
            coactivation=getattr(policy, "needs_coactivation", False),
            future=future if getattr(policy, "needs_oracle", False) else None,
        )

    def begin(self, wanted: Placement, now_s: float) -> None:
        """Begin to move to another placement.

        Raises:
            InputError: it loses an expert or has another shape.
        """
        current = self.group.placement
        experts = int(self.group.record["experts"][0])
        check_placement(wanted, experts)
        if wanted.physical_to_logical.shape != current.physical_to_logical.shape or wanted.ranks != current.ranks:
            raise InputError(
                "placement",
                "",
                f"got {wanted.physical_to_logical.shape} on {wanted.ranks} ranks; allowed:"
                f" {current.physical_to_logical.shape} on {current.ranks} ranks",
            )
        times = self.group.transfer_s(wanted)
        layers = np.flatnonzero(times > 0.0)
        if len(layers) == 0:
            return
        self.count += 1
        self.transfer_s += float(times.sum())
        if self.group.config.replacement.mode == "stall":
            self.group.record["stall_s"] += times.sum()
            self.group.set_layers(layers, wanted.physical_to_logical[layers])
        else:
            self.busy = True
            self._environment.process(self._transfer(wanted, layers, times, now_s))

    def _transfer(
        self, wanted: Placement, layers: Any, times: FloatArray, start_s: float
    ) -> Generator[simpy.Event, Any, None]:
        record = self.group.record
        record["exchange_factor"] = 1.0 / (1.0 - self.group.config.replacement.link_share)
        end = start_s
        for layer in layers:
            end += times[layer]
            yield self._environment.timeout(max(end - self._environment.now, 0.0))
            self.group.set_layers(np.array([layer]), wanted.physical_to_logical[layer : layer + 1])
        record["exchange_factor"] = 1.0
        self.busy = False
