"""The requests of a simulation that repeats a live run: sent when they were, with the prefixes that the engine met."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from servegym.envs.live.tokens import prompt_tokens
from servegym.envs.simulator.metrics import Float
from servegym.envs.workloads.table import RequestTable

# Wide enough that two tokens are equal only where their identities are.
_VOCABULARY = 2**62


def as_sent(table: RequestTable, sent_s: Float) -> RequestTable:
    """Return the requests with the times at which a client truly sent them.

    Follow-up turns keep their think times: when they are sent follows from the turn before.

    Args:
        table: the requests.
        sent_s: when each was sent, seconds from the start, shape (requests,); NaN: never, as planned.
    """
    roots = (table.parent < 0) & np.isfinite(sent_s)
    sent = np.where(roots, sent_s, table.arrival_s)
    # A late timer cannot make a request overtake the one before.
    sent[table.parent < 0] = np.maximum.accumulate(sent[table.parent < 0])
    return replace(table, arrival_s=sent)


def with_live_prefixes(table: RequestTable, block_size: int) -> RequestTable:
    """Return the requests with the prefixes that a replay's prompts share, one id per full KV block of a prompt.

    A follow-up turn repeats the *planned* output of the turn before, while a live model generated another text. So its
    prefix is found in a live engine up to the prompt of that turn only, which identities by stream do not say.

    Args:
        table: the requests.
        block_size: tokens per KV block of the engines.
    """
    known: dict[tuple[int, bytes], int] = {}
    start, ids = [0], []
    for r in range(len(table)):
        tokens = prompt_tokens(table, r, _VOCABULARY)
        parent = 0
        for begin in range(0, len(tokens) - block_size + 1, block_size):
            block = tokens[begin : begin + block_size].tobytes()
            parent = known.setdefault((parent, block), len(known) + 1)
            ids.append(parent)
        start.append(len(ids))
    count = len(table)
    return replace(
        table,
        prefix_start=np.array(start, dtype=np.int64),
        prefix_ids=np.array(ids, dtype=np.int64),
        prefix_block_tokens=block_size,
        # What the ids do not cover is nobody else's.
        stream=np.arange(count, dtype=np.int64),
        template=np.full(count, -1, dtype=np.int32),
        template_tokens=np.zeros(count, dtype=np.int32),
    )
