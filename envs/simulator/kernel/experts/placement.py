"""What a placement makes of sampled tokens: loads and traffic of ranks, and pairs of experts in adjacent layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from servegym.envs.simulator.kernel.blocks import mix
from servegym.envs.simulator.kernel.jit import jit


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
