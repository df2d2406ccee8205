"""DeepSeek's expert load balancer, as vLLM runs it: replicate the heaviest, then pack evenly."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from servegym.baselines.heuristic import Heuristic
from servegym.baselines.interface import ExpertLoad, FloatArray, IntArray, Placement
from servegym.baselines.registry import register
from servegym.compilation import compiled
from servegym.configuration import Config

Count = Annotated[int, Field(ge=1)]


class Topology(Config):
    """Where the ranks are, and how the model groups its experts."""

    nodes: Count = Field(default=1, description="servers that the ranks are spread over")
    groups: Count = Field(default=1, description="expert groups of the model; hierarchical if a multiple of nodes")


@register("expert", "eplb", source="deepseek-ai/EPLB; vLLM 0.32, distributed/eplb/policy/default.py")
class Eplb(Heuristic):
    """Replicate the expert with the most load per replica until the slots are full; pack each to the lightest rank.

    Global, or hierarchical where ``groups % nodes == 0``: groups are packed to nodes, then experts inside their node.
    Experts that stay on their rank keep their slot. The same placement as vLLM's ``DefaultEplbPolicy``.
    """

    class Params(Topology):
        """Parameters."""

    params: Params

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the balanced placement, or None if it stands or nothing was routed."""
        return rebalanced(load.tokens, current, self.params)


@register("expert", "oracle", source="EPLB on the load to come; an upper bound")
class Oracle(Heuristic):
    """EPLB on the expected load of the coming interval, which only a simulator knows."""

    class Params(Topology):
        """Parameters."""

    needs_oracle = True
    params: Params

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the placement for the load to come, or None if it stands or is unknown."""
        return None if load.future is None else rebalanced(load.future, current, self.params)


def rebalanced(tokens: FloatArray, current: Placement, topology: Topology) -> Placement | None:
    """Return EPLB's placement for a load, or None if it stands or the load is 0."""
    if not tokens.any():
        return None
    slots = current.physical_to_logical
    wanted = eplb_placement(tokens, slots.shape[1], current.ranks, topology.nodes, topology.groups)
    wanted = keep_slots(wanted, current)
    return None if np.array_equal(wanted, slots) else Placement(wanted, current.ranks)


def eplb_placement(tokens: FloatArray, slots: int, ranks: int, nodes: int = 1, groups: int = 1) -> IntArray:
    """Return ``physical_to_logical``, shape (layers, slots).

    Args:
        tokens: load of each expert, shape (layers, experts).
        slots: physical experts, a multiple of ``ranks``.
        ranks: EP ranks.
        nodes: servers; ranks are numbered server by server.
        groups: expert groups of the model.
    """
    weight = np.ascontiguousarray(tokens, dtype=np.float32)  # as vLLM, so that ties fall the same way
    layers, experts = weight.shape
    if groups % nodes:
        groups = nodes = 1
    in_group = experts // groups
    by_group = weight.reshape(layers, groups, in_group).sum(axis=-1)
    pack, place = _packed(by_group, nodes)
    to_node = ((pack * (groups // nodes) + place)[..., None] * in_group + np.arange(in_group)).reshape(layers, experts)
    from_node = np.argsort(to_node, axis=1)
    by_node = np.take_along_axis(weight, from_node, axis=1).reshape(-1, experts // nodes)
    copies, counts = _replicated(by_node, slots // nodes)
    per_copy = np.take_along_axis(by_node / counts, copies, axis=1)
    pack, place = _packed(per_copy, ranks // nodes)
    order = np.argsort(pack * (slots // ranks) + place, axis=1)
    local = np.take_along_axis(copies, order, axis=1).reshape(layers, nodes, -1)
    local = local + (np.arange(nodes) * (experts // nodes))[None, :, None]
    return np.take_along_axis(from_node, local.reshape(layers, slots), axis=1)


def _packed(weight: Any, packs: int) -> tuple[IntArray, IntArray]:
    """Equal counts per pack, heaviest first to the lightest pack; pack and place of each item, shape as ``weight``."""
    if weight.shape[1] == packs:
        return np.tile(np.arange(packs, dtype=np.int64), (len(weight), 1)), np.zeros(weight.shape, dtype=np.int64)
    pack, place = np.empty(weight.shape, dtype=np.int64), np.empty(weight.shape, dtype=np.int64)
    _pack(weight.astype(np.float64), np.argsort(-weight, axis=-1), packs, pack, place)
    return pack, place


@compiled
def _pack(weight: FloatArray, order: IntArray, packs: int, pack: IntArray, place: IntArray) -> None:
    layers, items = weight.shape
    room = items // packs
    for layer in range(layers):
        loads = np.zeros(packs)
        counts = np.zeros(packs, dtype=np.int64)
        for i in range(items):
            item = order[layer, i]
            lightest = 0
            for p in range(1, packs):
                if loads[p] < loads[lightest]:
                    lightest = p
            pack[layer, item] = lightest
            place[layer, item] = counts[lightest]
            loads[lightest] += weight[layer, item]
            counts[lightest] += 1
            if counts[lightest] == room:
                loads[lightest] = np.inf


def _replicated(weight: Any, slots: int) -> tuple[IntArray, IntArray]:
    """Expert of each copy, shape (rows, slots), and copies of each expert, shape as ``weight``."""
    rows, experts = weight.shape
    copies = np.tile(np.arange(slots, dtype=np.int64), (rows, 1))
    counts = np.ones((rows, experts), dtype=np.int64)
    _replicate(weight.astype(np.float64), copies, counts)
    return copies, counts


@compiled
def _replicate(weight: FloatArray, copies: IntArray, counts: IntArray) -> None:
    rows, experts = weight.shape
    for row in range(rows):
        for slot in range(experts, copies.shape[1]):
            best = 0
            for e in range(1, experts):
                if weight[row, e] / counts[row, e] > weight[row, best] / counts[row, best]:
                    best = e
            copies[row, slot] = best
            counts[row, best] += 1


def keep_slots(wanted: IntArray, current: Placement) -> IntArray:
    """Reorder the slots of each rank so that experts that stay on it keep their slot; shape (layers, slots).

    As vLLM's ``preserve_intragpu_slots``: newcomers fill the slots that become free, in order.
    """
    kept = np.empty_like(wanted)
    _keep(wanted, current.physical_to_logical, wanted.shape[1] // current.ranks, kept)
    return kept


@compiled
def _keep(wanted: IntArray, current: IntArray, per_rank: int, kept: IntArray) -> None:
    layers, slots = wanted.shape
    for layer in range(layers):
        for start in range(0, slots, per_rank):
            used = np.zeros(per_rank, dtype=np.bool_)
            taken = np.zeros(per_rank, dtype=np.bool_)
            for slot in range(per_rank):
                for new in range(per_rank):
                    if not used[new] and wanted[layer, start + new] == current[layer, start + slot]:
                        kept[layer, start + slot] = wanted[layer, start + new]
                        used[new] = taken[slot] = True
                        break
            new = 0
            for slot in range(per_rank):
                if not taken[slot]:
                    while used[new]:
                        new += 1
                    kept[layer, start + slot] = wanted[layer, start + new]
                    used[new] = True
