"""Balancing rules beside EPLB: FlashLB's history, and METRO's activated experts."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from servegym.baselines.expert.assignment import assigned, relabelled, settled
from servegym.baselines.expert.loads import balancedness, rank_loads
from servegym.baselines.heuristic import Heuristic
from servegym.baselines.interface import ExpertLoad, FloatArray, IntArray, Placement
from servegym.baselines.registry import register
from servegym.compilation import compiled
from servegym.configuration import Config


@register("expert", "flashlb", source="vllm-ascend FlashLB, vllm/distributed/eplb/policy/flashlb.py of a branch")
class FlashLb(Heuristic):
    """Balance a history of loads; re-plan only layers whose balance has worsened.

    Windows are weighted by ``decay ** age``. Each redundant slot goes to the expert with the highest load per copy,
    summed over the history; copies go, heaviest first, to the rank on which the history's loads stay most even, two
    copies of an expert never to one rank. A layer is planned anew when its heaviest rank over the mean exceeds that at
    its last plan by ``worse_ratio``; ranks are renamed so that few experts move.
    """

    class Params(Config):
        """Parameters."""

        stages: Annotated[int, Field(ge=1, le=32)] = Field(default=8, description="windows of load that are remembered")
        decay: Annotated[float, Field(gt=0, le=1)] = Field(default=0.7, description="weight of a window per age; ours")
        worse_ratio: Annotated[float, Field(ge=1)] = Field(default=1.15, description="imbalance over that when planned")

    params: Params

    def __init__(self, params: Params | None = None) -> None:
        super().__init__(params)
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Forget the history."""
        self._history: list[FloatArray] = []
        self._planned: FloatArray | None = None

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the plan, or None while all layers are as even as planned."""
        if not load.tokens.any():
            return None
        self._history = [load.tokens, *self._history[: self.params.stages - 1]]
        imbalance = 1.0 / balancedness(rank_loads(load.tokens, current))
        if self._planned is None:
            self._planned = np.ones(len(imbalance))
        stale = np.flatnonzero(imbalance > self.params.worse_ratio * self._planned)
        if len(stale) == 0:
            return None
        weight = self.params.decay ** np.arange(len(self._history))
        history = np.stack(self._history) * weight[:, None, None]
        wanted = current.physical_to_logical.copy()
        for layer in stale:
            wanted[layer] = _flash_layer(np.ascontiguousarray(history[:, layer]), wanted.shape[1], current.ranks)
        wanted[stale] = relabelled(wanted[stale], Placement(current.physical_to_logical[stale], current.ranks))
        plan = Placement(wanted, current.ranks)
        self._planned[stale] = 1.0 / balancedness(rank_loads(load.tokens, plan))[stale]
        return settled(wanted, current)


@compiled
def _flash_layer(history: FloatArray, slots: int, ranks: int) -> IntArray:
    """Slots of one layer from weighted loads, shape (stages, experts)."""
    stages, experts = history.shape
    copies = np.ones(experts, dtype=np.int64)
    for _ in range(slots - experts):
        best, most = 0, -1.0
        for e in range(experts):
            per_copy_now = history[:, e].sum() / copies[e]
            if copies[e] < ranks and per_copy_now > most:
                best, most = e, per_copy_now
        copies[best] += 1
    room = slots // ranks
    placed = np.full(slots, -1, dtype=np.int64)
    counts = np.zeros(ranks, dtype=np.int64)
    loads = np.zeros((ranks, stages))
    on = np.zeros((experts, ranks), dtype=np.int64)
    per_copy = np.empty(experts)
    for e in range(experts):
        per_copy[e] = history[:, e].sum() / copies[e]
    for e in np.argsort(-per_copy, kind="mergesort"):
        for _ in range(copies[e]):
            best, lowest = -1, np.inf
            for r in range(ranks):
                if counts[r] == room:
                    continue
                price = 1e18 * on[e, r]
                for t in range(stages):
                    price += (loads[r, t] + history[t, e] / copies[e]) ** 2 - loads[r, t] ** 2
                if price < lowest:
                    best, lowest = r, price
            placed[best * room + counts[best]] = e
            counts[best] += 1
            on[e, best] += 1
            for t in range(stages):
                loads[best, t] += history[t, e] / copies[e]
    return placed


@register("expert", "metro", source="METRO, arXiv 2512.09277 (objective)")
class Metro(Heuristic):
    """Balance activated experts per rank, not tokens: what decode, bound by memory, waits for.

    An expert is activated in a step with probability ``1 - exp(-tokens / steps)``, each of ``n`` copies with
    ``1 - exp(-tokens / steps / n)``: a copy costs another read of the weights. Redundant slots therefore copy the
    experts whose copies add the fewest activations.
    """

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the placement, or None if it stands or nothing was routed."""
        if not load.tokens.any() or load.steps == 0:
            return None
        layers, slots = current.physical_to_logical.shape
        experts = load.tokens.shape[1]
        rate = load.tokens / load.steps
        copies = np.ones((layers, experts), dtype=np.int64)
        row = np.arange(layers)
        for _ in range(slots - experts):
            added = (copies + 1) * -np.expm1(-rate / (copies + 1)) - copies * -np.expm1(-rate / copies)
            copies[row, np.where(copies < current.ranks, added, np.inf).argmin(axis=1)] += 1
        expert = np.stack([np.repeat(np.arange(experts), count) for count in copies])
        activation = np.take_along_axis(-np.expm1(-rate / copies), expert, axis=1)
        costs = np.zeros((layers, experts, current.ranks))
        return assigned(expert, activation, costs, 1.0, current)
