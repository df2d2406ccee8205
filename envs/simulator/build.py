"""Lay out the memory of a simulated cluster for a table of requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.baselines.heuristic import token_budget
from servegym.baselines.interface import (
    CONTEXT_COLUMNS,
    E_DECODE_STEP_S,
    E_KV_TOKENS,
    E_MAX_BATCHED_TOKENS,
    E_MAX_NUM_SEQS,
    E_PREFILL_TOKENS_PER_S,
    E_TRUE_OUTPUT_TOKENS,
    E_TRUE_PREFILL_TOKENS,
    ENGINE_COLUMNS,
    QUEUE_COLUMNS,
    REQUEST_COLUMNS,
)
from servegym.envs.profiles.profile import EngineLimits
from servegym.envs.simulator.config import EngineSpec, RouterConfig, Telemetry
from servegym.envs.simulator.experts.model import ExpertModel
from servegym.envs.simulator.kernel.blocks import reset_pools
from servegym.envs.simulator.kernel.state import (
    BLOCK,
    CLUSTER,
    NONE,
    TELEMETRY,
)
from servegym.envs.simulator.records import (
    check_fit,
    dense,
    engine_records,
    prefix_index,
    request_records,
    step_costs,
)
from servegym.envs.simulator.spare import array
from servegym.envs.workloads.table import RequestTable


class Memory:
    """All memory of one run; the kernel finds it through the addresses in ``cluster``.

    Attributes:
        cluster: the CLUSTER record, shape (1,).
        engines: ENGINE records, shape (engines,).
        requests: REQUEST records, shape (requests,).
        engine_view: view of the pending dispatch decision, shape (engines, ENGINE_COLUMNS), column by column.
        request_row: its request, shape (REQUEST_COLUMNS,).
        context_row: the engine whose queue was read last, shape (CONTEXT_COLUMNS,).
        request_params: parameters of the compiled request policy, read at each step.
        totals: reward integrals at the arrival of each request, shape (requests, 3), if recorded.
        events: log of first tokens (2 r) and ends (2 r + 1), shape (2 * requests,), or empty.
    """

    def __init__(
        self,
        table: RequestTable,
        engines: Sequence[EngineSpec],
        *,
        order: int,
        telemetry: Telemetry,
        router: RouterConfig | None = None,
        lockstep: bool = False,
        external_dispatch: bool = False,
        log_events: bool = False,
        oracle: bool = False,
        dispatch_oracle: bool = False,
        served_weights: tuple[float, float] | None = None,
        budget_share: float | None = None,
        record_totals: bool = False,
        engine_params: npt.ArrayLike = (),
        request_params: npt.ArrayLike = (),
        engine_score: int = 0,
        request_key: int = 0,
        experts: ExpertModel | None = None,
        seed: int = 0,
        source: str = "workload",
    ) -> None:
        """Lay out the memory of one run.

        Raises:
            InputError: a request can never fit an engine's KV cache or context length.
        """
        check_fit(table, engines, source)
        self._owned: list[npt.NDArray[Any]] = []
        users, user = dense(table.user)
        sessions, session = dense(table.session)
        _, template = dense(table.template)
        size, count = len(engines), len(table)
        self.requests = request_records(table, user, session, template)
        self.engines = engine_records(engines, order)
        for record in self.engines:
            limit, sequences = int(record["max_num_batched_tokens"]), int(record["max_num_seqs"])
            record["max_num_batched_tokens"] = token_budget(budget_share, limit, sequences)
        self.cluster = np.zeros(1, dtype=CLUSTER)
        self.engine_view = np.zeros((size, ENGINE_COLUMNS), order="F")
        self.request_row = np.zeros(REQUEST_COLUMNS)
        self.context_row = np.zeros(CONTEXT_COLUMNS)
        self.engine_view[:, E_MAX_NUM_SEQS] = self.engines["max_num_seqs"]
        self.engine_view[:, E_KV_TOKENS] = (self.engines["num_blocks"] - 1) * self.engines["block_size"]
        self.engine_view[:, E_MAX_BATCHED_TOKENS] = self.engines["max_num_batched_tokens"]
        self.engine_view[:, E_PREFILL_TOKENS_PER_S] = self.engines["prefill_tokens_per_s"]
        self.engine_view[:, E_DECODE_STEP_S] = self.engines["decode_step_s"]
        self.engine_view[:, [E_TRUE_PREFILL_TOKENS, E_TRUE_OUTPUT_TOKENS]] = np.nan
        self.events = np.zeros(2 * count if log_events else 0, dtype=np.int32)
        self.totals = np.zeros((count if record_totals else 0, 3))
        longest = int((table.prompt_tokens + table.output_tokens).max())
        costs = step_costs(engines, lockstep)
        for record, spec, cost in zip(self.engines, engines, costs, strict=True):
            self._lay_out_engine(record, spec.limits, longest, users if served_weights else None)
            # The expert model has its own account of communication.
            local = cost.local_table_s if experts is None else cost.local_table_s - cost.communication_table_s
            record["local_cost_at"] = self._own(local)
            record["moe_cost_at"] = self._own(cost.moe_table_s)
        if experts is not None:
            self._add_experts(experts, lockstep, seed)
        depth = 2 + int(np.ceil(telemetry.lag_s / telemetry.period_s)) if telemetry.period_s > 0 else 1
        roots = np.flatnonzero(table.parent < 0).astype(np.int32)
        # A frontend that takes longer for a longer prompt lets others overtake.
        roots = roots[np.argsort(table.arrival_s[roots], kind="stable")]
        parameters = [np.array(values, dtype=np.float64) for values in (engine_params, request_params)]
        self.request_params = parameters[1]
        fields: dict[str, Any] = {
            "seed": seed,
            "lockstep": lockstep,
            "step_s": np.inf,
            "external_dispatch": external_dispatch,
            "closed_loop": table.closed_loop,
            "shortest_think_s": table.think_s[table.parent >= 0].min() if table.closed_loop else 0.0,
            "telemetry_period_s": telemetry.period_s,
            "telemetry_lag_s": telemetry.lag_s,
            "telemetry_depth": depth,
            "logging": log_events,
            "oracle": oracle,
            "dispatch_oracle": dispatch_oracle,
            "serving": served_weights is not None,
            "user_count": users,
            "recording": record_totals,
            "engine_count": size,
            "root_count": len(roots),
            "prefix_block_tokens": table.prefix_block_tokens,
            "engine_param_count": len(parameters[0]),
            "request_param_count": len(parameters[1]),
            "engine_score_at": engine_score,
            "request_key_at": request_key,
        }
        if served_weights is not None:
            fields["prompt_weight"], fields["output_weight"] = served_weights
        fields |= dict.fromkeys(
            ("shown_snapshot", "pending", "last_engine", "order_engine", "stranded", "placement_group"), NONE
        )
        arrays: dict[str, npt.NDArray[Any]] = {
            "requests": self.requests,
            "engines": self.engines,
            "event_s": np.full(size, np.inf),
            "snapshot_s": np.zeros(size),
            "changed": np.zeros(size, dtype=np.int32),
            "roots": roots,
            "later_s": np.zeros(count),
            "later": np.zeros(count, dtype=np.int32),
            "events": self.events,
            "prefix_start": table.prefix_start,
            "prefix_ids": table.prefix_ids,
            "telemetry": np.zeros((depth, size), dtype=TELEMETRY),
            "user_engine": np.full(users, NONE, dtype=np.int32),
            "session_engine": np.full(sessions, NONE, dtype=np.int32),
            "engine_view": self.engine_view,
            "request_row": self.request_row,
            "totals": self.totals,
            "scores": np.zeros(size),
            "queue_row": np.zeros(QUEUE_COLUMNS),
            "context_row": self.context_row,
            "engine_params": parameters[0],
            "request_params": self.request_params,
            "charges": np.zeros(users + 1 if served_weights else 0),
        }
        index_fields, index_arrays = prefix_index(table, self.requests, self.engines, router or RouterConfig())
        fields |= index_fields
        arrays |= index_arrays
        fields |= {f"{name}_at": self._own(array) for name, array in arrays.items()}
        fields["groups_at"] = experts.records.ctypes.data if experts is not None else 0
        for name, value in fields.items():
            self.cluster[0][name] = value
        reset_pools(self.engines)

    def lists(self, engine: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The running list of an engine, the tokens scheduled for it, and the requests just preempted.

        Each of shape (max_num_seqs,), valid up to the counts in the engine's record.
        """
        owned = {array.ctypes.data: array for array in self._owned}
        record = self.engines[engine]
        return owned[record["running_at"]], owned[record["scheduled_at"]], owned[record["preempted_at"]]

    def _add_experts(self, experts: ExpertModel, lockstep: bool, seed: int) -> None:
        tasks = len(experts.bank.task_names)
        self.requests["task"] = experts.task
        if experts.config.mode == "sampled":
            start, length, offset = experts.sequences(seed)
            self.requests["bank_start"], self.requests["bank_length"] = start, length
            self.requests["bank_offset"] = offset
        for index, record in enumerate(self.engines):
            record["group"] = 0 if lockstep else index
            record["tasks"] = tasks
            record["task_decoding_at"] = self._own(np.zeros(tasks, dtype=np.int64))
            record["task_tokens_at"] = self._own(np.zeros(tasks))

    def _own(self, array: npt.NDArray[Any]) -> int:
        """Keep an array alive and return its address."""
        self._owned.append(array)
        return int(array.ctypes.data)

    def _lay_out_engine(self, record: Any, limits: EngineLimits, longest: int, served_users: int | None) -> None:
        seqs, blocks = limits.max_num_seqs, limits.num_blocks
        # Only these must begin as zeros; the others are written before they are read.
        zeros: dict[str, tuple[int, npt.DTypeLike]] = {
            "phases": (limits.block_size, np.int32),
        }
        if served_users is not None:
            zeros |= {"served": (served_users + 1, np.float64), "queued": (served_users + 1, np.int32)}
        shapes: dict[str, tuple[int, npt.DTypeLike]] = {
            name: (seqs, np.int32) for name in ("running", "scheduled", "preempted", "phase_of", "rows")
        }
        shapes["end_of"] = (seqs, np.int64)
        if limits.enable_prefix_caching:
            # Twice the blocks, at least: a table at most half full keeps probe sequences short.
            slots = 1 << (2 * blocks).bit_length()
            record["table_mask"] = record["free_mask"] = slots - 1
            record["row_length"] = longest // limits.block_size + 1
            zeros["table_keys"] = (slots, np.int64)
            shapes |= {"blocks": (blocks, BLOCK), "front": (blocks, np.int32), "free": (slots, np.int32)}
            shapes |= {"table_blocks": (slots, np.int32), "block_tables": (seqs * record["row_length"], np.int32)}
        for name, (length, dtype) in (zeros | shapes).items():
            record[f"{name}_at"] = self._own(array(self, length, dtype, zero=name in zeros))
