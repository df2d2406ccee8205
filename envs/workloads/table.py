"""The table of requests that a workload produces and a simulator or a replayer consumes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.errors import InputError

Float = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


def _empty_int64() -> Int64:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class RequestTable:
    """Requests of one run, one array per property, shape (requests,) each. ``-1`` stands for "none".

    Open-loop requests have ``parent == -1`` and arrive at ``arrival_s``. A follow-up turn of a session names its
    previous turn in ``parent`` (a smaller index) and arrives ``think_s`` seconds after that turn has finished, whatever
    its ``arrival_s`` says. A request has at most one follow-up.

    Prefix sharing is a matter of identity, not of token values. Token ``p`` of the sequence prompt + output is the
    token ``(template, p)`` for ``p < template_tokens`` and ``(stream, p)`` after that: requests of one session share a
    stream, since each turn's prompt repeats the sequence so far. A trace that carries block hashes gives them instead
    in ``prefix_ids`` (compressed rows: request ``i`` has ``prefix_ids[prefix_start[i]:prefix_start[i + 1]]``, one id
    per ``prefix_block_tokens`` prompt tokens, each id standing for the whole prefix up to its end); tokens after the
    last id belong to the stream.

    Attributes:
        arrival_s: arrival time, seconds from the start of the run, not decreasing over open-loop requests.
        prompt_tokens: length of the prompt, at least 1.
        output_tokens: length of the output, at least 1; known to the simulator and its rewards, never to a policy.
        user: user id.
        session: session id.
        turn: 0 for the first request of a session.
        priority: smaller runs first.
        deadline_s: seconds after arrival by which the first token is due, ``inf`` for none.
        parent: index of the previous turn.
        think_s: seconds between the end of the previous turn and this request.
        stream: identity of the token stream; unique unless shared within a session.
        template: identity of a shared prompt template.
        template_tokens: tokens of that template at the start of the prompt.
        predicted_tokens: predicted output length for policies that use one, NaN for none.
        prefix_start, prefix_ids, prefix_block_tokens: block hashes of a trace; empty and 0 without.
    """

    arrival_s: Float
    prompt_tokens: Int32
    output_tokens: Int32
    user: Int32
    session: Int32
    turn: Int32
    priority: Int32
    deadline_s: Float
    parent: Int32
    think_s: Float
    stream: Int64
    template: Int32
    template_tokens: Int32
    predicted_tokens: Float
    prefix_start: Int64 = field(default_factory=_empty_int64)
    prefix_ids: Int64 = field(default_factory=_empty_int64)
    prefix_block_tokens: int = 0

    @classmethod
    def build(
        cls,
        arrival_s: npt.ArrayLike,
        prompt_tokens: npt.ArrayLike,
        output_tokens: npt.ArrayLike,
        **columns: npt.ArrayLike,
    ) -> RequestTable:
        """Make a table from the three columns that every request has; the others default to "none".

        >>> table = RequestTable.build([0.0, 0.5], [100, 20], [10, 1])
        >>> len(table), table.stream.tolist(), table.parent.tolist()
        (2, [0, 1], [-1, -1])
        """
        count = len(np.asarray(arrival_s))
        # Of the final types at once: a million requests should not need twice their memory.
        integers = ("user", "session", "parent", "template")
        defaults: dict[str, npt.ArrayLike] = {name: np.full(count, -1, dtype=np.int32) for name in integers}
        defaults |= {name: np.zeros(count, dtype=np.int32) for name in ("turn", "priority", "template_tokens")}
        defaults |= {"deadline_s": np.full(count, np.inf), "predicted_tokens": np.full(count, np.nan)}
        defaults |= {"think_s": np.zeros(count)}
        defaults |= {"stream": np.arange(count)}
        given = {"arrival_s": arrival_s, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens, **columns}
        types: dict[str, type] = {"stream": np.int64, "prefix_start": np.int64, "prefix_ids": np.int64}
        floats = {"arrival_s", "deadline_s", "think_s", "predicted_tokens"}
        merged = defaults | given
        block_tokens = int(np.asarray(merged.pop("prefix_block_tokens", 0)))
        arrays: dict[str, Any] = {
            name: np.ascontiguousarray(value, dtype=np.float64 if name in floats else types.get(name, np.int32))
            for name, value in merged.items()
        }
        return cls(**arrays, prefix_block_tokens=block_tokens)

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def closed_loop(self) -> bool:
        """Whether any request waits for another one to finish."""
        return bool((self.parent >= 0).any())

    def scaled(self, rate_factor: float) -> RequestTable:
        """Return the same requests with arrivals ``rate_factor`` times as dense; think times are left alone."""
        return replace(self, arrival_s=self.arrival_s / rate_factor)

    def at_rate(self, rate_rps: float) -> RequestTable:
        """Return the same requests at a mean rate of ``rate_rps`` over the span of their arrivals; see :meth:`scaled`.

        The rate is ``(requests - 1) / span``; requests that all arrive at once stay as they are.
        """
        span_s = float(self.arrival_s.max() - self.arrival_s.min()) if len(self) else 0.0
        return self.scaled(rate_rps * span_s / (len(self) - 1)) if span_s > 0 else self

    def take(self, rows: npt.ArrayLike) -> RequestTable:
        """Return a selection of the requests; a follow-up without its previous turn arrives at its ``arrival_s``.

        Args:
            rows: indices to keep, increasing.
        """
        kept = np.asarray(rows, dtype=np.int64)
        position = np.full(len(self) + 1, -1)  # The last entry is where parent -1 looks.
        position[kept] = np.arange(len(kept))
        columns = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, value in columns.items():
            if isinstance(value, np.ndarray) and not name.startswith("prefix_"):
                columns[name] = value[kept]
        columns["parent"] = position[columns["parent"]].astype(np.int32)
        if self.prefix_block_tokens:
            counts = np.diff(self.prefix_start)[kept]
            columns["prefix_start"] = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
            shift = self.prefix_start[kept] - columns["prefix_start"][:-1]
            columns["prefix_ids"] = self.prefix_ids[np.arange(counts.sum()) + np.repeat(shift, counts)]
        return RequestTable(**columns)

    def window(self, first: int, stop: int) -> RequestTable:
        """Return requests ``first`` to ``stop - 1``, with the earliest of them arriving at 0."""
        part = self.take(np.arange(first, min(stop, len(self))))
        return replace(part, arrival_s=part.arrival_s - part.arrival_s.min()) if len(part) else part

    def check(self, source: str = "requests") -> None:
        """Verify the promises of this class.

        Raises:
            InputError: names the first row and column that breaks one.
        """
        count = len(self)
        if count == 0:
            raise InputError(source, "", "no requests; allowed: at least 1")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray) and not item.name.startswith("prefix_") and len(value) != count:
                raise InputError(source, item.name, f"got {len(value)} values; allowed: {count}, one per request")
        lowest_allowed = {
            "arrival_s": 0.0,
            "prompt_tokens": 1,
            "output_tokens": 1,
            "think_s": 0.0,
            "template_tokens": 0,
        }
        for name, lowest in lowest_allowed.items():
            column = getattr(self, name)
            bad = ~(np.isfinite(column) & (column >= lowest))
            if bad.any():
                row = int(bad.argmax())
                raise InputError(source, f"{name}[{row}]", f"got {column[row]}; allowed: a finite number >= {lowest}")
        if not (self.deadline_s > 0).all():
            row = int((self.deadline_s > 0).argmin())
            raise InputError(source, f"deadline_s[{row}]", f"got {self.deadline_s[row]}; allowed: a number > 0, or inf")
        if (self.template_tokens > self.prompt_tokens).any():
            row = int((self.template_tokens > self.prompt_tokens).argmax())
            problem = f"got {self.template_tokens[row]}; allowed: at most the prompt's {self.prompt_tokens[row]} tokens"
            raise InputError(source, f"template_tokens[{row}]", problem)
        roots = self.arrival_s[self.parent < 0]
        if (np.diff(roots) < 0).any():
            raise InputError(source, "arrival_s", "not sorted; allowed: open-loop arrivals in order of time")
        if (self.parent >= np.arange(count)).any():
            row = int((self.parent >= np.arange(count)).argmax())
            raise InputError(source, f"parent[{row}]", f"got {self.parent[row]}; allowed: a smaller index or -1")
        followed = self.parent[self.parent >= 0]
        if len(np.unique(followed)) != len(followed):
            raise InputError(source, "parent", "a request has two follow-ups; allowed: at most one")
        if self.prefix_block_tokens and len(self.prefix_start) != count + 1:
            raise InputError(source, "prefix_start", f"got {len(self.prefix_start)} values; allowed: {count + 1}")
