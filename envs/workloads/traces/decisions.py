"""Decision logs of live deployments."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from servegym.envs.workloads.traces.columns import INTEGER, SECONDS, TOKENS, Blocks, Label, Number, dense_ids
from servegym.envs.workloads.traces.files import TraceFile
from servegym.envs.workloads.traces.format import Trace, TraceFormat, drop, in_order
from servegym.envs.workloads.traces.links import with_prefixes

if TYPE_CHECKING:
    from servegym.envs.workloads.traces.config import TraceConfig

_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "propensity")


def _read(file: TraceFile, config: TraceConfig) -> Trace:
    columns = file.read(
        {
            "arrival_s": SECONDS,
            "prompt_tokens": TOKENS,
            "output_tokens": replace(TOKENS, low=0, empty=0.0),
            "user": Label(),
            "session": Label(),
            "turn": replace(INTEGER, low=0),
            "priority": INTEGER,
            "deadline_s": Number(empty=math.inf),
            "prefix_blocks": Blocks(),
            "prefix_block_tokens": TOKENS,
        }
    )
    keep = columns["output_tokens"] > 0
    columns = drop(keep, columns)
    # The log is in the order of the requests' ends, and starts when the deployment did.
    order = np.argsort(columns["arrival_s"], kind="stable")
    for name in ("user", "session"):
        columns[name] = dense_ids(columns[name])
    blocks, sizes = columns.pop("prefix_blocks"), columns.pop("prefix_block_tokens")
    if len(order):
        columns["arrival_s"] = columns["arrival_s"] - columns["arrival_s"][order[0]]
    table = in_order(**columns)
    if len(order):
        table = with_prefixes(table, blocks[order], int(sizes[0]))
    return Trace(table, {"no output that anybody counted": int((~keep).sum())})


DECISIONS = TraceFormat(
    name="decisions",
    description="decision log of servegym deploy (.jsonl): requests that ended with a known output length",
    source="servegym",
    columns=(_COLUMNS,),
    read=_read,
)
