"""Faults as a random process: SimPy processes that disturb each engine again and again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import simpy

from servegym.envs.simulator.config import Fault, RandomFault

_END = {"die": "recover", "hang": "resume", "slow": "slow", "mute": "unmute", "leave": "join"}
_STREAM = 0xFA17  # keeps the draws apart from all others of the same seed


class RandomFaults:
    """The processes of one run; each engine draws from a stream of its own per kind of fault.

    Args:
        environment: SimPy's environment of the run.
        faults: what may happen.
        engines: the kernel's ENGINE records, shape (engines,).
        apply: method of the cluster that carries out a fault now.
        seed: seed of the run.

    Attributes:
        log: what has happened, as explicit faults that would cause the same again.
    """

    def __init__(
        self,
        environment: simpy.Environment,
        faults: Sequence[RandomFault],
        engines: Any,
        apply: Callable[[Fault], None],
        seed: int,
    ) -> None:
        self.log: list[Fault] = []
        self._environment = environment
        self._engines = engines
        # Weak, as the cluster owns this object: what a finished run holds is free at once, without a collector.
        self._apply = weakref.WeakMethod(apply)
        self._disturbed: set[int] = set()
        for number, fault in enumerate(faults):
            for engine in range(len(engines)):
                rng = np.random.default_rng([_STREAM, seed, number, engine])
                environment.process(self._process(fault, engine, rng))

    @property
    def pending(self) -> bool:
        """Whether a fault will end, so that requests which wait for its engine may go on."""
        return bool(self._disturbed)

    def _process(self, fault: RandomFault, engine: int, rng: np.random.Generator) -> Generator[simpy.Event, Any, None]:
        while True:
            yield self._environment.timeout(rng.exponential(fault.mean_between_s))
            # Drawn in any case, so that what other processes do does not shift this one's stream.
            duration, factor = rng.exponential(fault.mean_duration_s), rng.uniform(*fault.factor)
            if engine in self._disturbed or not self._allowed(fault, engine):
                continue
            self._disturbed.add(engine)
            self._do(engine, fault.kind, factor if fault.kind == "slow" else 1.0)
            yield self._environment.timeout(duration)
            self._do(engine, _END[fault.kind], 1.0)
            self._disturbed.discard(engine)

    def _allowed(self, fault: RandomFault, engine: int) -> bool:
        records = self._engines
        serving = (records["alive"] > 0) & (records["accepting"] > 0) & (records["hung"] == 0)
        if fault.kind in ("slow", "mute"):
            return bool(records["alive"][engine])
        return bool(serving[engine]) and int(serving.sum()) > fault.min_alive

    def _do(self, engine: int, kind: Any, factor: float) -> None:
        fault = Fault(at_s=self._environment.now, engine=engine, kind=kind, factor=factor)
        self.log.append(fault)
        apply = self._apply()
        assert apply is not None
        apply(fault)
