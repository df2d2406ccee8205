"""What the MoE layers of a step cost when the experts differ: the heaviest rank of each layer decides.

The time of a layer on a rank is ``compute(load) + expert_s * activated``: ``load`` counts the tokens that the rank's
experts receive, ``activated`` the experts that receive any, whose weights must be read. The layer takes as long as the
slowest rank; dispatch and combine take as long as the rank with the most traffic.

*Mean field*: loads are expectations over the tasks of the batch. A batch of few tokens is more uneven than its
expectation, so the heaviest rank's excess, E[max] / max E of independent normal loads, is tabulated by batch size for
the present mix of tasks. *Sampled*: each token walks through a recorded or generated sequence, expert by expert.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

from servegym.envs.simulator.kernel.blocks import mix
from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import engine_at, experts_at, floats, ints, longs, request_at, shorts
from servegym.envs.simulator.kernel.progress import computed_tokens
from servegym.envs.simulator.kernel.state import BATCH_SIZES, DECODE, STEP_STEADY, WINDOW_BUCKETS, Engine, State

Experts: TypeAlias = Any  # an EXPERTS record

_MIX_TOKENS = 65536.0  # of the running mix of tasks; few requests at a time make an uneven mix, but no drift
_PRESSURE_WEIGHT = 1.0 / 128.0  # of one step in the running average of ranks' loads
_MIX_TOLERANCE = 0.1  # total variation between the running mix and that of the tables before they are made anew


@jit
def count_steady_tasks(s: State, engine: Engine) -> None:
    """Tokens of a common step by task: one per decoding request, and the chunks behind them."""
    tokens = floats(engine.task_tokens_at)
    for task in range(engine.tasks):
        tokens[task] = longs(engine.task_decoding_at)[task]
    for i in range(engine.decoding, engine.running):
        tokens[request_at(s.requests_at, ints(engine.running_at)[i]).task] += ints(engine.scheduled_at)[i]


@jit
def count_mixed_tasks(s: State, engine: Engine) -> None:
    """Tokens of a mixed step by task."""
    tokens = floats(engine.task_tokens_at)
    for task in range(engine.tasks):
        tokens[task] = 0.0
    for i in range(engine.running):
        tokens[request_at(s.requests_at, ints(engine.running_at)[i]).task] += ints(engine.scheduled_at)[i]


@jit
def _at(table: Any, size: int, x: float) -> float:
    """Linear interpolation in a table over 0, 1, ..., ``size - 1``, with the last slope beyond."""
    i = min(int(x), size - 2)
    return table[i] + (table[i + 1] - table[i]) * (x - i)


@jit
def _normal_below(x: float) -> float:
    return 0.5 * (1.0 + math.erf(x * 0.7071067811865476))


@jit
def expected_max(mean: Any, deviation: Any, count: int) -> float:
    """E[max] of independent normal variables; by the trapezoidal rule over P(max > x)."""
    top, widest = -math.inf, 0.0
    for r in range(count):
        top = max(top, mean[r])
        widest = max(widest, deviation[r])
    if widest == 0.0 or count == 1:
        return top
    points = 14
    width = 7.0 * widest / points
    total = 0.0
    for point in range(points + 1):
        x = top - 3.0 * widest + point * width
        below = 1.0
        for r in range(count):
            if deviation[r] > 0.0:
                below *= _normal_below((x - mean[r]) / deviation[r])
            elif x < mean[r]:
                below = 0.0
        total += (1.0 - below) * (0.5 if point in (0, points) else 1.0)
    return max(top, top - 3.0 * widest + total * width)


@jit
def _tabulate(x: Experts, first_layer: int, last_layer: int) -> None:
    """Tabulate, by batch size, activated experts and the excess of heaviest ranks; for the tables' mix of tasks."""
    ranks, tasks, per_rank = x.ranks, x.tasks, x.slots // x.ranks
    mix_now = floats(x.table_mix_at)
    mean, deviation = np.zeros(ranks), np.zeros(ranks)
    chosen = np.zeros(x.slots)
    for layer in range(first_layer, last_layer):
        for p in range(x.slots):
            expert = ints(x.slot_expert_at)[layer * x.slots + p]
            chosen[p] = 0.0
            for task in range(tasks):
                popularity = floats(x.popularity_at)[(task * x.layers + layer) * x.experts + expert]
                chosen[p] += mix_now[task] * popularity
            chosen[p] /= ints(x.replicas_at)[layer * x.experts + expert]
        for size in range(BATCH_SIZES):
            tokens = 2.0**size
            row = layer * BATCH_SIZES + size
            heaviest = 0.0
            for r in range(ranks):
                active = variance = 0.0
                for p in range(r * per_rank, (r + 1) * per_rank):
                    hit = 1.0 - math.exp(tokens * math.log1p(-min(chosen[p], 0.999999)))
                    active += hit
                    variance += hit * (1.0 - hit)
                floats(x.active_at)[row * ranks + r] = active
                mean[r], deviation[r] = active, math.sqrt(variance)
                heaviest = max(heaviest, active)
            excess = expected_max(mean, deviation, ranks) / heaviest if heaviest > 0.0 else 1.0
            floats(x.active_excess_at)[row] = excess
            heaviest = 0.0
            for r in range(ranks):
                first = second = 0.0
                for task in range(tasks):
                    cell = (layer * ranks + r) * tasks + task
                    first += mix_now[task] * floats(x.share_at)[cell]
                    second += mix_now[task] * floats(x.second_at)[cell]
                mean[r] = tokens * first
                deviation[r] = math.sqrt(tokens * max(second - first * first, 0.0))
                heaviest = max(heaviest, mean[r])
            floats(x.load_excess_at)[row] = expected_max(mean, deviation, ranks) / heaviest if heaviest > 0.0 else 1.0


