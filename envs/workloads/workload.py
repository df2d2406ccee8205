"""Workloads: a config that describes the traffic, and the requests drawn from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from servegym.configuration import Config, find_config, load_config
from servegym.envs.workloads.arrivals import Arrivals
from servegym.envs.workloads.distributions import Distribution, Float, Int32, sample_whole
from servegym.envs.workloads.sessions import Flags, Sessions, Turns, converse
from servegym.envs.workloads.table import RequestTable
from servegym.envs.workloads.templates import Templates, assign_templates
from servegym.envs.workloads.traces import TraceConfig, load_trace
from servegym.envs.workloads.users import Deadline, Prediction, Priorities, Users
from servegym.errors import InputError

# One stream of random numbers each, spawned in this order; new ones go to the end.
_SOURCES = (
    "arrivals",
    "prompt",
    "output",
    "turns",
    "think",
    "append",
    "compact",
    "template",
    "template_tokens",
    "user",
    "priority",
    "prediction",
    "window",
)


class WorkloadConfig(Config):
    """Traffic by its statistics, or a trace. The mean rate is not part of it: it is given when requests are drawn."""

    name: str
    description: str
    source: str = Field(description="where the numbers come from")
    arrivals: Arrivals | None = Field(default=None, description="of requests, or of sessions")
    prompt_tokens: Distribution | None = Field(default=None, description="prompt of a request, or of a first turn")
    output_tokens: Distribution | None = None
    sessions: Sessions | None = None
    templates: tuple[Templates, ...] = ()
    users: Users | None = None
    priorities: Priorities | None = None
    deadline: Deadline | None = None
    prediction: Prediction | None = None
    trace: TraceConfig | None = Field(default=None, description="recorded requests instead of all of the above")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        generated = ("arrivals", "prompt_tokens", "output_tokens")
        if self.trace is None:
            missing = [name for name in generated if getattr(self, name) is None]
            if missing:
                raise ValueError(f"{' and '.join(missing)} for a generated workload, or a trace")
        elif extra := self.model_fields_set - {"name", "description", "source", "trace"}:
            raise ValueError(f"no {' and no '.join(sorted(extra))} beside a trace")
        if sum(family.share for family in self.templates) > 1 + 1e-9:
            raise ValueError("shares of templates that add up to at most 1")
        return self


def load_workload(reference: str | Path) -> WorkloadConfig:
    """Load a workload by the name of a shipped one, or from a YAML file; a trace's path is relative to that file.

    Raises:
        InputError: unknown name, or a field that is missing or wrong.
    """
    config = load_config(WorkloadConfig, reference, "workloads")
    if config.trace is None or config.trace.path.is_absolute():
        return config
    path = find_config(reference, "workloads").parent / config.trace.path
    return config.model_copy(update={"trace": config.trace.model_copy(update={"path": path})})


def generate(
    config: WorkloadConfig,
    *,
    rate_rps: float | None = None,
    requests: int | None = None,
    duration_s: float | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
) -> RequestTable:
    """Draw the requests of one run.

    Equal seeds give equal requests: neither the rate nor the number of requests changes the lengths, user or template
    of a request. In a workload of single requests that holds row by row.

    Sessions are a window of a steady state, so that the rate of all requests, follow-ups included, is ``rate_rps``
    from the start to the end, if engines served in no time (each turn's service time delays the turns after it). Turns
    that fall behind the end of the window take place as those of a session that began before the window: open-loop, as
    a new session with the whole history in its prompt.

    Args:
        config: the workload.
        rate_rps: mean rate of all requests, per second; may be left out for a trace, which then keeps its times.
        requests: number of requests.
        duration_s: time span of the arrivals; with ``requests`` too, whichever ends first.
        seed: the draw. Of a trace with more than ``requests`` requests it draws a window.
        max_tokens: prompt + output of a request, at most: a longer request is shortened
            (:func:`.sessions.fit`), a longer turn ends its session or compacts it, a longer request of a trace is left
            out.

    Raises:
        InputError: neither ``requests`` nor ``duration_s``, a rate that is not positive, or no request at all.
    """
    _check_arguments(config, rate_rps, requests, duration_s, max_tokens)
    streams = _Streams(seed)
    if config.trace is not None:
        return _from_trace(config.name, config.trace, streams, rate_rps, requests, duration_s, max_tokens)
    assert config.arrivals is not None
    assert rate_rps is not None
    if config.sessions is not None:
        span_s = min(requests / rate_rps if requests else math.inf, duration_s or math.inf)
        count = max(1, round(rate_rps * span_s))
        drawn = _draw_turns(config, streams, count, max_tokens)
        sessions = int(drawn.session[-1]) + 1
        roots = config.arrivals.sample_within(span_s, sessions, streams["arrivals"])
        return _window(drawn, roots, span_s)
    arrival = config.arrivals.sample(rate_rps, streams["arrivals"], count=requests, duration_s=duration_s)
    if not len(arrival):
        raise InputError(config.name, "duration_s", f"got {duration_s}, in which no request arrives; allowed: longer")
    drawn = _draw(config, streams, np.ones(len(arrival), dtype=np.int32), max_tokens)
    return RequestTable.build(arrival, **drawn.columns, session=drawn.session)


def mean_lengths(
    config: WorkloadConfig, *, requests: int = 20_000, seed: int = 0, max_tokens: int | None = None
) -> tuple[float, float]:
    """Estimate the mean prompt and output length of all requests, in tokens."""
    table = generate(config, rate_rps=1.0, requests=requests, seed=seed, max_tokens=max_tokens)
    return float(table.prompt_tokens.mean()), float(table.output_tokens.mean())


class _Streams:
    """A generator per source of randomness; asking again gives the same numbers again."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __getitem__(self, source: str) -> np.random.Generator:
        key = _SOURCES.index(source)
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(key,)))


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Turns as they take place, without arrival times; all turns of a session in a row."""

    session: Int32
    fresh: Flags
    think_s: Float
    columns: dict[str, npt.NDArray[np.generic]]

    def first(self, count: int) -> _Drawn:
        columns = {name: values[:count] for name, values in self.columns.items()}
        return _Drawn(self.session[:count], self.fresh[:count], self.think_s[:count], columns)


def _draw(config: WorkloadConfig, streams: _Streams, turns: Int32, max_tokens: int | None) -> _Drawn:
    """Draw everything but arrival times for sessions of so many turns each."""
    assert config.prompt_tokens is not None
    assert config.output_tokens is not None
    sessions, total = len(turns), int(turns.sum())
    session = np.repeat(np.arange(sessions, dtype=np.int32), turns)
    starts = np.cumsum(turns) - turns
    turn = (np.arange(total) - starts[session]).astype(np.int32)
    template, template_tokens, added = assign_templates(
        config.templates, streams["template"], streams["template_tokens"], sessions
    )
    new_tokens = np.zeros(total, dtype=np.int32)
    think_s, compact = np.zeros(total), np.full(total, -1, dtype=np.int32)
    if config.sessions is not None:
        new_tokens = sample_whole(config.sessions.append_tokens, streams["append"], total)
        think_s = np.where(turn > 0, config.sessions.think_s.sample(streams["think"], total), 0.0)
        if config.sessions.compact_tokens is not None:
            compact = sample_whole(config.sessions.compact_tokens, streams["compact"], total)
    new_tokens[starts] = sample_whole(config.prompt_tokens, streams["prompt"], sessions) + added
    output = sample_whole(config.output_tokens, streams["output"], total)
    plan = Turns(session, turn, new_tokens, output, think_s, template_tokens[session], compact)
    talk = converse(plan, max_tokens)
    columns: dict[str, npt.NDArray[np.generic]] = {
        "prompt_tokens": talk.prompt_tokens,
        "output_tokens": talk.output_tokens,
        "turn": turn,
        "template": template[session],
        "template_tokens": np.where(template[session] < 0, 0, np.minimum(plan.template_tokens, talk.prompt_tokens)),
    }
    if config.users is not None:
        columns["user"] = config.users.sample(streams["user"], sessions)[session]
    if config.priorities is not None:
        columns["priority"] = config.priorities.sample(streams["priority"], sessions)[session]
    if config.deadline is not None:
        columns["deadline_s"] = config.deadline.of(talk.prompt_tokens)
    if config.prediction is not None:
        columns["predicted_tokens"] = config.prediction.sample(talk.output_tokens, streams["prediction"])
    kept = talk.kept
    return _Drawn(session[kept], talk.fresh[kept], think_s[kept], {name: value[kept] for name, value in columns.items()})


def _draw_turns(config: WorkloadConfig, streams: _Streams, count: int, max_tokens: int | None) -> _Drawn:
    """Draw the first ``count`` turns of an endless sequence of sessions."""
    assert config.sessions is not None
    typical = sample_whole(config.sessions.turns, streams["turns"], 1000).mean()
    sessions = math.ceil(1.1 * count / typical) + 4
    while True:
        drawn = _draw(config, streams, sample_whole(config.sessions.turns, streams["turns"], sessions), max_tokens)
        if len(drawn.session) >= count:
            return drawn.first(count)
        # Sessions ended early by the context length; each has at least one turn.
        sessions = min(count, 2 * sessions)


def _window(drawn: _Drawn, roots: Float, span_s: float) -> RequestTable:
    """Place sessions in ``[0, span_s)`` by wrapping their time line around."""
    elapsed = np.cumsum(drawn.think_s)
    first = np.searchsorted(drawn.session, np.arange(len(roots)))
    due = roots[drawn.session] + elapsed - elapsed[first][drawn.session]
    lap = np.floor(due / span_s)
    arrival = np.clip(due - lap * span_s, 0.0, np.nextafter(span_s, 0.0))
    turn = drawn.columns["turn"]
    starts = (turn == 0) | np.append(True, np.diff(lap) != 0)
    order = np.argsort(arrival, kind="stable")
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    parent = np.where(starts, -1, np.append(-1, position[:-1]))
    columns = drawn.columns | {
        "session": np.cumsum(starts) - 1,
        "stream": np.cumsum(starts | drawn.fresh) - 1,
        "parent": parent,
        "think_s": drawn.think_s,
    }
    return RequestTable.build(arrival[order], **{name: values[order] for name, values in columns.items()})
