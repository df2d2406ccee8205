"""Drawing the requests of a workload."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from servegym.envs.workloads.distributions import Float, Int32, sample_whole
from servegym.envs.workloads.sessions import Flags, Turns, converse
from servegym.envs.workloads.table import RequestTable
from servegym.envs.workloads.templates import assign_templates
from servegym.envs.workloads.tenants import superpose
from servegym.envs.workloads.traces import TraceConfig, load_trace
from servegym.envs.workloads.workload import WorkloadConfig, load_workload
from servegym.errors import InputError

Columns = dict[str, Any]

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


@dataclass(frozen=True, slots=True)
class LengthScale:
    """Factors on the lengths of generated requests, rounded to whole tokens, 1 at least.

    Attributes:
        prompt: factor on the tokens that each turn adds; a template's part of a prompt stays.
        output: factor on the output tokens.
    """

    prompt: float = 1.0
    output: float = 1.0


def generate(
    config: WorkloadConfig,
    *,
    rate_rps: float | None = None,
    requests: int | None = None,
    duration_s: float | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    scale: LengthScale | None = None,
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
        scale: factors on the lengths; not for a trace.

    Raises:
        InputError: neither ``requests`` nor ``duration_s``, a rate that is not positive, or no request at all.
    """
    _check_arguments(config, rate_rps, requests, duration_s, max_tokens)
    max_tokens = min((limit for limit in (config.max_tokens, max_tokens) if limit is not None), default=None)
    streams, scale = _Streams(seed), scale or LengthScale()
    if config.trace is not None:
        if scale != LengthScale():
            raise InputError(config.name, "scale", f"got {scale.prompt:g}, {scale.output:g}; allowed beside a trace: 1")
        return _from_trace(config, streams, rate_rps, requests, duration_s, max_tokens)
    assert rate_rps is not None
    if config.tenants:
        return _of_tenants(config, rate_rps, requests, duration_s, seed, max_tokens, scale)
    assert config.arrivals is not None
    if config.sessions is not None:
        span_s = min(requests / rate_rps if requests else math.inf, duration_s or math.inf)
        count = max(1, round(rate_rps * span_s))
        drawn = _draw_turns(config, streams, count, max_tokens, scale)
        sessions = int(drawn.session[-1]) + 1
        roots = config.arrivals.sample_within(span_s, sessions, streams["arrivals"])
        return _window(drawn, roots, span_s)
    arrival = config.arrivals.sample(rate_rps, streams["arrivals"], count=requests, duration_s=duration_s)
    if not len(arrival):
        raise InputError(config.name, "duration_s", f"got {duration_s}, in which no request arrives; allowed: longer")
    drawn = _draw(config, streams, np.ones(len(arrival), dtype=np.int32), max_tokens, scale)
    return RequestTable.build(arrival, **drawn.columns)


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
    columns: Columns

    def first(self, count: int) -> _Drawn:
        columns = {name: values[:count] for name, values in self.columns.items()}
        return _Drawn(self.session[:count], self.fresh[:count], self.think_s[:count], columns)


def _draw(
    config: WorkloadConfig, streams: _Streams, turns: Int32, max_tokens: int | None, scale: LengthScale
) -> _Drawn:
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
        new_tokens = _scaled(sample_whole(config.sessions.append_tokens, streams["append"], total), scale.prompt)
        think_s = np.where(turn > 0, config.sessions.think_s.sample(streams["think"], total), 0.0)
        if config.sessions.compact_tokens is not None:
            compact = sample_whole(config.sessions.compact_tokens, streams["compact"], total)
    opening = _scaled(sample_whole(config.prompt_tokens, streams["prompt"], sessions), scale.prompt)
    new_tokens[starts] = opening + added
    output = _scaled(sample_whole(config.output_tokens, streams["output"], total), scale.output)
    plan = Turns(session, turn, new_tokens, output, think_s, template_tokens[session], compact)
    talk = converse(plan, max_tokens)
    columns: Columns = {
        "prompt_tokens": talk.prompt_tokens,
        "output_tokens": talk.output_tokens,
        "turn": turn,
        "template": template[session],
        "template_tokens": np.where(template[session] < 0, 0, np.minimum(plan.template_tokens, talk.prompt_tokens)),
    }
    columns |= _promises(config, streams, session, talk.prompt_tokens, talk.output_tokens)
    kept = talk.kept
    return _Drawn(
        session[kept], talk.fresh[kept], think_s[kept], {name: value[kept] for name, value in columns.items()}
    )


def _scaled(tokens: Int32, factor: float) -> Int32:
    if factor == 1.0:
        return tokens
    return np.asarray(np.maximum(np.rint(tokens * factor), np.minimum(tokens, 1)), dtype=np.int32)


