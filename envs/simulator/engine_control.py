"""What may happen to the engines of a run: they die and recover, hang, slow down, fall silent, leave and join."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import simpy

from servegym.envs.simulator.build import Memory
from servegym.envs.simulator.config import EngineSpec, Fault
from servegym.envs.simulator.kernel import faults


class EngineControl:
    """Changes of a run's engines, at the time that its SimPy environment has reached.

    Attributes:
        environment: SimPy's environment of the run.
        memory: what the kernel works on.
        specs: the engines.
    """

    environment: simpy.Environment
    memory: Memory
    specs: Sequence[EngineSpec]

    def kill(self, engine: int) -> None:
        """Let an engine die now."""
        faults.kill(self.memory.cluster, engine, self.environment.now)

    def recover(self, engine: int) -> None:
        """Bring a dead engine back, empty."""
        faults.recover(self.memory.cluster, engine, self.environment.now)

    def hang(self, engine: int) -> None:
        """Stop an engine in the middle of its step."""
        faults.hang(self.memory.cluster, engine, self.environment.now)

    def resume(self, engine: int) -> None:
        """Let a hung engine go on."""
        faults.resume(self.memory.cluster, engine, self.environment.now)

    def leave(self, engine: int) -> None:
        """Drain an engine: no new requests."""
        faults.leave(self.memory.cluster, engine)

    def join(self, engine: int) -> None:
        """Let a drained engine take requests again."""
        faults.join(self.memory.cluster, engine, self.environment.now)

    def slow(self, engine: int, factor: float) -> None:
        """Multiply the engine's step times by ``factor``, from its next step."""
        self.memory.engines["slowdown"][engine] = self.specs[engine].slowdown * factor

    def report(self, engine: int, reporting: bool) -> None:
        """Stop or resume an engine's telemetry."""
        self.memory.engines["reporting"][engine] = reporting

    def schedule(self, fault: Fault) -> None:
        """Carry out a fault at its time."""
        self.environment.process(self._wait_for(fault))

    def apply(self, fault: Fault) -> None:
        """Carry out a fault now."""
        actions: dict[str, Callable[[int], None]] = {
            "die": self.kill,
            "recover": self.recover,
            "hang": self.hang,
            "resume": self.resume,
            "leave": self.leave,
            "join": self.join,
            "slow": lambda engine: self.slow(engine, fault.factor),
            "mute": lambda engine: self.report(engine, False),
            "unmute": lambda engine: self.report(engine, True),
        }
        actions[fault.kind](fault.engine)

    def _wait_for(self, fault: Fault) -> Generator[simpy.Event, Any, None]:
        yield self.environment.timeout(fault.at_s)
        self.apply(fault)
