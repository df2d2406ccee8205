"""Which engines may be sent to: ejected after failures, readmitted when they answer again, drained on request."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from servegym.engine_bridge.router.table import EngineTable

_REQUESTS, _PROBES = 3, 2
_EJECTION_S, _LONGEST_S = 5.0, 60.0


@dataclass(slots=True)
class _State:
    failed_requests: int = 0
    failed_probes: int = 0
    ejections: int = 0  # in a row: a good request forgets them
    all_ejections: int = 0
    ejected_until_s: float = 0.0
    ejected: bool = False
    drained: bool = False
    absent: bool = False


class Health:
    """Keeps the column ``available`` of a table.

    Three failed requests or two failed probes in a row eject an engine, for 5 s times the number of its ejections, at
    most a minute; after that, the next good probe readmits it. The last engine is never ejected: a request has a
    better chance there than nowhere.

    Args:
        table: the engines.
        on_change: called with an engine whose availability has changed.
        vacant: places where no engine is yet.
    """

    def __init__(
        self,
        table: EngineTable,
        on_change: Callable[[int], None] = lambda engine: None,
        vacant: Collection[int] = (),
    ) -> None:
        self._table = table
        self._states = [_State(absent=engine in vacant) for engine in range(len(table))]
        self._on_change = on_change
        for engine in vacant:
            table.set_available(engine, False)

    def available(self, engine: int) -> bool:
        """Whether an engine may be sent to."""
        state = self._states[engine]
        return not state.ejected and not state.drained and not state.absent

    def present(self, engine: int) -> bool:
        """Whether there is an engine at this place."""
        return not self._states[engine].absent

    def describe(self, engine: int) -> str:
        """Say ``up``, ``ejected``, ``draining`` or ``gone``."""
        state = self._states[engine]
        return "gone" if state.absent else "draining" if state.drained else "ejected" if state.ejected else "up"

    def ejections(self, engine: int) -> int:
        """Return how often an engine has been ejected."""
        return self._states[engine].all_ejections

    def probed(self, engine: int, good: bool, now_s: float) -> None:
        """Note how a probe ended."""
        state = self._states[engine]
        state.failed_probes = 0 if good else state.failed_probes + 1
        if not good and state.failed_probes >= _PROBES:
            self._eject(engine, now_s)
        elif good and state.ejected and now_s >= state.ejected_until_s:
            state.ejected, state.failed_requests = False, 0
            self._changed(engine)

    def served(self, engine: int, good: bool, now_s: float) -> None:
        """Note how a request ended."""
        state = self._states[engine]
        if good:
            state.failed_requests = state.ejections = 0
            return
        state.failed_requests += 1
        if state.failed_requests >= _REQUESTS:
            self._eject(engine, now_s)

    def drain(self, engine: int, drained: bool) -> None:
        """Send nothing new to an engine, or send to it again."""
        self._states[engine].drained = drained
        self._changed(engine)

    def leave(self, engine: int) -> None:
        """Note that an engine is gone, by the word of those who run it."""
        self._states[engine].absent = True
        self._changed(engine)

    def join(self, engine: int, anew: bool = False) -> None:
        """Note that an engine is there, or there again; ``anew``: another one than before."""
        if anew:
            self._states[engine] = _State()
        self._states[engine].absent = False
        self._changed(engine)

    def _eject(self, engine: int, now_s: float) -> None:
        state = self._states[engine]
        others = any(self.available(other) for other in range(len(self._states)) if other != engine)
        if state.ejected or not others:
            return
        state.ejections += 1
        state.all_ejections += 1
        state.ejected = True
        state.ejected_until_s = now_s + min(_EJECTION_S * state.ejections, _LONGEST_S)
        self._changed(engine)

    def _changed(self, engine: int) -> None:
        self._table.set_available(engine, self.available(engine))
        self._on_change(engine)
