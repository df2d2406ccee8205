"""Azure LLM inference traces of 2023 and 2024."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from servegym.envs.workloads.traces.columns import SECONDS, TOKENS_OR_ZERO, Instant
from servegym.envs.workloads.traces.files import TraceFile
from servegym.envs.workloads.traces.format import Trace, TraceFormat, drop, in_order

if TYPE_CHECKING:
    from servegym.envs.workloads.traces.config import TraceConfig

_ORIGINAL = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_RENAMED = ("t_s", "prompt_tokens", "output_tokens")


def _read(file: TraceFile, config: TraceConfig) -> Trace:
    if "TIMESTAMP" in file.columns:
        time, prompt, output = _ORIGINAL
        columns = file.read({time: Instant(), prompt: TOKENS_OR_ZERO, output: TOKENS_OR_ZERO})
        instants = columns[time]
        columns[time] = (instants - instants.min()) / np.timedelta64(1, "s")
    else:
        time, prompt, output = _RENAMED
        columns = file.read({time: SECONDS, prompt: TOKENS_OR_ZERO, output: TOKENS_OR_ZERO})
    keep = (columns[prompt] > 0) & (columns[output] > 0)
    columns = drop(keep, columns)
    dropped = {"zero tokens": int((~keep).sum())}
    return Trace(in_order(columns[time], columns[prompt], columns[output]), dropped)


AZURE = TraceFormat(
    name="azure",
    description="Azure 2023 (code, conv) and 2024 (one week): TIMESTAMP, ContextTokens, GeneratedTokens",
    source="github.com/Azure/AzurePublicDataset, CC-BY-4.0; cite Splitwise (ISCA 2024) or DynamoLLM (HPCA 2025)",
    columns=(_ORIGINAL, _RENAMED),
    read=_read,
)
