"""Qwen traces of Alibaba's Bailian platform."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from servegym.envs.workloads.table import Int32
from servegym.envs.workloads.traces.columns import INTEGER, SECONDS, TOKENS_OR_ZERO, Array, Blocks
from servegym.envs.workloads.traces.files import TraceFile
from servegym.envs.workloads.traces.format import Trace, TraceFormat, drop, in_order
from servegym.envs.workloads.traces.links import turn_numbers, with_prefixes

if TYPE_CHECKING:
    from servegym.envs.workloads.traces.config import TraceConfig

_BLOCK_TOKENS = 16


def _read(file: TraceFile, config: TraceConfig) -> Trace:
    columns = file.read(
        {
            "chat_id": INTEGER,
            "parent_chat_id": INTEGER,
            "timestamp": SECONDS,
            "input_length": TOKENS_OR_ZERO,
            "output_length": TOKENS_OR_ZERO,
            "hash_ids": Blocks(),
        }
    )
    keep = (columns["input_length"] > 0) & (columns["output_length"] > 0)
    session = _sessions(columns["chat_id"], columns["parent_chat_id"])
    columns = drop(keep, columns | {"session": session})
    order = np.argsort(columns["timestamp"], kind="stable")
    session = columns["session"]
    table = in_order(
        columns["timestamp"],
        columns["input_length"],
        columns["output_length"],
        session=session,
        turn=turn_numbers(session[order])[np.argsort(order, kind="stable")],
    )
    # Their documentation: the hash of a last block is unreliable, being padded; `with_prefixes` drops partial blocks.
    table = with_prefixes(table, columns["hash_ids"][order], _BLOCK_TOKENS)
    return Trace(table, {"zero tokens": int((~keep).sum())})


def _sessions(chat: Array, parent: Array) -> Int32:
    """Number the trees of chats that name each other as parent; a parent outside the trace starts a session."""
    row_of = {chat_id: row for row, chat_id in enumerate(chat.tolist())}
    above = np.array([row_of.get(parent_id, row) for row, parent_id in enumerate(parent.tolist())], dtype=np.int64)
    # Each round doubles the distance that a row looks up its tree.
    for _ in range(len(above).bit_length()):
        above = above[above]
    return np.unique(above, return_inverse=True)[1].astype(np.int32)


BAILIAN = TraceFormat(
    name="bailian",
    description="chat_id, parent_chat_id, timestamp (s), input_length, output_length, hash_ids (one per 16 tokens)",
    source="github.com/alibaba-edu/qwen-bailian-usagetraces-anon, Apache-2.0 by its README; cite arXiv 2506.02634",
    columns=(("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids"),),
    read=_read,
)
