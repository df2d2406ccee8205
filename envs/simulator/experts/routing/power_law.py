"""Routing whose loads follow a power law: the presets that public MoE kernel benchmarks use.

NVIDIA's aiconfigurator times MoE kernels with balanced loads and with loads that fall as ``rank ** -exponent``, for
exponents 1.01 and 1.2. Only the loads mean something here: tokens are independent of each other and of the layer
before.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from servegym.envs.simulator.experts.routing.bank import RoutingBank


def power_law_bank(
    layers: int, experts: int, top_k: int, *, exponent: float, tasks: int, similarity: float, tokens: int, seed: int
) -> RoutingBank:
    """Draw a bank.

    Args:
        layers: MoE layers of the model.
        experts: experts per layer.
        top_k: experts that a token chooses.
        exponent: of the power law; 0 makes all experts equally likely.
        tasks: number of tasks, equally many tokens each.
        similarity: correlation of the log popularities of two tasks, 0 to 1.
        tokens: about how many.
        seed: the draw.
    """
    rng = np.random.default_rng((seed, 0x90A))
    per_task = max(tokens // tasks, 1)
    log_rank = -exponent * np.log(np.arange(1, experts + 1))
    ids = np.empty((tasks * per_task, layers, top_k), dtype=np.uint16)
    for layer in range(layers):
        common = rng.normal(size=experts)
        for task in range(tasks):
            own = np.sqrt(similarity) * common + np.sqrt(1.0 - similarity) * rng.normal(size=experts)
            logits = np.empty(experts)
            logits[np.argsort(-own)] = log_rank
            ids[task * per_task : (task + 1) * per_task, layer] = _draw(logits, per_task, top_k, rng)
    names = tuple(f"task-{task}" for task in range(tasks))
    length = min(64, per_task)
    start = np.concatenate([np.arange(0, per_task, length) + task * per_task for task in range(tasks)])
    task_of = (start // per_task).astype(np.int32)
    return RoutingBank(ids, np.append(start, len(ids)).astype(np.int64), task_of, names, experts)


def _draw(logits: npt.NDArray[np.float64], count: int, top_k: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw sets of distinct experts, one after the other in proportion to ``exp(logits)`` (Gumbel top-k)."""
    noisy = logits + rng.gumbel(size=(count, len(logits)))
    return np.argsort(-noisy, axis=1)[:, :top_k]