def _promises(
    config: WorkloadConfig, streams: _Streams, session: Int32, prompt_tokens: Int32, output_tokens: Int32
) -> Columns:
    """Users and priorities by session, deadlines and predictions by request, as far as configured."""
    columns: Columns = {}
    sessions = int(session.max()) + 1
    if config.users is not None:
        columns["user"] = config.users.sample(streams["user"], sessions)[session]
    if config.priorities is not None:
        columns["priority"] = config.priorities.sample(streams["priority"], sessions)[session]
    if config.deadline is not None:
        columns["deadline_s"] = config.deadline.of(prompt_tokens)
    if config.prediction is not None:
        columns["predicted_tokens"] = config.prediction.sample(output_tokens, streams["prediction"])
    return columns


def _draw_turns(
    config: WorkloadConfig, streams: _Streams, count: int, max_tokens: int | None, scale: LengthScale
) -> _Drawn:
    """Draw the first ``count`` turns of an endless sequence of sessions."""
    assert config.sessions is not None
    typical = sample_whole(config.sessions.turns, streams["turns"], 1000).mean()
    sessions = math.ceil(1.1 * count / typical) + 4
    while True:
        drawn = _draw(
            config, streams, sample_whole(config.sessions.turns, streams["turns"], sessions), max_tokens, scale
        )
        if len(drawn.session) >= count:
            return drawn.first(count)
        # Sessions ended early by the context length; each has at least one turn.
        sessions = min(count, 2 * sessions)


def _window(drawn: _Drawn, roots: Float, span_s: float) -> RequestTable:
    """Place sessions in ``[0, span_s)`` by wrapping their time line around."""
    elapsed = np.cumsum(drawn.think_s)
    firsts = np.searchsorted(drawn.session, np.arange(len(roots)))
    due = roots[drawn.session] + (elapsed - elapsed[firsts][drawn.session])
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


@lru_cache(maxsize=64)
def _of_tenant(reference: str) -> WorkloadConfig:
    """Read a tenant's workload once: training draws thousands of tables, and reading takes longer than drawing."""
    return load_workload(reference)


def _of_tenants(
    config: WorkloadConfig,
    rate_rps: float,
    requests: int | None,
    duration_s: float | None,
    seed: int,
    max_tokens: int | None,
    scale: LengthScale,
) -> RequestTable:
    """Draw each tenant's requests with a seed of its own, and merge them."""
    total, parts = sum(tenant.share for tenant in config.tenants), []
    for index, tenant in enumerate(config.tenants):
        share = tenant.share / total
        table = generate(
            _of_tenant(tenant.workload),
            rate_rps=share * rate_rps,
            requests=max(1, round(share * requests)) if requests is not None else None,
            duration_s=duration_s,
            seed=int(np.random.SeedSequence([seed, index]).generate_state(1)[0]),
            max_tokens=max_tokens,
            scale=scale,
        )
        if table.prefix_block_tokens:
            raise InputError(config.name, f"tenants.{index}.workload", "has block hashes; allowed: one without")
        parts.append(tenant.stamped(table))
    return superpose(parts)


def _from_trace(
    config: WorkloadConfig,
    streams: _Streams,
    rate_rps: float | None,
    requests: int | None,
    duration_s: float | None,
    max_tokens: int | None,
) -> RequestTable:
    assert config.trace is not None
    limit = min((tokens for tokens in (config.trace.max_tokens, max_tokens) if tokens is not None), default=None)
    trace = config.trace.model_copy(update={"max_tokens": limit})
    table = _load_cached(trace, trace.path.stat().st_mtime_ns if trace.path.is_file() else 0)
    group = np.where(table.session < 0, -1 - np.arange(len(table)), table.session)
    session = np.unique(group, return_inverse=True)[1].astype(np.int32)
    table = replace(table, **_promises(config, streams, session, table.prompt_tokens, table.output_tokens))
    if requests is not None and requests < len(table):
        first = int(streams["window"].integers(len(table) - requests + 1))
        table = table.window(first, first + requests)
    if rate_rps is not None:
        table = table.at_rate(rate_rps)
    if duration_s is not None:
        table = table.take(np.flatnonzero(table.arrival_s < duration_s))
    return table


@lru_cache(maxsize=4)
def _load_cached(trace: TraceConfig, modified_ns: int) -> RequestTable:
    """Load a trace once per version of its file."""
    return load_trace(trace)


def _check_arguments(
    config: WorkloadConfig,
    rate_rps: float | None,
    requests: int | None,
    duration_s: float | None,
    max_tokens: int | None,
) -> None:
    if config.trace is None and requests is None and duration_s is None:
        raise InputError(config.name, "requests", "missing; allowed: requests or duration_s for a generated workload")
    if config.trace is None and rate_rps is None:
        raise InputError(config.name, "rate_rps", "missing; this field is required for a generated workload")
    limits = {"rate_rps": rate_rps, "duration_s": duration_s}
    for name, value in limits.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(config.name, name, f"got {value}; allowed: a finite number > 0")
    for name, value, least in (("requests", requests, 1), ("max_tokens", max_tokens, 2)):
        if value is not None and value < least:
            raise InputError(config.name, name, f"got {value}; allowed: an integer of at least {least}")
