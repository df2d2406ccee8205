"""Mooncake traces (conversation, toolagent)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from servegym.envs.workloads.table import Float, Int32, RequestTable
from servegym.envs.workloads.traces.columns import SECONDS, TOKENS, TOKENS_OR_ZERO, Blocks
from servegym.envs.workloads.traces.files import TraceFile
from servegym.envs.workloads.traces.format import Trace, TraceFormat, drop, in_order
from servegym.envs.workloads.traces.links import turn_numbers, with_prefixes

if TYPE_CHECKING:
    from servegym.envs.workloads.traces.config import TraceConfig

_BLOCK_TOKENS = 512
# Chains shorter than this are shared templates rather than conversations.
_LEAST_BLOCKS = 2


def _read(file: TraceFile, config: TraceConfig) -> Trace:
    columns = file.read(
        {"timestamp": SECONDS, "input_length": TOKENS, "output_length": TOKENS_OR_ZERO, "hash_ids": Blocks()}
    )
    keep = columns["output_length"] > 0
    columns = drop(keep, columns)
    arrival = columns["timestamp"] / 1000.0
    spread = _tick_s(arrival) if config.jitter_s is None else config.jitter_s
    arrival = arrival + np.random.default_rng(np.random.SeedSequence([config.seed, 0])).uniform(0, spread, len(arrival))
    order = np.argsort(arrival, kind="stable")
    table = with_prefixes(
        in_order(arrival, columns["input_length"], columns["output_length"]), columns["hash_ids"][order], _BLOCK_TOKENS
    )
    session = reconstruct_sessions(table)
    return Trace(
        replace(table, session=session, turn=turn_numbers(session)), {"zero output tokens": int((~keep).sum())}
    )


def _tick_s(arrival_s: Float) -> float:
    """Period of the clock if it is so coarse that most requests share a time with their neighbour, else 0."""
    gaps = np.diff(np.sort(arrival_s))
    coarse = len(gaps) > 0 and (gaps == 0).mean() > 0.5 and bool((gaps > 0).any())
    return float(np.median(gaps[gaps > 0])) if coarse else 0.0


def reconstruct_sessions(table: RequestTable) -> Int32:
    """Group requests into sessions by their block hashes, since the trace names none. Shape (requests,).

    A request continues an earlier one if its prompt is longer and holds all full blocks of the earlier prompt, at least
    two; among several the longest, and the latest of equal ones.
    """
    ids, start, prompt = table.prefix_ids.tolist(), table.prefix_start.tolist(), table.prompt_tokens.tolist()
    latest: dict[int, int] = {}
    session = np.empty(len(table), dtype=np.int32)
    sessions = 0
    for row in range(len(table)):
        first, stop = start[row], start[row + 1]
        earlier = -1
        for block in range(stop - 1, first + _LEAST_BLOCKS - 2, -1):
            candidate = latest.get(ids[block], -1)
            if candidate >= 0 and prompt[candidate] < prompt[row]:
                earlier = candidate
                break
        session[row] = session[earlier] if earlier >= 0 else sessions
        sessions += earlier < 0
        if stop - first >= _LEAST_BLOCKS:
            latest[ids[stop - 1]] = row
    return session


MOONCAKE = TraceFormat(
    name="mooncake",
    description="timestamp (ms), input_length, output_length, hash_ids (one per 512 tokens); sessions: reconstructed",
    source="github.com/kvcache-ai/Mooncake (FAST25-release/traces), Apache-2.0",
    columns=(("timestamp", "input_length", "output_length", "hash_ids"),),
    read=_read,
)
