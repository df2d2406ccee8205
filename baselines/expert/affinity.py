"""Rules that keep experts together whose tokens travel together, or with the rank that their tokens come from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from servegym.baselines.expert.assignment import assign_layer, assigned, settled, to_slots
from servegym.baselines.expert.eplb import eplb_placement
from servegym.baselines.expert.loads import crossing_share, held, replica_counts, slot_loads
from servegym.baselines.heuristic import Heuristic
from servegym.baselines.interface import ExpertLoad, FloatArray, IntArray, Placement
from servegym.baselines.registry import register
from servegym.configuration import Config
from servegym.errors import InputError

NonNegative = Annotated[float, Field(ge=0)]


def copies_of(tokens: FloatArray, current: Placement) -> tuple[IntArray, FloatArray]:
    """Return EPLB's choice of copies and the tokens of each, both of shape (layers, slots)."""
    slots = np.sort(eplb_placement(tokens, current.physical_to_logical.shape[1], current.ranks), axis=1)
    return slots, slot_loads(tokens, slots)


def _shares(pairs: FloatArray) -> FloatArray:
    """Joint counts as shares of each successor's tokens, shape as ``pairs``."""
    return np.asarray(pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1e-300))


@register("expert", "edr", source="arXiv 2602.21626 (EDR); formula reconstructed")
class Edr(Heuristic):
    """The paper's expert dynamic replacement: even loads, and successors on their predecessors' rank.

    Layer by layer, experts in falling load, each to the free rank with the lowest
    ``lambda_b * growth of (load_r / mean)^2 - lambda_a * share of the expert's tokens that come from experts on r``,
    then pairwise exchange. The affinity is fixed: from a file, or from the first window. The paper names both goals and
    an offline affinity, and prints no formula; weights are ours.
    """

    class Params(Config):
        """Parameters."""

        lambda_b: NonNegative = Field(default=1.0, description="weight of balance")
        lambda_a: NonNegative = Field(default=0.01, description="weight of affinity")
        affinity: Path | None = Field(
            default=None, description=".npz with coactivation (layers - 1, experts, experts); default: the first window"
        )

    needs_coactivation: ClassVar[bool] = True
    params: Params

    def __init__(self, params: Params | None = None) -> None:
        super().__init__(params)
        self._affinity: FloatArray | None = None
        if self.params.affinity is not None:
            self._affinity = _shares(_read_affinity(self.params.affinity))

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the placement, or None if it stands or nothing was routed."""
        if not load.tokens.any():
            return None
        if self._affinity is None and load.coactivation is not None:
            self._affinity = _shares(load.coactivation)
        expert, loads = copies_of(load.tokens, current)
        wanted = np.empty_like(expert)
        experts, ranks = load.tokens.shape[1], current.ranks
        before: FloatArray | None = None
        for layer in range(len(expert)):
            cost = np.zeros((experts, ranks))
            if layer and self._affinity is not None and before is not None:
                cost = -self.params.lambda_a * (self._affinity[layer - 1].T @ before)
            rank_of = assign_layer(expert[layer], loads[layer], cost, self.params.lambda_b, 4)
            wanted[layer] = to_slots(expert[layer], rank_of, ranks)
            before = held(Placement(wanted[layer : layer + 1], ranks), experts)[0]
        return settled(wanted, current)


def _read_affinity(path: Path) -> FloatArray:
    try:
        with np.load(path, allow_pickle=False) as file:
            return np.asarray(file["coactivation"], dtype=np.float64)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(str(path), "coactivation", f"cannot be read: {error}; allowed: an .npz file") from None


@register("expert", "source_aware", source="arXiv 2606.15177; cost definitions and weights are ours")
class SourceAware(Heuristic):
    """The follow-up's placement: even loads, experts near the ranks that their tokens come from, few moves.

    Lowest ``alpha * sum_r (load_r / mean)^2 / ranks + beta * remote share of (token, expert) pairs + gamma * share of
    slots that move`` per layer, by greedy assignment in falling load and pairwise exchange. The paper names the three
    costs and prints neither their definitions nor the weights.
    """

    class Params(Config):
        """Parameters."""

        alpha: NonNegative = Field(default=1.0, description="weight of balance")
        beta: NonNegative = Field(default=0.3, description="weight of communication")
        gamma: NonNegative = Field(default=0.02, description="weight of migration")

    needs_sources: ClassVar[bool] = True
    params: Params

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the placement, or None if it stands or nothing was routed."""
        if not load.tokens.any():
            return None
        expert, loads = copies_of(load.tokens, current)
        slots = expert.shape[1]
        total = np.maximum(load.tokens.sum(axis=1), 1e-300)[:, None, None]
        copies = replica_counts(expert, load.tokens.shape[1])[:, :, None]
        costs = np.where(held(current, load.tokens.shape[1]) > 0, 0.0, self.params.gamma / slots)
        if load.by_source is not None:
            local = load.by_source.swapaxes(1, 2) / copies  # tokens of each expert that a rank would serve itself
            costs = costs - self.params.beta * local / total
        return assigned(expert, loads, costs, self.params.alpha, current)


