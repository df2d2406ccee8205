"""What policies see of a simulated run, read from its memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from servegym.baselines.interface import (
    C_WAITING,
    CONTEXT_COLUMNS,
    QUEUE_COLUMNS,
    EngineViews,
    QueueView,
    RequestView,
)
from servegym.envs.simulator.build import Memory
from servegym.envs.simulator.kernel.queues import read_queue_of


def request_view(memory: Memory) -> RequestView:
    """Return the request that needs an engine."""
    row = memory.request_row
    now, arrival, prompt, priority, deadline, user, session, turn, index, last, *uniforms, key, received = row.tolist()
    return RequestView(
        index=int(index),
        now_s=now,
        arrival_s=arrival,
        prompt_tokens=int(prompt),
        priority=int(priority),
        user=int(user),
        session=int(session),
        turn=int(turn),
        deadline_s=deadline,
        last_engine=int(last),
        uniforms=(uniforms[0], uniforms[1]),
        prefix_key=int(key),
        received_tokens=int(received),
    )


def engine_views(memory: Memory) -> EngineViews:
    """Return the engines at that decision."""
    return EngineViews(memory.engine_view.copy(order="C"))


def queue_view(memory: Memory, engine: int) -> tuple[QueueView, npt.NDArray[np.int32]]:
    """Return the waiting queue of an engine in order of arrival, and which requests they are, shape (waiting,)."""
    rows = np.empty((int(memory.engines[engine]["waiting"]), QUEUE_COLUMNS))
    members = np.empty(len(rows), dtype=np.int32)
    context = np.empty(CONTEXT_COLUMNS)
    count = read_queue_of(memory.cluster, engine, rows, members, context)
    now, running, max_num_seqs, free, total, size, rate = context[:C_WAITING].tolist()
    queue = QueueView(
        data=rows[:count],
        now_s=now,
        running=int(running),
        max_num_seqs=int(max_num_seqs),
        free_blocks=int(free),
        total_blocks=int(total),
        block_size=int(size),
        prefill_tokens_per_s=rate,
    )
    return queue, members[:count]
