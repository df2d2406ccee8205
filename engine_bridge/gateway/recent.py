"""What a deployment did lately: rates and latencies, for ``servegym deploy status``."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW_S = 30.0
# Of each kind of event; beyond 330 requests/s the window gets shorter, so that a look at it stays cheap.
_KEPT = 10_000
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class _Event:
    at_s: float
    policy: str
    engine: int
    value: float | bool | None


class RecentTraffic:
    """Remembers the last seconds; times are on the gateway's clock.

    Args:
        window_s: how long.
        kept: events of each kind, at most.
    """

    def __init__(self, window_s: float = WINDOW_S, kept: int = _KEPT) -> None:
        self._window_s = window_s
        self._sent: deque[_Event] = deque(maxlen=kept)
        self._first: deque[_Event] = deque(maxlen=kept)
        self._unserved: deque[tuple[float, str]] = deque(maxlen=kept)

    def sent(self, at_s: float, policy: str, engine: int, agrees: bool | None) -> None:
        """Note a decision, and whether a watching policy would have decided the same."""
        self._sent.append(_Event(at_s, policy, engine, agrees))

    def first_token(self, at_s: float, policy: str, engine: int, ttft_s: float) -> None:
        """Note a first token."""
        self._first.append(_Event(at_s, policy, engine, ttft_s))

    def unserved(self, at_s: float, reason: str) -> None:
        """Note a request that got no whole answer: ``failed``, ``refused`` or ``client left``."""
        self._unserved.append((at_s, reason))

    def summary(self, now_s: float, engines: int) -> dict[str, Any]:
        """Return what the window holds.

        Returns:
            ``window_s``; ``total`` with ``requests_per_s`` and ``ttft_s`` (p50, p90, p99, None without a first token);
            the same and ``share`` by policy in ``policies``; a list of the same by engine in ``engines``; requests per
            second without a whole answer, by reason, in ``unserved_per_s``; ``agreement``, the share of decisions that
            a watching policy shares, None without one.
        """
        full = [events[0].at_s for events in (self._sent, self._first) if len(events) == events.maxlen]
        start = max([now_s - self._window_s, 0.0, *full])
        span = max(now_s - start, 1e-3)
        sent = [event for event in self._sent if event.at_s >= start]
        first = [event for event in self._first if event.at_s >= start]
        by_policy, by_engine = Counter(e.policy for e in sent), Counter(e.engine for e in sent)
        names = sorted({event.policy for event in (*sent, *first)})
        agreed = [event.value for event in sent if event.value is not None]
        unserved = Counter(reason for at_s, reason in self._unserved if at_s >= start)
        return {
            "window_s": round(span, 1),
            "total": _traffic(len(sent), span, first),
            "policies": {
                name: {"share": round(by_policy[name] / max(len(sent), 1), 4)}
                | _traffic(by_policy[name], span, (e for e in first if e.policy == name))
                for name in names
            },
            "engines": [
                _traffic(by_engine[engine], span, (e for e in first if e.engine == engine)) for engine in range(engines)
            ],
            "unserved_per_s": {reason: round(count / span, 3) for reason, count in sorted(unserved.items())},
            "agreement": round(float(np.mean(agreed)), 4) if agreed else None,
        }


def _traffic(count: int, span_s: float, first: Iterable[_Event]) -> dict[str, Any]:
    ttft = [float(event.value) for event in first if event.value is not None]
    found = np.percentile(ttft, _PERCENTILES) if ttft else ()
    return {
        "requests_per_s": round(count / span_s, 3),
        "ttft_s": {f"p{p}": round(float(value), 5) for p, value in zip(_PERCENTILES, found, strict=False)} or None,
    }
