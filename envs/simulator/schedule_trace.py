"""What the simulated engine schedules at every step, in a form that vLLM's own scheduler can be compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from servegym.configuration import Config
from servegym.envs.profiles.profile import EngineLimits, Profile, StepTime, TokenCurve
from servegym.envs.simulator.build import Memory
from servegym.envs.simulator.config import EngineSpec, Telemetry
from servegym.envs.simulator.kernel import single
from servegym.envs.simulator.kernel.state import ORDER_FCFS, ORDER_PRIORITY, STEP_STEADY
from servegym.envs.simulator.policy_forms import PolicyForms
from servegym.envs.workloads.table import RequestTable

Token = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class ScheduleRequest(Config):
    """A request of a schedule spec."""

    id: str = Field(description="unique name")
    arrival_step: Annotated[int, Field(ge=0)] = Field(default=0, description="the step before which it joins, from 0")
    prompt: tuple[Token, ...] = Field(min_length=1, description="token ids")
    output_len: Positive = Field(description="tokens that it generates")
    priority: int = Field(default=0, description="smaller runs first, with policy priority")
    output: tuple[Token, ...] | None = Field(
        default=None, description="token ids that it generates; unique ones without"
    )

    @model_validator(mode="after")
    def _output_is_long_enough(self) -> Self:
        if self.output is not None and len(self.output) < self.output_len:
            raise ValueError(f"at least output_len={self.output_len} token ids in output")
        return self


class ScheduleSpec(Config):
    """Input of ``servegym schedule-trace``; names and meaning as in vLLM, ``num_blocks`` counts the null block."""

    max_num_seqs: Positive = Field(description="largest running batch, requests")
    max_num_batched_tokens: Positive = Field(description="token budget of a step")
    num_blocks: Annotated[int, Field(ge=2)] = Field(description="KV blocks, the null block included")
    block_size: Positive = Field(description="tokens per KV block")
    max_model_len: Annotated[int, Field(ge=2)] = Field(description="longest prompt and output, tokens")
    policy: Literal["fcfs", "priority"] = Field(default="fcfs", description="order of the waiting queue")
    prefix_caching: bool = Field(default=False, description="share KV blocks of equal prefixes")
    long_prefill_token_threshold: Annotated[int, Field(ge=0)] = Field(
        default=0, description="most tokens of a prefill chunk; 0: no limit"
    )
    async_scheduling: bool = Field(default=False, description="schedule each step before the one before has ended")
    requests: tuple[ScheduleRequest, ...] = Field(min_length=1, description="the requests")

    @model_validator(mode="after")
    def _requests_are_sound(self) -> Self:
        names = [request.id for request in self.requests]
        if len(set(names)) != len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"request ids that differ, {repeated!r} stands twice")
        for request in self.requests:
            if len(request.prompt) >= self.max_model_len:
                raise ValueError(f"prompts shorter than max_model_len={self.max_model_len}, not so {request.id!r}")
        return self


def schedule_trace(spec: ScheduleSpec, source: str = "spec") -> Iterator[dict[str, Any]]:
    """Run the engine alone, a step at a time, and yield what each step schedules.

    Yields:
        ``{"step": 0, "scheduled": {"r0": 270}, "preempted": [], "free_blocks": 382}`` for each step from 0 to the one
        that finishes the last request. Free blocks are counted after scheduling, before finished requests are freed.
        With ``async_scheduling`` what a step computes is known one line later: after the next step is scheduled.

    Raises:
        InputError: a request can never fit.
    """
    memory = _memory(spec, source)
    engine = memory.engines[0]
    running, scheduled, preempted = memory.lists(0)
    names = [request.id for request in spec.requests]
    arrivals = sorted(range(len(names)), key=lambda r: spec.requests[r].arrival_step)
    step = 0
    while memory.cluster["finished"][0] < len(names):
        while arrivals and spec.requests[arrivals[0]].arrival_step <= step:
            single.enqueue(memory.cluster, arrivals.pop(0), float(step))
        line: dict[str, Any] = {"step": step, "scheduled": {}, "preempted": []}
        busy = single.begin(memory.cluster, float(step)) >= 0
        if busy:
            count = int(engine["running"])
            tokens = scheduled[:count].copy()
            if engine["activity"] == STEP_STEADY:
                tokens[: int(engine["decoding"])] = 1
            line["scheduled"] = {
                names[r]: int(chunk) for r, chunk in zip(running[:count], tokens, strict=True) if chunk > 0
            }
            line["preempted"] = [names[r] for r in preempted[: int(engine["preempted_count"])]]
        yield line | {"free_blocks": int(engine["free_blocks"])}
        single.finish(memory.cluster, float(step + 1))
        step += 1


def _memory(spec: ScheduleSpec, source: str) -> Memory:
    requests = spec.requests
    prompts = np.array([len(request.prompt) for request in requests])
    # vLLM ends a request when prompt and output reach max_model_len.
    outputs = np.minimum([request.output_len for request in requests], spec.max_model_len - prompts)
    start, ids = _block_ids(spec)
    arrivals = np.array([request.arrival_step for request in requests], dtype=np.float64)
    table = RequestTable.build(
        arrivals,
        prompts,
        outputs,
        priority=[request.priority for request in requests],
        prefix_start=start,
        prefix_ids=ids,
        prefix_block_tokens=spec.block_size,
    )
    limits = EngineLimits(
        block_size=spec.block_size,
        num_blocks=spec.num_blocks,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        max_model_len=spec.max_model_len,
        long_prefill_token_threshold=spec.long_prefill_token_threshold,
        enable_prefix_caching=spec.prefix_caching,
        scheduling_policy=spec.policy,
        async_scheduling=spec.async_scheduling,
    )
    cost = StepTime(
        fixed_us=1.0, dense_us=TokenCurve(tokens=(1, 2), us=(0.0, 0.0)), prefill_pair_us=0, decode_context_us=0
    )
    profile = Profile(
        name="none", description="time does not matter", model="", hardware="", source="", engine=limits, step_time=cost
    )
    order = ORDER_PRIORITY if spec.policy == "priority" else ORDER_FCFS
    forms = PolicyForms(order=order)
    memory = Memory(table, [EngineSpec(profile=profile)], forms, telemetry=Telemetry(period_s=0), source=source)
    # vLLM's priority queue breaks the last tie by request id, as a string.
    names = [request.id for request in requests]
    memory.requests["rank"][sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    return memory


def _block_ids(spec: ScheduleSpec) -> tuple[list[int], list[int]]:
    """Identify full blocks by their content and all that precedes it, as vLLM's chained block hashes do.

    Returns:
        compressed rows (start, ids) over the full blocks of prompt and given output.
    """
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    start, ids = [0], []
    for request in spec.requests:
        # Without a given output the block that the prompt leaves open is nobody else's.
        tokens = request.prompt + (request.output or ())[: request.output_len]
        parent = 0
        for begin in range(0, len(tokens) - spec.block_size + 1, spec.block_size):
            parent = known.setdefault((parent, tokens[begin : begin + spec.block_size]), len(known) + 1)
            ids.append(parent)
        start.append(len(ids))
    return start, ids
