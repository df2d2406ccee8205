"""Experts that are chosen together on one rank, the ranks even for the load to come, and few moves."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from servegym.baselines.expert.affinity import copies_of
from servegym.baselines.expert.assignment import settled
from servegym.baselines.expert.loads import held, replica_counts
from servegym.baselines.expert.repair import exchange, layer_cost, start_from, within_layers
from servegym.baselines.heuristic import Heuristic
from servegym.baselines.interface import ExpertLoad, FloatArray, Placement
from servegym.baselines.registry import register
from servegym.configuration import Config

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]

_SWEEPS = 8


@register(
    "expert",
    "collocate",
    source="ours; grouping by co-activation: GRACE-MoE, arXiv 2509.25041, ExFlow, arXiv 2401.08383",
)
class Collocate(Heuristic):
    """Repair the placement layer by layer, by exchange of pairs of experts; re-place a layer only where that pays.

    The objective of a layer is that of :mod:`servegym.baselines.expert.repair`. The loads are a forecast, ``average +
    trend * (window - average)``, with a moving average over windows: a trend below 1 smooths, one above 1 looks ahead.
    A layer is placed anew if its objective falls by more than ``gate``. Without reports of pairs only balance counts.
    """

    class Params(Config):
        """Parameters; all are ours."""

        half_life: Positive = Field(default=2.0, description="windows after which a load weighs half in the average")
        trend: NonNegative = Field(default=1.0, description="the newest window against the average in the forecast")
        activation: NonNegative = Field(
            default=0.05, description="share of activated experts, against tokens, in what is balanced; 1 at most"
        )
        together: NonNegative = Field(default=0.5, description="weight of experts chosen together on one rank")
        pairs_half_life: Positive = Field(default=8.0, description="windows after which a pair weighs half")
        local: NonNegative = Field(default=0.1, description="weight of experts on the rank that their tokens come from")
        move: NonNegative = Field(default=0.02, description="weight of the share of slots that receive an expert")
        gate: NonNegative = Field(default=0.005, description="by how much a layer's objective must fall")

    needs_sources: ClassVar[bool] = True
    needs_coactivation: ClassVar[bool] = True
    params: Params

    def __init__(self, params: Params | None = None) -> None:
        super().__init__(params)
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Forget the loads."""
        self._average: FloatArray | None = None
        self._before: FloatArray | None = None
        self._pairs: FloatArray | None = None

    def settings(self, load: ExpertLoad, before: FloatArray | None, current: Placement) -> dict[str, float]:
        """Return the parameters for one placement, by name.

        Args:
            load: the window.
            before: tokens of the window before, None for the first.
            current: the placement in force.
        """
        return self.params.model_dump()

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the repaired placement, or None if it stands or nothing was routed."""
        if not load.tokens.any():
            return None
        use = self.settings(load, self._before, current)
        self._before = load.tokens
        forecast = self._forecast(load, use)
        excess = self._excess(load, use)
        now, ranks = current.physical_to_logical, current.ranks
        experts = forecast.shape[1]
        copies = now if now.shape[1] == experts else copies_of(forecast, current)[0]
        loads = forecast / replica_counts(copies, experts)
        loads_now = forecast / replica_counts(now, experts)
        costs = self._costs(load, current, use)
        wanted = now.copy()
        for layer in range(len(now)):
            slots = start_from(copies[layer], now[layer], now.shape[1] // ranks)
            exchange(slots, loads[layer], costs[layer], excess[layer], use["together"], _SWEEPS)
            after = layer_cost(slots, loads[layer], costs[layer], excess[layer], use["together"])
            before = layer_cost(now[layer], loads_now[layer], costs[layer], excess[layer], use["together"])
            if before - after > max(use["gate"], 1e-9):
                wanted[layer] = slots
        return settled(wanted, current)

    def _forecast(self, load: ExpertLoad, use: dict[str, float]) -> FloatArray:
        """Expected share of each expert in what its layer waits for, shape (layers, experts)."""
        window = _shares(load.tokens)
        kept = 0.5 ** (1.0 / use["half_life"])
        self._average = window if self._average is None else kept * self._average + (1.0 - kept) * window
        shares = np.maximum(self._average + use["trend"] * (window - self._average), 0.0)
        weight = min(use["activation"], 1.0)
        rate = load.tokens.sum(axis=1, keepdims=True) / max(load.steps, 1) * shares
        return np.asarray((1.0 - weight) * shares + weight * _shares(-np.expm1(-rate)))

    def _excess(self, load: ExpertLoad, use: dict[str, float]) -> FloatArray:
        if load.coactivation is not None and load.coactivation.any():
            kept = 0.5 ** (1.0 / use["pairs_half_life"])
            self._pairs = load.coactivation if self._pairs is None else kept * self._pairs + load.coactivation
        layers, experts = load.tokens.shape
        return np.zeros((layers, experts, experts)) if self._pairs is None else within_layers(self._pairs)

    @staticmethod
    def _costs(load: ExpertLoad, current: Placement, use: dict[str, float]) -> FloatArray:
        """Cost of each expert on each rank, shape (layers, experts, ranks)."""
        stays = held(current, load.tokens.shape[1]) > 0
        costs = np.where(stays, 0.0, use["move"] / current.physical_to_logical.shape[1])
        if load.by_source is not None:
            total = np.maximum(load.tokens.sum(axis=1), 1e-300)[:, None, None]
            costs = costs - use["local"] * load.by_source.swapaxes(1, 2) / total
        return np.ascontiguousarray(costs)


def _shares(amounts: FloatArray) -> FloatArray:
    return np.asarray(amounts / np.maximum(amounts.sum(axis=1, keepdims=True), 1e-300))
