"""The sampled step: each token walks through a recorded or generated sequence, expert by expert."""

from __future__ import annotations

from servegym.envs.simulator.kernel.blocks import mix
from servegym.envs.simulator.kernel.experts.costs import add_communication, interpolate
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import engine_at, floats, ints, longs, request_at, shorts
from servegym.envs.simulator.kernel.progress import computed_tokens
from servegym.envs.simulator.kernel.state import DECODE, STEP_STEADY, Experts, State


@jit
def _route_token(x: Experts, token: int, source: int, salt: int, weight: float, bucket: int) -> None:
    """Send one token through all layers: loads of slots, traffic of ranks, counts by source."""
    per_rank, cells = x.slots // x.ranks, x.layers * x.ranks
    traffic = floats(x.traffic_at)
    home = source
    counted = ((bucket * x.engines + source // x.ranks_per_engine) * x.layers) * x.experts
    for layer in range(x.layers):
        chosen = (token * x.layers + layer) * x.top_k
        touched = next_home = 0
        for k in range(x.top_k):
            expert = shorts(x.bank_at)[chosen + k]
            known = layer * x.experts + expert
            replicas = ints(x.replicas_at)[known]
            which = salt % replicas if replicas > 1 else 0
            slot = ints(x.expert_slots_at)[known * x.most_replicas + which]
            floats(x.slot_load_at)[layer * x.slots + slot] += weight
            floats(x.counts_at)[counted + known] += weight
            rank = slot // per_rank
            if k == 0:
                next_home = rank
            new = True
            for i in range(touched):
                new = new and longs(x.touched_at)[i] != rank
            if new:
                longs(x.touched_at)[touched] = rank
                touched += 1
        back = home if x.returning else next_home
        for i in range(touched):
            rank = longs(x.touched_at)[i]
            place = layer * x.ranks + rank
            if rank != home:  # dispatch
                traffic[place] += weight
                traffic[cells + layer * x.ranks + home] += weight
            if rank != back:  # combine
                traffic[2 * cells + layer * x.ranks + back] += weight
                traffic[3 * cells + place] += weight
        if not x.returning:
            home = next_home


@jit
def _route_engine(s: State, x: Experts, i: int, bucket: int) -> None:
    """Send the tokens of one engine's step; of a long prefill chunk an even sample, with weights."""
    engine = engine_at(s.engines_at, x.first_engine + i)
    serial = 0
    steady = engine.activity == STEP_STEADY
    for position in range(engine.running):
        r = ints(engine.running_at)[position]
        request = request_at(s.requests_at, r)
        decoding = request.status == DECODE
        count = 1 if decoding and steady else ints(engine.scheduled_at)[position]
        if count == 0:
            continue
        first = computed_tokens(s, engine, r)
        drawn = min(count, x.chunk_sample)
        for j in range(drawn):
            place = (first + j * count // drawn + request.bank_offset) % request.bank_length
            salt = mix(x.steps, serial) & 0x7FFFFFFF
            source = i * x.ranks_per_engine + serial % x.ranks_per_engine
            _route_token(x, request.bank_start + place, source, salt, count / drawn, bucket)
            serial += 1


@jit
def _route_all(s: State, x: Experts, bucket: int) -> None:
    """Send the tokens of the step, one dummy token of an idle engine."""
    for cell in range(x.layers * x.slots):
        floats(x.slot_load_at)[cell] = 0.0
    for cell in range(4 * x.layers * x.ranks):
        floats(x.traffic_at)[cell] = 0.0
    for i in range(x.engines):
        engine = engine_at(s.engines_at, x.first_engine + i)
        if engine.activity >= STEP_STEADY:
            _route_engine(s, x, i, bucket)
        elif engine.alive:
            dummy = mix(x.steps, i) & 0x7FFFFFFF
            _route_token(x, dummy % x.bank_tokens, i * x.ranks_per_engine, dummy, 1.0, bucket)


@jit
def sampled_step(s: State, x: Experts, bucket: int) -> float:
    """Duration of the MoE layers of the step, in seconds, from the sequences that its tokens follow."""
    _route_all(s, x, bucket)
    ranks, per_rank, cells = x.ranks, x.slots // x.ranks, x.layers * x.ranks
    traffic = floats(x.traffic_at)
    total_s = traffic_sum = imbalance = balancedness = 0.0
    for layer in range(x.layers):
        slowest = heaviest = all_load = busiest = combining = 0.0
        for r in range(ranks):
            load, active = 0.0, 0
            for p in range(r * per_rank, (r + 1) * per_rank):
                tokens = floats(x.slot_load_at)[layer * x.slots + p]
                load += tokens
                active += tokens > 0.0
            cost = interpolate(floats(x.compute_at), x.compute_size, load * x.compute_scale) + x.expert_s * active
            slowest = max(slowest, cost)
            heaviest = max(heaviest, load)
            all_load += load
            place = layer * ranks + r
            busiest = max(busiest, max(traffic[place], traffic[cells + place]))
            combining = max(combining, max(traffic[2 * cells + place], traffic[3 * cells + place]))
            floats(x.rank_load_at)[r] += load
        total_s += slowest
        traffic_sum += 0.5 * (busiest + combining)
        imbalance += heaviest * ranks / all_load
        balancedness += all_load / (heaviest * ranks)
    x.imbalance_sum += imbalance / x.layers
    x.balancedness_sum += balancedness / x.layers
    return add_communication(x, total_s, traffic_sum)
