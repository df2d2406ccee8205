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
    FloatArray,
)
from servegym.envs.profiles.profile import EngineLimits
from servegym.envs.simulator.config import EngineSpec, RouterConfig, Telemetry
from servegym.envs.simulator.engine_layout import EngineLayout, engine_layout
from servegym.envs.simulator.experts.model import ExpertModel
from servegym.envs.simulator.kernel.blocks import reset_pools
from servegym.envs.simulator.kernel.state import CLUSTER, NONE, TELEMETRY
from servegym.envs.simulator.policy_forms import PolicyForms
from servegym.envs.simulator.records import (
    check_fit,
    check_ranks,
    dense,
    engine_records,
    prefix_index,
    request_records,
    step_costs,
)
from servegym.envs.simulator.spare import block
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
        policies: PolicyForms,
        *,
        telemetry: Telemetry,
        router: RouterConfig | None = None,
        lockstep: bool = False,
        log_events: bool = False,
        record_totals: bool = False,
        experts: ExpertModel | None = None,
        seed: int = 0,
        source: str = "workload",
    ) -> None:
        """Lay out the memory of one run.

        Args:
            table: the requests.
            engines: limits and step times.
            policies: what the kernel is told of the policies.
            telemetry: how often engines report, and how late.
            router: its prefix index.
            lockstep: all engines take each step together.
            log_events: keep ``events``.
            record_totals: keep ``totals``.
            experts: the expert model, None without one.
            seed: of what the kernel draws, and of the routes of tokens.
            source: where the table comes from, for error messages.

        Raises:
            InputError: a request can never fit an engine's KV cache or context length.
        """
        check_fit(table, engines, source)
        if lockstep:
            check_ranks(engines)
        self._owned: list[npt.NDArray[Any]] = []
        self._engine_memory: list[tuple[npt.NDArray[np.uint8], EngineLayout]] = []
        users, user = dense(table.user)
        sessions, session = dense(table.session)
        _, template = dense(table.template)
        count = len(table)
        self.requests = request_records(table, user, session, template)
        self.engines = engine_records(engines, policies.order)
        for record in self.engines:
            limit, sequences = int(record["max_num_batched_tokens"]), int(record["max_num_seqs"])
            record["max_num_batched_tokens"] = token_budget(policies.budget_share, limit, sequences)
        self.cluster = np.zeros(1, dtype=CLUSTER)
        self.engine_view = _first_view(self.engines)
        self.request_row = np.zeros(REQUEST_COLUMNS)
        self.context_row = np.zeros(CONTEXT_COLUMNS)
        self.request_params = policies.request_params
        self.events = np.zeros(2 * count if log_events else 0, dtype=np.int32)
        self.totals = np.zeros((count if record_totals else 0, 3))
        serving = policies.served_weights is not None
        self._lay_out_engines(table, engines, users if serving else None)
        self._add_costs(engines, lockstep, experts)
        if experts is not None:
            self._add_experts(experts, lockstep, seed)

        fields = _policy_fields(policies) | _table_fields(table) | _telemetry_fields(telemetry)
        fields |= {
            "seed": seed,
            "lockstep": lockstep,
            "step_s": np.inf,
            "logging": log_events,
            "recording": record_totals,
            "user_count": users,
            "engine_count": len(engines),
            "groups_at": experts.records.ctypes.data if experts is not None else 0,
        }
        fields |= dict.fromkeys(
            ("shown_snapshot", "pending", "last_engine", "order_engine", "stranded", "placement_group"), NONE
        )
        arrays = self._arrays(table, policies.engine_params)
        arrays |= {
            "telemetry": np.zeros((fields["telemetry_depth"], len(engines)), dtype=TELEMETRY),
            "user_engine": np.full(users, NONE, dtype=np.int32),
            "session_engine": np.full(sessions, NONE, dtype=np.int32),
            "charges": np.zeros(users + 1 if serving else 0),
        }
        index_fields, index_arrays = prefix_index(table, self.requests, self.engines, router or RouterConfig())
        fields |= index_fields
        fields |= {f"{name}_at": self._own(array) for name, array in (arrays | index_arrays).items()}
        record = self.cluster[0]
        for name, value in fields.items():
            record[name] = value
        reset_pools(self.engines)

    def lists(self, engine: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The running list of an engine, the tokens scheduled for it, and the requests just preempted.

        Each of shape (max_num_seqs,), valid up to the counts in the engine's record.
        """
        return self.array(engine, "running"), self.array(engine, "scheduled"), self.array(engine, "preempted")

    def array(self, engine: int, name: str) -> npt.NDArray[Any]:
        """An array of an engine's own, by the name of the field with its address less ``_at``."""
        memory, layout = self._engine_memory[engine]
        return layout.places[name].of(memory)

    def _arrays(self, table: RequestTable, engine_params: FloatArray) -> dict[str, npt.NDArray[Any]]:
        """Arrays of the CLUSTER record whose size follows from the requests and the engines."""
        size, count = len(self.engines), len(table)
        roots = np.flatnonzero(table.parent < 0).astype(np.int32)
        return {
            "requests": self.requests,
            "engines": self.engines,
            "event_s": np.full(size, np.inf),
            "snapshot_s": np.zeros(size),
            "changed": np.zeros(size, dtype=np.int32),
            # A frontend that takes longer for a longer prompt lets others overtake.
            "roots": roots[np.argsort(table.arrival_s[roots], kind="stable")],
            "later_s": np.zeros(count),
            "later": np.zeros(count, dtype=np.int32),
            "events": self.events,
            "prefix_start": table.prefix_start,
            "prefix_ids": table.prefix_ids,
            "engine_view": self.engine_view,
            "request_row": self.request_row,
            "totals": self.totals,
            "scores": np.zeros(size),
            "queue_row": np.zeros(QUEUE_COLUMNS),
            "context_row": self.context_row,
            "engine_params": engine_params,
            "request_params": self.request_params,
        }

    def _lay_out_engines(self, table: RequestTable, engines: Sequence[EngineSpec], served_users: int | None) -> None:
        longest = int((table.prompt_tokens + table.output_tokens).max())
        for record, spec in zip(self.engines, engines, strict=True):
            self._lay_out_engine(record, spec.limits, longest, served_users)

    def _add_costs(self, engines: Sequence[EngineSpec], lockstep: bool, experts: ExpertModel | None) -> None:
        for record, cost in zip(self.engines, step_costs(engines, lockstep), strict=True):
            # The expert model has its own account of communication.
            local = cost.local_table_s if experts is None else cost.local_table_s - cost.communication_table_s
            record["local_cost_at"] = self._own(local)
            record["moe_cost_at"] = self._own(cost.moe_table_s)

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
        row_length = longest // limits.block_size + 1 if limits.enable_prefix_caching else 0
        layout = engine_layout(
            limits.max_num_seqs,
            limits.num_blocks,
            limits.block_size,
            row_length,
            limits.async_scheduling,
            served_users,
        )
        if row_length:
            record["table_mask"] = record["free_mask"] = layout.places["table_keys"].length - 1
            record["row_length"] = row_length
        memory, zero = block(self, layout.size)
        for name in () if zero else layout.zeros:
            layout.places[name].of(memory)[:] = 0
        address = memory.ctypes.data
        for name, place in layout.places.items():
            record[f"{name}_at"] = address + place.offset
        self._engine_memory.append((memory, layout))


def _first_view(records: npt.NDArray[Any]) -> FloatArray:
    """The view of the engines, with the columns that never change, shape (engines, ENGINE_COLUMNS)."""
    view = np.zeros((len(records), ENGINE_COLUMNS), order="F")
    view[:, E_MAX_NUM_SEQS] = records["max_num_seqs"]
    view[:, E_KV_TOKENS] = (records["num_blocks"] - 1) * records["block_size"]
    view[:, E_MAX_BATCHED_TOKENS] = records["max_num_batched_tokens"]
    view[:, E_PREFILL_TOKENS_PER_S] = records["prefill_tokens_per_s"]
    view[:, E_DECODE_STEP_S] = records["decode_step_s"]
    view[:, [E_TRUE_PREFILL_TOKENS, E_TRUE_OUTPUT_TOKENS]] = np.nan
    return view


def _policy_fields(policies: PolicyForms) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "external_dispatch": policies.external_dispatch,
        "oracle": policies.oracle,
        "dispatch_oracle": policies.dispatch_oracle,
        "serving": policies.served_weights is not None,
        "engine_param_count": len(policies.engine_params),
        "request_param_count": len(policies.request_params),
        "engine_score_at": policies.engine_score,
        "request_key_at": policies.request_key,
    }
    if policies.served_weights is not None:
        fields["prompt_weight"], fields["output_weight"] = policies.served_weights
    return fields


def _table_fields(table: RequestTable) -> dict[str, Any]:
    return {
        "closed_loop": table.closed_loop,
        "shortest_think_s": table.think_s[table.parent >= 0].min() if table.closed_loop else 0.0,
        "root_count": int((table.parent < 0).sum()),
        "prefix_block_tokens": table.prefix_block_tokens,
    }


def _telemetry_fields(telemetry: Telemetry) -> dict[str, Any]:
    period, lag = telemetry.period_s, telemetry.lag_s
    return {
        "telemetry_period_s": period,
        "telemetry_lag_s": lag,
        "telemetry_depth": 2 + int(np.ceil(lag / period)) if period > 0 else 1,
    }
