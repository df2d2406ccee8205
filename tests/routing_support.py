"""Statistics of routing, as they are published for real models, and files of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from servegym.envs.simulator.experts.routing.bank import RoutingBank

Float = npt.NDArray[np.float64]


def loads(bank: RoutingBank) -> Float:
    """Return the experts chosen, summed over tokens, shape (layers, experts)."""
    per_task = np.bincount(bank.token_task(), minlength=len(bank.task_names))
    return np.asarray(np.tensordot(per_task.astype(np.float64), bank.popularity(), axes=1))


def max_over_mean(load: Float) -> Float:
    """Return the heaviest entry over the mean along the last axis.

    >>> float(max_over_mean(np.array([1.0, 3.0])))
    1.5
    """
    return np.asarray(load.max(axis=-1) / load.mean(axis=-1))


def gini(load: Float) -> Float:
    """Return the Gini coefficient along the last axis: 0 if all are equal, near 1 if one has everything.

    >>> float(gini(np.array([0.0, 0.0, 0.0, 4.0])))
    0.75
    """
    ordered = np.sort(load, axis=-1)
    count = load.shape[-1]
    place = 2 * np.arange(1, count + 1) - count - 1
    return np.asarray((ordered * place).sum(axis=-1) / (count * ordered.sum(axis=-1)))


def overlap(bank: RoutingBank, lag: int) -> float:
    """Return the share of a token's experts that the token ``lag`` places before in its sequence chose too."""
    sequence = np.repeat(np.arange(len(bank.task)), np.diff(bank.sequence_start))
    same = np.flatnonzero(sequence[lag:] == sequence[:-lag])
    now, before = bank.expert_ids[same + lag], bank.expert_ids[same]
    shared = (now[:, :, :, None] == before[:, :, None, :]).any(axis=3)
    return float(shared.mean())


def layer_dependence(bank: RoutingBank, distance: int) -> float:
    """Return the normalised mutual information of first experts that many layers apart, mean over layer pairs.

    ``I / sqrt(H H')``, corrected by that of the same experts in shuffled order, which is not 0 for a finite sample.
    """
    rng = np.random.default_rng(0)
    first = bank.expert_ids[:, :, 0].astype(np.int64)
    found = []
    for layer in range(bank.layers - distance):
        a, b = first[:, layer], first[:, layer + distance]
        noise = _mutual_information(a, rng.permutation(b), bank.experts)
        found.append(max(_mutual_information(a, b, bank.experts) - noise, 0.0) / np.sqrt(_entropy(a) * _entropy(b)))
    return float(np.mean(found))


def _entropy(values: npt.NDArray[np.int64]) -> float:
    p = np.bincount(values) / len(values)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _mutual_information(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], experts: int) -> float:
    joint = a * experts + b
    return _entropy(a) + _entropy(b) - _entropy(np.unique(joint, return_inverse=True)[1])


def rank_imbalance(bank: RoutingBank, ranks: int, batch: int, draws: int = 50, seed: int = 0) -> float:
    """Return the heaviest rank over the mean with linear placement, for batches of random tokens; mean over layers."""
    rng = np.random.default_rng((seed, ranks, batch))
    rank = bank.expert_ids.astype(np.int64) * ranks // bank.experts
    ratios = []
    for _ in range(draws):
        chosen = rank[rng.integers(0, bank.tokens, batch)].reshape(batch, bank.layers, -1)
        cell = np.arange(bank.layers)[None, :, None] * ranks + chosen
        counts = np.bincount(cell.ravel(), minlength=bank.layers * ranks).reshape(bank.layers, ranks)
        ratios.append(max_over_mean(counts.astype(np.float64)).mean())
    return float(np.mean(ratios))


def active_share(bank: RoutingBank, batch: int, draws: int = 50, seed: int = 0) -> float:
    """Return the share of a layer's experts that a batch of tokens of different sequences activates."""
    rng = np.random.default_rng((seed, batch))
    lengths = np.diff(bank.sequence_start)
    shares = []
    for _ in range(draws):
        sequences = (
            rng.permutation(len(lengths))[:batch] if batch <= len(lengths) else rng.integers(0, len(lengths), batch)
        )
        tokens = bank.sequence_start[sequences] + (rng.random(batch) * lengths[sequences]).astype(np.int64)
        cell = np.arange(bank.layers)[None, :, None] * bank.experts + bank.expert_ids[tokens]
        shares.append(len(np.unique(cell)) / (bank.layers * bank.experts))
    return float(np.mean(shares))


def task_precision(bank: RoutingBank) -> float:
    """Return the precision of the Dirichlet distribution around the mean load that tasks' loads are drawn from.

    By moments: ``sum p (1 - p) / sum var(p) - 1``, mean over layers; the lower, the more tasks differ.
    """
    shares = bank.popularity() / bank.top_k  # (tasks, layers, experts)
    mean, variance = shares.mean(axis=0), shares.var(axis=0, ddof=1)
    return float(np.mean((mean * (1.0 - mean)).sum(axis=1) / variance.sum(axis=1) - 1.0))


def save_routing(path: Path, bank: RoutingBank) -> None:
    """Write a bank."""
    small = np.uint8 if bank.experts <= 256 else np.uint16
    np.savez_compressed(
        path,
        expert_ids=bank.expert_ids.astype(small),
        sequence_start=bank.sequence_start,
        task=bank.task,
        task_names=np.array(bank.task_names),
        experts=np.array(bank.experts),
    )
