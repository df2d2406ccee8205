"""What a placement makes of a load: rank loads, balance, traffic, and the experts that a change moves."""

from __future__ import annotations

import numpy as np

from servegym.baselines.interface import FloatArray, IntArray, Placement
from servegym.errors import InputError


def check_placement(placement: Placement, experts: int) -> None:
    """Make sure that a placement is one.

    Raises:
        InputError: another type or shape, slots that are not a multiple of ranks, an expert that does not exist, or a
            layer without one of its experts.
    """
    slots = placement.physical_to_logical
    if not isinstance(slots, np.ndarray) or slots.ndim != 2 or slots.dtype.kind not in "iu":
        found = f"{slots.dtype} of shape {slots.shape}" if isinstance(slots, np.ndarray) else type(slots).__name__
        raise InputError("placement", "physical_to_logical", f"got {found}; allowed: whole numbers (layers, slots)")
    if placement.ranks < 1 or slots.shape[1] % placement.ranks:
        raise InputError(
            "placement", "", f"{slots.shape[1]} slots on {placement.ranks} ranks; allowed: slots a multiple of ranks"
        )
    if ((slots < 0) | (slots >= experts)).any():
        layer, slot = np.argwhere((slots < 0) | (slots >= experts))[0]
        raise InputError(
            "placement",
            "",
            f"layer {layer}, slot {slot}: got expert {slots[layer, slot]}; allowed: 0 to {experts - 1}",
        )
    lost = replica_counts(slots, experts) == 0
    if lost.any():
        layer, expert = np.argwhere(lost)[0]
        raise InputError("placement", "", f"layer {layer} has no slot for expert {expert}; allowed: every expert once")


def replica_counts(physical_to_logical: IntArray, experts: int) -> IntArray:
    """Return how many slots hold each expert, shape (layers, experts)."""
    layers = len(physical_to_logical)
    cell = np.arange(layers)[:, None] * experts + physical_to_logical
    return np.bincount(cell.ravel(), minlength=layers * experts).reshape(layers, experts)


def slot_loads(tokens: FloatArray, physical_to_logical: IntArray) -> FloatArray:
    """Return the tokens of each slot, shape (layers, slots); replicas share an expert's tokens equally, as in vLLM."""
    per_replica = tokens / np.maximum(replica_counts(physical_to_logical, tokens.shape[1]), 1)
    return np.take_along_axis(per_replica, physical_to_logical, axis=1)


def rank_loads(tokens: FloatArray, placement: Placement) -> FloatArray:
    """Return the tokens of each rank, shape (layers, ranks).

    >>> rank_loads(np.array([[6.0, 1.0, 1.0]]), Placement(np.array([[0, 1, 0, 2]]), ranks=2))
    array([[4., 4.]])
    """
    loads = slot_loads(tokens, placement.physical_to_logical)
    return np.asarray(loads.reshape(len(loads), placement.ranks, -1).sum(axis=2))


def balancedness(loads: FloatArray) -> FloatArray:
    """Return mean over heaviest rank of each layer, shape (layers,): 1 is perfect, as vLLM reports it."""
    heaviest = loads.max(axis=1)
    return np.asarray(np.where(heaviest > 0, loads.mean(axis=1) / np.maximum(heaviest, 1e-300), 1.0))


def held(placement: Placement, experts: int) -> FloatArray:
    """Return the share of each expert's tokens that each rank gets, shape (layers, experts, ranks)."""
    slots = placement.physical_to_logical
    layers, count = slots.shape
    rank = np.arange(count) // (count // placement.ranks)
    shares = np.zeros((layers, experts, placement.ranks))
    np.add.at(shares, (np.arange(layers)[:, None], slots, rank[None, :]), 1.0)
    return np.asarray(shares / np.maximum(shares.sum(axis=2, keepdims=True), 1.0))


def moved_experts(current: Placement, wanted: Placement) -> IntArray:
    """Return how many experts each rank must receive, those that it does not hold yet, shape (layers, ranks)."""
    experts = int(max(current.physical_to_logical.max(), wanted.physical_to_logical.max())) + 1
    new = (held(wanted, experts) > 0) & ~(held(current, experts) > 0)
    return np.asarray(new.sum(axis=1), dtype=np.int64)


def remote_share(by_source: FloatArray, placement: Placement) -> FloatArray:
    """Return the share of a layer's (token, expert) pairs whose expert is not on the token's rank, shape (layers,)."""
    local = np.einsum("lre,ler->l", by_source, held(placement, by_source.shape[2]))
    return np.asarray(1.0 - local / np.maximum(by_source.sum(axis=(1, 2)), 1e-300))


def crossing_share(coactivation: FloatArray, placement: Placement) -> FloatArray:
    """Return the share of transitions to the next layer that change the rank, shape (layers - 1,)."""
    shares = held(placement, coactivation.shape[1])
    kept = np.einsum("lij,lir,ljr->l", coactivation, shares[:-1], shares[1:], optimize=True)
    return np.asarray(1.0 - kept / np.maximum(coactivation.sum(axis=(1, 2)), 1e-300))
