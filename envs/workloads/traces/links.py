"""How requests of a trace hang together: shared prefixes and turns of sessions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.envs.workloads.table import Float, Int32, Int64, RequestTable
from servegym.envs.workloads.traces.columns import flatten

# Odd multipliers of splitmix64, a mixer of good quality.
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_STEP = np.uint64(0x9E3779B97F4A7C15)


def with_prefixes(table: RequestTable, blocks: npt.NDArray[Any], block_tokens: int) -> RequestTable:
    """Add block hashes to a table.

    Only blocks that the prompt fills are kept: the hash of a last, partial block says nothing about the tokens that
    would follow. Ids are chained, since it is not always said whether they stand for a block or for all up to its end;
    chaining ids that are chained already changes nothing but their names.

    Args:
        table: requests in the order of ``blocks``.
        blocks: lists of ids, shape (requests,), object.
        block_tokens: prompt tokens per id.
    """
    lengths, ids = flatten(blocks)
    full = np.minimum(lengths, table.prompt_tokens // block_tokens)
    start = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(full)])
    column = np.arange(start[-1]) - np.repeat(start[:-1], full)
    source = np.repeat(np.cumsum(lengths) - lengths, full) + column
    return replace(table, prefix_start=start, prefix_ids=_chain(ids[source], start), prefix_block_tokens=block_tokens)


def _chain(ids: Int64, start: Int64) -> Int64:
    """Hash each id with all before it in its row, one column of blocks at a time."""
    chained = ids.astype(np.uint64)
    lengths = np.diff(start)
    order = np.argsort(-lengths, kind="stable")
    previous = np.zeros(len(order), dtype=np.uint64)
    reaching = np.searchsorted(-lengths[order], -np.arange(lengths.max(initial=0)), side="left")
    with np.errstate(over="ignore"):
        for column, rows in enumerate(reaching):
            at = start[order[:rows]] + column
            mixed = (previous[:rows] + _STEP) * _MIX[0] + chained[at]
            mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[0]
            mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[1]
            previous[:rows] = chained[at] = mixed ^ (mixed >> np.uint64(31))
    return (chained >> np.uint64(1)).astype(np.int64)


def previous_turns(session: Int32) -> Int32:
    """Index of the previous request of the same session, -1 for none. Shape (requests,)."""
    order = np.argsort(session, kind="stable")
    previous = np.full(len(session), -1, dtype=np.int32)
    same = (session[order][1:] == session[order][:-1]) & (session[order][1:] >= 0)
    previous[order[1:][same]] = order[:-1][same]
    return previous


def turn_numbers(session: Int32) -> Int32:
    """Number of earlier requests of the same session. Shape (requests,)."""
    order = np.argsort(session, kind="stable")
    starts = np.append(True, session[order][1:] != session[order][:-1])
    rank = np.arange(len(order)) - np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
    turns = np.zeros(len(session), dtype=np.int32)
    turns[order] = np.where(session[order] >= 0, rank, 0)
    return turns


def conversation_streams(table: RequestTable) -> Int64:
    """Token streams for sessions without block hashes, shape (requests,).

    A turn continues the stream of the turn before if its prompt has room for that prompt and output; otherwise it
    cannot repeat them and starts a stream of its own.
    """
    previous = previous_turns(table.session)
    total = table.prompt_tokens + table.output_tokens
    streams = np.arange(len(table), dtype=np.int64)
    continued = np.flatnonzero((previous >= 0) & (table.prompt_tokens >= total[previous]))
    for row in continued:  # In order of arrival, so that the stream of the turn before is final.
        streams[row] = streams[previous[row]]
    return streams


def close_loop(table: RequestTable) -> RequestTable:
    """Make each turn wait for the turn before it.

    ``think_s`` becomes the recorded time between their arrivals. A trace does not say when a turn had finished, so the
    recorded service time of the turn before is part of it.
    """
    parent = previous_turns(table.session)
    gaps: Float = np.where(parent >= 0, table.arrival_s - table.arrival_s[parent], 0.0)
    return replace(table, parent=parent, think_s=gaps)
