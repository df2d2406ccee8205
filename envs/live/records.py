"""What is known of a live run, under the names of the simulator's memory, so that the same code reads both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.baselines import interface as i
from servegym.baselines.interface import FloatArray, QueueView
from servegym.envs.live.options import LiveOptions
from servegym.envs.workloads.table import RequestTable

BLOCK_SIZE = 16  # of a live engine nobody knows it; only shares of blocks are ever shown
_REQUESTS = np.dtype(
    [
        *((name, "f8") for name in ("arrival_s", "first_s", "finish_s", "deadline_s")),
        *((name, "i4") for name in ("prompt", "output", "engine", "preemptions", "hit_tokens", "priority")),
    ]
)
_ENGINES = np.dtype(
    [
        *((name, "f8") for name in ("prefill_tokens_per_s", "decode_step_s", "ttft_ewma_s")),
        *((name, "i8") for name in ("alive", "running", "decoding", "waiting", "max_num_seqs")),
        *((name, "i8") for name in ("free_blocks", "num_blocks")),
    ]
)


@dataclass(slots=True)
class LiveMemory:
    """Records of a live run.

    Attributes:
        requests: a record per request; times are NaN until they come.
        engines: a record per engine.
        request_row: ``R_*`` entries of the pending dispatch.
        engine_view: ``E_*`` columns at the pending dispatch.
        context_row: ``C_*`` entries of the pending admission.
    """

    requests: npt.NDArray[Any]
    engines: npt.NDArray[Any]
    request_row: FloatArray
    engine_view: FloatArray
    context_row: FloatArray

    @classmethod
    def new(cls, table: RequestTable, options: LiveOptions, engines: int) -> LiveMemory:
        """Return the records of a run that has not begun."""
        requests = np.zeros(len(table), dtype=_REQUESTS)
        requests["arrival_s"] = np.inf
        requests["first_s"] = requests["finish_s"] = np.nan
        requests["deadline_s"] = table.deadline_s
        requests["prompt"], requests["output"] = table.prompt_tokens, table.output_tokens
        requests["priority"], requests["engine"] = table.priority, -1
        records = np.zeros(engines, dtype=_ENGINES)
        limits = options.limits
        records["prefill_tokens_per_s"], records["decode_step_s"] = limits.prefill_tokens_per_s, limits.decode_step_s
        records["max_num_seqs"] = limits.max_num_seqs
        # As vLLM counts, one block more than can be used.
        records["num_blocks"] = int(limits.kv_tokens) // BLOCK_SIZE + 1
        return cls(
            requests,
            records,
            np.zeros(i.REQUEST_COLUMNS),
            np.zeros((engines, i.ENGINE_COLUMNS)),
            np.zeros(i.CONTEXT_COLUMNS),
        )

    def queue(self, engine: int, members: Sequence[int], now_s: float, table: RequestTable) -> QueueView:
        """Return requests as the waiting queue of an engine, in the order given."""
        rows = np.zeros((len(members), i.QUEUE_COLUMNS))
        chosen = np.asarray(members, dtype=np.int64)
        arrival = self.requests["arrival_s"][chosen]
        for column, values in (
            (i.Q_WAIT_S, now_s - arrival),
            (i.Q_PROMPT_TOKENS, self.requests["prompt"][chosen]),
            (i.Q_PRIORITY, self.requests["priority"][chosen]),
            (i.Q_DEADLINE_S, table.deadline_s[chosen]),
            (i.Q_USER, table.user[chosen]),
            (i.Q_SESSION, table.session[chosen]),
            (i.Q_TURN, table.turn[chosen]),
            (i.Q_ARRIVAL_S, arrival),
            (i.Q_OUTPUT_TOKENS, np.nan),
            (i.Q_PREDICTED_TOKENS, table.predicted_tokens[chosen]),
            (i.Q_USER_SERVED, np.nan),
            (i.Q_INDEX, chosen),
        ):
            rows[:, column] = values
        record = self.engines[engine]
        return QueueView(
            data=rows,
            now_s=now_s,
            running=int(record["running"]),
            max_num_seqs=int(record["max_num_seqs"]),
            free_blocks=int(record["free_blocks"]),
            total_blocks=int(record["num_blocks"]) - 1,
            block_size=BLOCK_SIZE,
            prefill_tokens_per_s=float(record["prefill_tokens_per_s"]),
        )
