"""The project's own format."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from servegym.envs.workloads.traces.columns import INTEGER, SECONDS, TOKENS, Blocks, Kind, Label, Number, dense_ids
from servegym.envs.workloads.traces.files import TraceFile
from servegym.envs.workloads.traces.format import Trace, TraceFormat, in_order
from servegym.envs.workloads.traces.links import conversation_streams, turn_numbers, with_prefixes

if TYPE_CHECKING:
    from servegym.envs.workloads.traces.config import TraceConfig

_OPTIONAL: dict[str, Kind] = {
    "user": Label(),
    "session": Label(),
    "turn": replace(INTEGER, low=0),
    "priority": replace(INTEGER, empty=0.0),
    "deadline_s": Number(empty=math.inf),
    "prefix_blocks": Blocks(),
}


def _read(file: TraceFile, config: TraceConfig) -> Trace:
    columns = file.read({"arrival_s": SECONDS, "prompt_tokens": TOKENS, "output_tokens": TOKENS}, _OPTIONAL)
    for name in ("user", "session"):
        if name in columns:
            columns[name] = dense_ids(columns[name])
    blocks = columns.pop("prefix_blocks", None)
    order = np.argsort(columns["arrival_s"], kind="stable")
    table = in_order(**columns)
    if "session" in columns:
        if "turn" not in columns:
            table = replace(table, turn=turn_numbers(table.session))
        if blocks is None:
            table = replace(table, stream=conversation_streams(table))
    return Trace(table if blocks is None else with_prefixes(table, blocks[order], config.prefix_block_tokens))


NATIVE = TraceFormat(
    name="native",
    description=(
        "arrival_s, prompt_tokens, output_tokens; optional: user, session, turn, priority, deadline_s, prefix_blocks"
    ),
    source="servegym",
    columns=(("arrival_s", "prompt_tokens", "output_tokens"),),
    read=_read,
)