@jit
def _follow_mix(x: Experts) -> None:
    """Move the running mix towards the tokens of this step; make the tables anew when it has left theirs."""
    total = 0.0
    for task in range(x.tasks):
        total += floats(x.step_tasks_at)[task]
    distance = 0.0
    weight = min(total / _MIX_TOKENS, 0.1)
    for task in range(x.tasks):
        share = floats(x.step_tasks_at)[task] / total
        floats(x.mix_at)[task] += weight * (share - floats(x.mix_at)[task])
        distance += 0.5 * abs(floats(x.mix_at)[task] - floats(x.table_mix_at)[task])
    if distance > _MIX_TOLERANCE:
        for task in range(x.tasks):
            floats(x.table_mix_at)[task] = floats(x.mix_at)[task]
        _tabulate(x, 0, x.layers)


@jit
def _gather(s: State, x: Experts) -> float:
    """Collect the tokens of the step by source engine and task; returns their sum. Idle ranks run one dummy token."""
    total = 0.0
    for task in range(x.tasks):
        floats(x.step_tasks_at)[task] = 0.0
    for i in range(x.engines):
        engine = engine_at(s.engines_at, x.first_engine + i)
        row = i * x.tasks
        busy = engine.activity >= STEP_STEADY
        for task in range(x.tasks):
            tokens = floats(engine.task_tokens_at)[task] if busy else floats(x.mix_at)[task] * engine.alive
            floats(x.source_tasks_at)[row + task] = tokens
            floats(x.step_tasks_at)[task] += tokens
            total += tokens
    return total


