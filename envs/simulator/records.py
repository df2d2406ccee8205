"""The records of requests, engines and the prefix index, as the kernel expects them at the start of a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.envs.profiles.profile import Profile, StepCost
from servegym.envs.profiles.rates import decode_step_s, prefill_tokens_per_s
from servegym.envs.simulator.config import EngineSpec, RouterConfig
from servegym.envs.simulator.kernel.progress import NEVER
from servegym.envs.simulator.kernel.state import ENGINE, INDEX_LRU, INDEX_NODE, NONE, PENDING, REQUEST
from servegym.envs.workloads.table import RequestTable
from servegym.errors import InputError


def check_fit(table: RequestTable, engines: Sequence[EngineSpec], source: str) -> None:
    """Make sure that every engine can serve every request alone.

    Raises:
        InputError: names the request, its tokens and the limit.
    """
    total = table.prompt_tokens.astype(np.int64) + table.output_tokens
    for limit in {spec.limits for spec in engines}:
        # The last output token needs no KV, and block 0 is vLLM's null block.
        capacity = (limit.num_blocks - 1) * limit.block_size + 1
        for name, allowed in (("KV cache", capacity), ("max_model_len", limit.max_model_len)):
            if (total > allowed).any():
                row = int((total > allowed).argmax())
                raise InputError(
                    source,
                    f"requests[{row}]",
                    f"got {table.prompt_tokens[row]} prompt + {table.output_tokens[row]} output tokens, which can never"
                    f" fit; allowed: at most {allowed} tokens ({name} of an engine)",
                )


def check_ranks(engines: Sequence[EngineSpec]) -> None:
    """Make sure that engines can take each step together.

    Raises:
        InputError: some of them schedule asynchronously and some do not.
    """
    if len({spec.limits.async_scheduling for spec in engines}) > 1:
        raise InputError(
            "cluster",
            "engine.async_scheduling",
            "got true and false; allowed in mode lockstep: the same for all engines",
        )


def dense(ids: npt.NDArray[np.int32]) -> tuple[int, npt.NDArray[np.int32]]:
    """Number ids from 0 without gaps, NONE staying NONE."""
    if (ids < 0).all():
        return 0, ids
    known, dense = np.unique(ids, return_inverse=True)
    missing = int((known < 0).sum())
    return len(known) - missing, np.where(ids < 0, NONE, dense - missing).astype(np.int32)


def request_records(
    table: RequestTable,
    users: npt.NDArray[np.int32],
    sessions: npt.NDArray[np.int32],
    templates: npt.NDArray[np.int32],
) -> npt.NDArray[Any]:
    """Return REQUEST records, shape (requests,), before anything has arrived.

    Args:
        table: the requests.
        users: their ids, numbered without gaps, shape (requests,).
        sessions: the same of sessions.
        templates: the same of templates.
    """
    records = np.zeros(len(table), dtype=REQUEST)
    for name in (
        "arrival_s",
        "think_s",
        "deadline_s",
        "predicted_tokens",
        "stream",
        "turn",
        "priority",
        "template_tokens",
    ):
        records[name] = getattr(table, name)
    records["prompt"] = table.prompt_tokens
    records["output"] = table.output_tokens
    records["user"], records["session"], records["template"] = users, sessions, templates
    records["rank"] = np.arange(len(table))
    records["child"] = NONE
    followers = np.flatnonzero(table.parent >= 0)
    records["child"][table.parent[followers]] = followers
    if (np.diff(table.stream) <= 0).any():
        order = np.argsort(table.stream, kind="stable")
        same = table.stream[order][1:] == table.stream[order][:-1]
        records["shared_stream"][order[1:][same]] = 1
        records["shared_stream"][order[:-1][same]] = 1
    for name in ("first_s", "finish_s"):
        records[name] = np.nan
    for name in ("engine", "row", "link", "heap_child"):
        records[name] = NONE
    records["served"] = NONE
    records["status"] = PENDING
    return records


def engine_records(engines: Sequence[EngineSpec], order: int) -> npt.NDArray[Any]:
    """Return ENGINE records, shape (engines,), idle and empty.

    Args:
        engines: limits and step times.
        order: how waiting queues are kept, an ORDER_* constant.
    """
    records = np.zeros(len(engines), dtype=ENGINE)
    for place, (record, spec) in enumerate(zip(records, engines, strict=True)):
        if place > 0 and spec is engines[place - 1]:
            records[place] = records[place - 1]
            continue
        limit, cost = spec.limits, _compiled(spec.profile, spec.limits.max_num_batched_tokens)
        record["block_size"] = limit.block_size
        record["num_blocks"] = limit.num_blocks
        record["max_num_seqs"] = limit.max_num_seqs
        record["max_num_batched_tokens"] = limit.max_num_batched_tokens
        record["long_prefill_threshold"] = limit.long_prefill_token_threshold
        record["prefix_caching"] = limit.enable_prefix_caching
        record["priority_preemption"] = limit.scheduling_policy == "priority"
        record["order"] = order
        record["ahead"] = limit.async_scheduling
        record["fixed_s"], record["sequence_s"] = cost.fixed_s, cost.sequence_s
        record["pair_s"], record["context_s"] = cost.pair_s, cost.context_s
        record["slowdown"] = spec.slowdown
        record["group"] = NONE
        record["prefill_tokens_per_s"] = prefill_tokens_per_s(spec.profile) / spec.slowdown
        record["decode_step_s"] = decode_step_s(spec.profile) * spec.slowdown
        record["next_finish"] = NEVER
        record["picked"] = record["pick_budget"] = NONE
        record["queue_head"] = record["queue_tail"] = record["front"] = record["heap"] = NONE
        record["last_admitted"] = NONE
        record["accepting"] = record["alive"] = record["reporting"] = 1
    records["index"] = np.arange(len(engines))
    return records


def prefix_index(
    table: RequestTable, requests: npt.NDArray[Any], engines: npt.NDArray[Any], router: RouterConfig
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Fields and arrays of the router's prefix index; nothing where no two requests can share a block."""
    config = router.prefix_index
    shared = table.prefix_block_tokens > 0 or (table.template >= 0).any() or requests["shared_stream"].any()
    if config is None or not shared or not engines["prefix_caching"].any():
        return {}, {}
    blocks = np.minimum(table.prompt_tokens // config.block_tokens, config.max_match_blocks)
    total = max(int(blocks.sum(dtype=np.int64)), 1)
    capacity = min(config.capacity_blocks, total)
    slots = 1 << (2 * min(capacity * len(engines), total)).bit_length()
    lru = np.zeros(len(engines), dtype=INDEX_LRU)
    lru["oldest"] = lru["newest"] = NONE
    fields = {
        "indexing": True,
        "index_block_tokens": config.block_tokens,
        "index_capacity": capacity,
        "index_max_match": config.max_match_blocks,
        "index_ttl_s": np.inf if config.ttl_s is None else config.ttl_s,
        "prefix_key_blocks": router.prefix_key_blocks,
        "index_mask": slots - 1,
    }
    arrays = {
        "index_slots": np.full(slots, NONE, dtype=np.int32),
        "index_nodes": np.empty(capacity * len(engines), dtype=INDEX_NODE),
        "index_lru": lru,
    }
    return fields, arrays


def step_costs(engines: Sequence[EngineSpec], lockstep: bool) -> list[StepCost]:
    """Tabulated step costs of each engine; in lockstep MoE layers see the tokens of all ranks."""
    budget = max(spec.limits.max_num_batched_tokens for spec in engines) * (len(engines) if lockstep else 1)
    costs: list[StepCost] = []
    for place, spec in enumerate(engines):
        same = place > 0 and spec is engines[place - 1]
        costs.append(costs[-1] if same else _compiled(spec.profile, budget))
    return costs


@lru_cache(maxsize=64)
def _compiled(profile: Profile, max_tokens: int) -> StepCost:
    """Tabulate a profile once: the kernel only reads the tables."""
    return profile.compile(max_tokens)
