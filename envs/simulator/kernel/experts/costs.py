"""What the MoE layers of a step cost, from the loads of the ranks: interpolation, dispatch and combine."""

from __future__ import annotations

from typing import Any

from servegym.envs.simulator.kernel.jit import jit
from servegym.envs.simulator.kernel.memory import floats
from servegym.envs.simulator.kernel.state import Experts


@jit
def interpolate(table: Any, size: int, x: float) -> float:
    """Linear interpolation in a table over 0, 1, ..., ``size - 1``, with the last slope beyond."""
    i = min(int(x), size - 2)
    return table[i] + (table[i + 1] - table[i]) * (x - i)


@jit
def add_communication(x: Experts, experts_s: float, traffic_sum: float) -> float:
    """Dispatch and combine, from the traffic of the busiest rank summed over layers, in tokens."""
    exchange_s = 0.0
    if x.uniform_traffic > 0.0:
        tokens = traffic_sum / x.layers / x.uniform_traffic
        exchange_s = interpolate(floats(x.exchange_at), x.exchange_size, tokens) * x.exchange_factor
    x.experts_s += experts_s
    x.exchange_s += exchange_s
    return experts_s + exchange_s