@jit
def _mean_field_step(x: Experts, tokens: float) -> float:
    ranks, tasks = x.ranks, x.tasks
    step_tasks, source_tasks = floats(x.step_tasks_at), floats(x.source_tasks_at)
    compute = floats(x.compute_at)
    place = min(math.log2(max(tokens, 1.0)), BATCH_SIZES - 1.001)
    size = int(place)
    part = place - size
    total_s = traffic_sum = imbalance = balancedness = 0.0
    for layer in range(x.layers):
        row = layer * BATCH_SIZES + size
        load_excess = _blend(x.load_excess_at, row, part)
        active_excess = _blend(x.active_excess_at, row, part)
        slowest = heaviest = all_load = busiest = combining = 0.0
        for r in range(ranks):
            cell = (layer * ranks + r) * tasks
            source = (r // x.ranks_per_engine) * tasks
            load = arriving = leaving = 0.0
            for task in range(tasks):
                own = source_tasks[source + task] / x.ranks_per_engine
                load += step_tasks[task] * floats(x.share_at)[cell + task]
                elsewhere = step_tasks[task] - own if x.returning else step_tasks[task]
                here = own if x.returning else step_tasks[task]
                arriving += elsewhere * floats(x.arrive_at)[cell + task]
                leaving += here * floats(x.leave_at)[cell + task]
            active = floats(x.active_at)[row * ranks + r] * (1.0 - part)
            active += floats(x.active_at)[(row + 1) * ranks + r] * part
            cost = _at(compute, x.compute_size, load * load_excess * x.compute_scale)
            slowest = max(slowest, cost + x.expert_s * active * active_excess)
            heaviest = max(heaviest, load)
            all_load += load
            busiest = max(busiest, max(arriving, leaving))
            if not x.returning:
                arriving = leaving = 0.0
                for task in range(tasks):
                    arriving += step_tasks[task] * floats(x.combine_arrive_at)[cell + task]
                    leaving += step_tasks[task] * floats(x.combine_leave_at)[cell + task]
                combining = max(combining, max(arriving, leaving))
            floats(x.rank_load_at)[r] += load
        total_s += slowest
        # Where tokens are varies with where their experts are; where they return to does not.
        traffic_sum += busiest if x.returning else 0.5 * (busiest + combining) * load_excess
        ratio = heaviest * load_excess * ranks / all_load
        imbalance += ratio
        balancedness += 1.0 / ratio
    x.imbalance_sum += imbalance / x.layers
    x.balancedness_sum += balancedness / x.layers
    return _add_communication(x, total_s, traffic_sum)


@jit
def _blend(table_at: int, row: int, part: float) -> float:
    return floats(table_at)[row] * (1.0 - part) + floats(table_at)[row + 1] * part


@jit
def _add_communication(x: Experts, experts_s: float, traffic_sum: float) -> float:
    """Dispatch and combine, from the traffic of the busiest rank summed over layers, in tokens."""
    exchange_s = 0.0
    if x.uniform_traffic > 0.0:
        tokens = traffic_sum / x.layers / x.uniform_traffic
        exchange_s = _at(floats(x.exchange_at), x.exchange_size, tokens) * x.exchange_factor
    x.experts_s += experts_s
    x.exchange_s += exchange_s
    return experts_s + exchange_s


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
def _sampled_step(s: State, x: Experts, bucket: int) -> float:
    ranks, per_rank = x.ranks, x.slots // x.ranks
    for cell in range(x.layers * x.slots):
        floats(x.slot_load_at)[cell] = 0.0
    cells = x.layers * ranks
    traffic = floats(x.traffic_at)
    for cell in range(4 * cells):
        traffic[cell] = 0.0
    for i in range(x.engines):
        engine = engine_at(s.engines_at, x.first_engine + i)
        if engine.activity >= STEP_STEADY:
            _route_engine(s, x, i, bucket)
        elif engine.alive:
            dummy = mix(x.steps, i) & 0x7FFFFFFF
            _route_token(x, dummy % x.bank_tokens, i * x.ranks_per_engine, dummy, 1.0, bucket)
    total_s = traffic_sum = imbalance = balancedness = 0.0
    for layer in range(x.layers):
        slowest = heaviest = all_load = busiest = combining = 0.0
        for r in range(ranks):
            load, active = 0.0, 0
            for p in range(r * per_rank, (r + 1) * per_rank):
                tokens = floats(x.slot_load_at)[layer * x.slots + p]
                load += tokens
                active += tokens > 0.0
            cost = _at(floats(x.compute_at), x.compute_size, load * x.compute_scale) + x.expert_s * active
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
    return _add_communication(x, total_s, traffic_sum)


@jit
def _bucket(x: Experts) -> int:
    """The bucket of the load window that this step falls into, emptied when it is entered."""
    bucket = (x.steps // x.bucket_steps) % WINDOW_BUCKETS
    if x.steps % x.bucket_steps == 0:
        longs(x.bucket_steps_at)[bucket] = 0
        width = x.engines * x.tasks
        for cell in range(bucket * width, (bucket + 1) * width):
            floats(x.window_at)[cell] = 0.0
        if x.sampled:
            width = x.engines * x.layers * x.experts
            for cell in range(bucket * width, (bucket + 1) * width):
                floats(x.counts_at)[cell] = 0.0
    longs(x.bucket_steps_at)[bucket] += 1
    return bucket


@jit
def expert_step_s(s: State, group: int) -> float:
    """Duration of the MoE layers of the step that the group's engines have just begun, in seconds.

    Also counts loads for the expert policy, and adds a stall that a re-placement left.
    """
    x = experts_at(s.groups_at, group)
    tokens = _gather(s, x)
    bucket = _bucket(x)
    for cell in range(x.engines * x.tasks):
        floats(x.window_at)[bucket * x.engines * x.tasks + cell] += floats(x.source_tasks_at)[cell]
    _follow_mix(x)
    for r in range(x.ranks):
        floats(x.rank_load_at)[r] *= 1.0 - _PRESSURE_WEIGHT
    duration = _sampled_step(s, x, bucket) if x.sampled else _mean_field_step(x, tokens)
    x.steps += 1
    duration += x.stall_s
    x.stall_s = 0.0
    return duration


@jit
def placement_due(s: State, group: int) -> bool:
    """Whether the expert policy is to be asked before the group's next step."""
    x = experts_at(s.groups_at, group)
    return x.steps >= x.next_placement


@jit
def tabulate_layers(groups: Any, group: int, layers: Any) -> None:
    """Make the tables of some layers of a group anew, after their placement has changed.

    Args:
        groups: the EXPERTS records, shape (groups,).
        group: which one.
        layers: which, shape (m,).
    """
    for i in range(len(layers)):
        _tabulate(groups[group], layers[i], layers[i] + 1)


@jit
def measure_placement(
    bank: Any,
    tokens: Any,
    slot_of: Any,
    replicas: Any,
    ranks: int,
    per_rank: int,
    returning: bool,
    layers: Any,
    out: Any,
) -> None:
    """Measure what a placement makes of sampled tokens of one task.

    Args:
        bank: routed experts, shape (bank tokens, layers, top_k).
        tokens: sampled tokens, shape (n,).
        slot_of: slots of each expert, shape (layers, experts, most replicas).
        replicas: number of them, shape (layers, experts).
        ranks: EP ranks.
        per_rank: slots per rank.
        returning: tokens return to their source after each layer.
        layers: layers to measure, shape (m,).
        out: output, shape (m, ranks, 6), per token: experts chosen on the rank, their square, arrivals and departures
            of dispatch, arrivals and departures of combine. When tokens return, the third assumes that the source is
            elsewhere, the fourth that it is this rank, and combine, the mirror of dispatch, stays 0.
    """
    count = len(tokens)
    held = np.zeros(ranks)
    weight = 1.0 / count
    for i in range(len(layers)):
        layer = layers[i]
        for n in range(count):
            t = tokens[n]
            held[:] = 0.0
            first = 0
            for k in range(bank.shape[2]):
                expert = bank[t, layer, k]
                rank = slot_of[layer, expert, mix(t, layer) % replicas[layer, expert]] // per_rank
                held[rank] += 1.0
                if k == 0:
                    first = rank
            home = first
            if not returning and layer > 0:
                before = bank[t, layer - 1, 0]
                home = slot_of[layer - 1, before, mix(t, layer - 1) % replicas[layer - 1, before]] // per_rank
            touched = 0
            for r in range(ranks):
                touched += held[r] > 0.0
            for r in range(ranks):
                here = 1 if held[r] > 0.0 else 0
                out[i, r, 0] += held[r] * weight
                out[i, r, 1] += held[r] * held[r] * weight
                if returning or r != home:
                    out[i, r, 2] += here * weight
                if returning or r == home:
                    out[i, r, 3] += (touched - here) * weight
                if not returning:
                    if r == first:
                        out[i, r, 4] += (touched - here) * weight
                    else:
                        out[i, r, 5] += here * weight


@jit
def count_pairs(bank: Any, tokens: Any, out: Any) -> None:
    """Count how often experts of adjacent layers serve the same token.

    Args:
        bank: routed experts, shape (bank tokens, layers, top_k).
        tokens: sampled tokens, shape (n,).
        out: output, shape (layers - 1, experts, experts).
    """
    for n in range(len(tokens)):
        t = tokens[n]
        for layer in range(bank.shape[1] - 1):
            for i in range(bank.shape[2]):
                for j in range(bank.shape[2]):
                    out[layer, bank[t, layer, i], bank[t, layer + 1, j]] += 1.0


@jit
def pressure(x: Experts, engine: int) -> float:
    """Load of the engine's EP ranks over the mean, a running average; 1 when balanced."""
    own = total = 0.0
    for r in range(x.ranks):
        load = floats(x.rank_load_at)[r]
        total += load
        if r // x.ranks_per_engine == engine - x.first_engine:
            own += load
    if total == 0.0:
        return 1.0
    return own / x.ranks_per_engine / (total / x.ranks)
