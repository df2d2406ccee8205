"""BurstGPT traces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servegym.envs.workloads.traces.columns import SECONDS, TOKENS_OR_ZERO, Label, dense_ids
from servegym.envs.workloads.traces.files import TraceFile
from servegym.envs.workloads.traces.format import Trace, TraceFormat, drop, in_order

if TYPE_CHECKING:
    from servegym.envs.workloads.traces.config import TraceConfig

_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


def _read(file: TraceFile, config: TraceConfig) -> Trace:
    # By name: BurstGPT_3 has two columns more than the others, in second place.
    time, prompt, output = _COLUMNS
    columns = file.read({time: SECONDS, prompt: TOKENS_OR_ZERO, output: TOKENS_OR_ZERO}, {"Session ID": Label()})
    failed = (columns[prompt] == 0) | (columns[output] == 0)
    columns = drop(~failed, columns)
    sessions = {"session": dense_ids(columns["Session ID"])} if "Session ID" in columns else {}
    table = in_order(columns[time], columns[prompt], columns[output], **sessions)
    return Trace(table, {"zero tokens (failed requests)": int(failed.sum())})


BURSTGPT = TraceFormat(
    name="burstgpt",
    description="BurstGPT 1-3: Timestamp (s), Request tokens, Response tokens, and Session ID in part 3",
    source="github.com/HPMLL/BurstGPT, CC-BY-4.0",
    columns=(_COLUMNS,),
    read=_read,
)
