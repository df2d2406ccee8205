"""The points at which a calibration measures an engine."""

from __future__ import annotations

from dataclasses import dataclass

from servegym.envs.profiles.profile import EngineLimits

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_CONTEXTS = (32, 512, 1536)
_CHUNKS = (16, 64, 256, 512, 1024, 2048)
_PRIORS = (1024, 2048)
_KV_SHARE = 0.7
STEPS = 12
"""Decode steps of a point."""
_STREAMS = (2, 6, 14)
_TRAFFIC_BUDGETS = 2
"""Longest prompt of traffic, in token budgets of a step: some are prefilled in chunks, as in service."""
TRAFFIC_REQUESTS = 30
"""Requests of a visit of traffic, over all streams."""
TRAFFIC_OUTPUTS = (4, 64)
"""Shortest and longest output of traffic."""


@dataclass(frozen=True, slots=True)
class Point:
    """Requests that are sent together.

    Attributes:
        decodes: requests that decode.
        context: prompt tokens of each of them.
        chunk: prompt tokens of a request that comes alone, or in the midst of the decoding ones; 0 for none.
        prior: prompt tokens before them that are in the prefix cache.
        streams: in place of all that: requests of random lengths, prompts of up to ``chunk`` tokens, that are always in
            flight, as in service. Steps take longer there than alone: caches are shared with what comes and goes.
    """

    decodes: int = 0
    context: int = 0
    chunk: int = 0
    prior: int = 0
    streams: int = 0

    @property
    def name(self) -> str:
        """Short and unique."""
        if self.streams:
            return f"traffic {self.streams} x {self.chunk}"
        parts = [f"decode {self.decodes} x {self.context}"] if self.decodes else []
        parts += [f"prefill {self.chunk}" + (f" after {self.prior}" if self.prior else "")] if self.chunk else []
        return ", ".join(parts)


def design(limits: EngineLimits, *, traffic: bool = False) -> list[Point]:
    """Return the points for an engine: within its batch, budget, context and KV cache.

    Args:
        limits: the engine's.
        traffic: with requests of random lengths, whose steps only the engine's own records tell apart.
    """
    kv = _KV_SHARE * limits.num_blocks * limits.block_size
    room = limits.max_model_len - 4 * STEPS
    chunks = [chunk for chunk in _CHUNKS if chunk <= min(limits.max_num_batched_tokens, room)]
    points = [
        Point(decodes=batch, context=context)
        for batch in _BATCHES
        for context in _CONTEXTS
        if batch <= limits.max_num_seqs and context <= room and batch * (context + 4 * STEPS) <= kv
    ]
    points += [Point(chunk=chunk) for chunk in chunks]
    if limits.enable_prefix_caching:
        points += [
            Point(chunk=chunk, prior=prior)
            for prior in _PRIORS
            for chunk in chunks
            if chunk in (64, 512) and prior % limits.block_size == 0 and prior + chunk <= min(room, kv)
        ]
    points += [
        Point(decodes=batch, context=512, chunk=chunk)
        for batch in (2, 8)
        for chunk in (64, 512)
        if batch < limits.max_num_seqs and chunk in chunks and room >= 512 and batch * (512 + 4 * STEPS) + chunk <= kv
    ]
    if traffic:
        busy = [(streams, _longest_in_traffic(limits, streams, room, kv)) for streams in _STREAMS]
        points += [
            Point(streams=streams, chunk=longest)
            for streams, longest in busy
            if streams <= limits.max_num_seqs and longest >= _CHUNKS[0]
        ]
    return points


def _longest_in_traffic(limits: EngineLimits, streams: int, room: int, kv: float) -> int:
    """Return prompt tokens that as many requests at once may have without a preemption."""
    fits = int(kv / streams) - TRAFFIC_OUTPUTS[1]
    return min(_TRAFFIC_BUDGETS * limits.max_num_batched_tokens, room - TRAFFIC_OUTPUTS[1], fits)
