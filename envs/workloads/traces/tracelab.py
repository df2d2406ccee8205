"""TraceLab's replay format of agentic coding sessions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from servegym.envs.workloads.traces.columns import SECONDS, TOKENS, TOKENS_OR_ZERO, Label, dense_ids
from servegym.envs.workloads.traces.files import TraceFile
from servegym.envs.workloads.traces.format import Trace, TraceFormat, in_order
from servegym.envs.workloads.traces.links import conversation_streams, previous_turns, turn_numbers
from servegym.errors import InputError

if TYPE_CHECKING:
    from servegym.envs.workloads.traces.config import TraceConfig


def _read(file: TraceFile, config: TraceConfig) -> Trace:
    columns = file.read(
        {
            "session_id": Label(),
            "arrival_time": SECONDS,
            "round_idx": TOKENS_OR_ZERO,
            "prefix_len": TOKENS_OR_ZERO,
            "input_len": TOKENS_OR_ZERO,
            "output_len": TOKENS,
            "tool_wait_after_ms": SECONDS,
        }
    )
    prompt = columns["prefix_len"] + columns["input_len"]
    if (prompt < 1).any():
        raise InputError(
            str(file.path), f"input_len[{int(prompt.argmin())}]", "got no prompt; allowed: at least 1 token"
        )
    # A row's time is that of its session; rounds follow when tools have run. Sorting by round keeps them in order.
    rounds = np.lexsort((columns["round_idx"], columns["arrival_time"]))
    columns = {name: values[rounds] for name, values in columns.items()}
    session = dense_ids(columns["session_id"])
    table = in_order(columns["arrival_time"] / 1000.0, prompt[rounds], columns["output_len"], session=session)
    waits = columns["tool_wait_after_ms"] / 1000.0
    parent = previous_turns(table.session)
    think = np.where(parent >= 0, waits[parent], 0.0)
    table = replace(table, parent=parent, think_s=think, turn=turn_numbers(table.session))
    return Trace(replace(table, stream=conversation_streams(table)))


TRACELAB = TraceFormat(
    name="tracelab",
    description=(
        "session_id, arrival_time (ms), round_idx, prefix_len, input_len, output_len, tool_wait_after_ms; closed loop"
    ),
    source="github.com/uw-syfi/TraceLab, Apache-2.0 (code), CC-BY-4.0 (data)",
    columns=(
        ("session_id", "arrival_time", "round_idx", "prefix_len", "input_len", "output_len", "tool_wait_after_ms"),
    ),
    read=_read,
)
