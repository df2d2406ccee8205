"""Loading traces."""

from __future__ import annotations

import logging

import numpy as np

from servegym.envs.workloads.table import RequestTable
from servegym.envs.workloads.traces.config import TraceConfig
from servegym.envs.workloads.traces.files import open_trace
from servegym.envs.workloads.traces.format import Trace
from servegym.envs.workloads.traces.links import close_loop
from servegym.envs.workloads.traces.registry import FORMATS, detect
from servegym.errors import InputError

logger = logging.getLogger(__name__)


def load_trace(config: TraceConfig) -> RequestTable:
    """Load the requests of a trace; rows that had to be left out are counted in a warning.

    Raises:
        InputError: names the file, the line and the column of the first mistake, or says that no request is left.
    """
    trace = read_trace(config)
    for reason, count in trace.dropped.items():
        if count:
            logger.warning("%s: left out %d requests: %s", config.path, count, reason)
    return trace.table


def read_trace(config: TraceConfig) -> Trace:
    """Load a trace with the account of what was left out; see :func:`load_trace`."""
    file = open_trace(config.path)
    entry = detect(file) if config.format == "auto" else FORMATS[config.format]
    trace = entry.read(file, config)
    table, dropped = trace.table, dict(trace.dropped)
    if not trace.cut:
        table = _window(table, config)
    if config.max_tokens is not None:
        fits = table.prompt_tokens + table.output_tokens <= config.max_tokens
        dropped[f"more than {config.max_tokens} tokens"] = int((~fits).sum())
        table = table.take(np.flatnonzero(fits))
    if config.share < 1.0:
        table = _thin(table, config)
    table = table.window(0, config.limit or len(table))
    if not len(table):
        raise InputError(str(config.path), "", f"no requests are left of {_left_out(config, dropped)}")
    if config.closed_loop and not table.closed_loop:
        table = close_loop(table)
    if config.rate_rps is not None and not (trace.cut and config.share == 1.0):
        table = table.at_rate(config.rate_rps)
    elif config.time_scale != 1.0:
        table = table.scaled(1.0 / config.time_scale)
    table.check(str(config.path))
    return Trace(table, dropped, trace.cut)


def _window(table: RequestTable, config: TraceConfig) -> RequestTable:
    if not len(table):
        return table
    time = table.arrival_s - table.arrival_s[0] - config.start_s
    inside = time >= 0
    if config.duration_s is not None:
        inside &= time < config.duration_s
    return table.take(np.flatnonzero(inside))


def _thin(table: RequestTable, config: TraceConfig) -> RequestTable:
    """Keep a random share of the sessions; a request without a session counts as one."""
    rng = np.random.default_rng(np.random.SeedSequence([config.seed, 2]))
    alone = table.session < 0
    _, group = np.unique(np.where(alone, -1 - np.arange(len(table)), table.session), return_inverse=True)
    return table.take(np.flatnonzero(rng.random(len(table))[group] < config.share))


def _left_out(config: TraceConfig, dropped: dict[str, int]) -> str:
    limits = {"start_s": config.start_s or None, "duration_s": config.duration_s, "share": config.share}
    given = [f"{name} {value:g}" for name, value in limits.items() if value is not None and value != 1.0]
    given += [f"{count} with {reason}" for reason, count in dropped.items() if count]
    return "the trace; check " + ", ".join(given) if given else "the trace"