@register("expert", "exflow", source="ExFlow, arXiv 2401.08383; by coordinate descent in place of an ILP solver")
class ExFlow(Heuristic):
    """Affinity alone: fewest tokens that change the rank between layers, with equal experts per rank.

    ExFlow solves an integer program with a time limit. Here one layer after the other is assigned anew to the layers
    beside it, forward and back, by greedy and pairwise exchange, until nothing improves or the time is up; the better
    of that and the current placement stands. The load is ignored.
    """

    class Params(Config):
        """Parameters."""

        limit_s: Annotated[float, Field(gt=0)] = Field(default=0.5, description="time to search, seconds")
        sweeps: Annotated[int, Field(ge=1)] = Field(default=6, description="passes over the layers at most")

    needs_coactivation: ClassVar[bool] = True
    params: Params

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the placement, or None if none with fewer crossings was found."""
        pairs = load.coactivation
        if pairs is None or not pairs.any():
            return None
        return _fewest_crossings(pairs, load.tokens, current, 0.0, self.params.sweeps, self.params.limit_s)


@register("expert", "grace", source="GRACE-MoE, arXiv 2509.25041; grouping in equal sizes")
class Grace(Heuristic):
    """Affinity with balance: experts grouped by co-activation, heavy ones replicated, loads kept even.

    GRACE groups by spectral clustering within sizes of 15 % around equal and replicates the heaviest group's experts to
    the lightest ranks. Slots are equal per rank in vLLM, so groups are of equal size here; they come from the descent
    of ``exflow`` with ``balance`` on the loads' squares, and redundant slots copy the heaviest experts.
    """

    class Params(Config):
        """Parameters."""

        balance: NonNegative = Field(default=0.5, description="weight of balance against the share of crossings")
        limit_s: Annotated[float, Field(gt=0)] = Field(default=0.5, description="time to search, seconds")

    needs_coactivation: ClassVar[bool] = True
    params: Params

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the placement, or None if it stands or nothing was routed."""
        pairs = load.coactivation
        if pairs is None or not pairs.any():
            return None
        return _fewest_crossings(pairs, load.tokens, current, self.params.balance, 4, self.params.limit_s)


def _fewest_crossings(
    pairs: FloatArray, tokens: FloatArray, current: Placement, balance: float, sweeps: int, limit_s: float
) -> Placement | None:
    """Descend from the current placement, layer by layer, forward and back."""
    end = time.monotonic() + limit_s
    joint = pairs / np.maximum(pairs.sum(axis=(1, 2), keepdims=True), 1e-300)
    layers, experts = tokens.shape
    ranks = current.ranks
    expert, loads = copies_of(tokens, current)
    best = np.stack([to_slots(expert[n], _start(expert[n], current, n), ranks) for n in range(layers)])
    shares = held(Placement(best, ranks), experts)
    for sweep in range(sweeps):
        changed = False
        order = range(layers) if sweep % 2 == 0 else range(layers - 1, -1, -1)
        for layer in order:
            cost = np.zeros((experts, ranks))
            if layer:
                cost -= joint[layer - 1].T @ shares[layer - 1]
            if layer + 1 < layers:
                cost -= joint[layer] @ shares[layer + 1]
            cost /= replica_counts(best[layer : layer + 1], experts)[0][:, None]
            rank_of = assign_layer(expert[layer], loads[layer], cost, balance, 3)
            slots_now = to_slots(expert[layer], rank_of, ranks)
            if not np.array_equal(np.sort(slots_now.reshape(ranks, -1)), np.sort(best[layer].reshape(ranks, -1))):
                changed = True
                best[layer] = slots_now
                shares[layer] = held(Placement(best[layer : layer + 1], ranks), experts)[0]
            if time.monotonic() > end:
                break
        if not changed or time.monotonic() > end:
            break
    plan = Placement(best, ranks)
    if balance == 0.0 and crossing_share(pairs, plan).mean() >= crossing_share(pairs, current).mean():
        return None
    return settled(best, current)


def _start(expert: IntArray, current: Placement, layer: int) -> IntArray:
    """The rank of each copy now, as far as there is room; the others fill up."""
    row, ranks = current.physical_to_logical[layer], current.ranks
    room = len(row) // ranks
    rank_of = np.full(len(expert), -1, dtype=np.int64)
    left = np.full(ranks, room)
    open_slots = list(range(len(row)))
    for i, e in enumerate(expert):
        for slot in open_slots:
            if row[slot] == e:
                rank_of[i] = slot // room
                left[slot // room] -= 1
                open_slots.remove(slot)
                break
    for i in np.flatnonzero(rank_of < 0).tolist():
        rank = int(left.argmax())
        rank_of[i] = rank
        left[rank] -= 1
    return rank_of


@register("expert", "moetuner", source="MoETuner, arXiv 2502.06643; both steps by search in place of ILP")
class MoETuner(Heuristic):
    """Two steps: experts of a layer in clusters of equal load, then clusters to ranks with little traffic.

    The clusters are EPLB's ranks; layer by layer they are dealt to the ranks that their tokens come from, by pairwise
    exchange. The balance of the first step is kept whole.
    """

    needs_coactivation: ClassVar[bool] = True

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the placement, or None if it stands or nothing was routed."""
        pairs = load.coactivation
        if pairs is None or not load.tokens.any():
            return None
        slots, ranks, experts = current.physical_to_logical.shape[1], current.ranks, load.tokens.shape[1]
        clusters = eplb_placement(load.tokens, slots, ranks)
        for layer in range(1, len(clusters)):
            before = held(Placement(clusters[layer - 1 : layer], ranks), experts)[0]
            after = held(Placement(clusters[layer : layer + 1], ranks), experts)[0]
            kept = np.ascontiguousarray(before.T @ pairs[layer - 1] @ after)  # tokens from rank to cluster
            rank_of = assign_layer(np.arange(ranks), np.zeros(ranks), -kept.T, 0.0, 20)
            clusters[layer] = clusters[layer].reshape(ranks, -1)[np.argsort(rank_of)].ravel()
        return settled(clusters, current)
