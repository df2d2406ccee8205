"""One expert-parallel group: its memory in the kernel, its placement, and the load that an expert policy sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.baselines.expert.loads import moved_experts, rank_loads
from servegym.baselines.expert.static import linear_placement
from servegym.baselines.interface import ExpertLoad, FloatArray, IntArray, Placement
from servegym.envs.profiles.profile import ExpertShape
from servegym.envs.simulator.experts.config import ExpertsConfig
from servegym.envs.simulator.experts.costs import ExpertCosts
from servegym.envs.simulator.experts.routing.bank import RoutingBank
from servegym.envs.simulator.kernel.experts.excess import tabulate_layers
from servegym.envs.simulator.kernel.experts.placement import count_pairs, measure_placement
from servegym.envs.simulator.kernel.state import BATCH_SIZES, EXPERTS, WINDOW_BUCKETS

# Tokens of each task from which loads and traffic of a placement are measured.
_MEASURED_TOKENS = 512
_PLACEMENT_MEASURES = ("share", "second", "arrive", "leave", "combine_arrive", "combine_leave")
"""What ``measure_placement`` gives, in its order."""


class ExpertGroup:
    """The experts of one EP group.

    Attributes:
        record: the EXPERTS record, shape (1,), a view of the cluster's table of groups.
        placement: which slot holds which expert now, a re-placement under way included as far as it got.
    """

    def __init__(
        self,
        groups: npt.NDArray[Any],
        index: int,
        config: ExpertsConfig,
        shape: ExpertShape,
        costs: ExpertCosts,
        bank: RoutingBank,
        *,
        ranks: int,
        engines: int,
        first_engine: int,
        mix: FloatArray,
        seed: int,
    ) -> None:
        self.config = config
        self.shape = shape
        self.bank = bank
        self.record = groups[index : index + 1]
        self.ranks = ranks
        self._groups, self._index = groups, index
        self._rng = np.random.default_rng((seed, index, 0xE0E))
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        self._popularity = bank.popularity()
        tasks, layers, experts = self._popularity.shape
        slots = experts + config.redundant_experts
        self.placement = Placement(linear_placement(layers, experts, slots), ranks)
        token_task = bank.token_task()
        self._tokens = [
            self._rng.permutation(np.flatnonzero(token_task == task))[:_MEASURED_TOKENS] for task in range(tasks)
        ]
        fields = {
            "layers": layers,
            "experts": experts,
            "slots": slots,
            "ranks": ranks,
            "top_k": bank.top_k,
            "tasks": tasks,
            "engines": engines,
            "first_engine": first_engine,
            "ranks_per_engine": ranks // engines,
            "bank_tokens": bank.tokens,
        }
        for name, value in (fields | _config_fields(config) | _cost_fields(costs)).items():
            self.record[name] = value
        for name, (size, dtype) in _array_shapes(self.record[0]).items():
            self._hold(name, np.zeros(size, dtype=dtype))
        self._hold("popularity", self._popularity)
        self._hold("mix", np.array(mix, dtype=np.float64))
        self._hold("table_mix", np.array(mix, dtype=np.float64))
        self._hold("bank", np.ascontiguousarray(bank.expert_ids))
        self._hold("compute", costs.compute_s)
        self._hold("exchange", costs.exchange_s)
        self.set_layers(np.arange(layers), self.placement.physical_to_logical)

    def _hold(self, name: str, array: npt.NDArray[Any]) -> None:
        """Keep an array alive and tell the kernel where it is."""
        self._arrays[name] = array
        self.record[f"{name}_at"] = array.ctypes.data

    # ------------------------------------------------------------------------------------------------ placement
    def set_layers(self, layers: IntArray, physical_to_logical: IntArray) -> None:
        """Put the placement of some layers into force.

        Args:
            layers: which, shape (m,).
            physical_to_logical: their placement, shape (m, slots).
        """
        wanted = self.placement.physical_to_logical.copy()
        wanted[layers] = physical_to_logical
        self.placement = Placement(wanted, self.ranks)
        arrays, per_rank = self._arrays, wanted.shape[1] // self.ranks
        slots, replicas = arrays["expert_slots"], arrays["replicas"]
        arrays["slot_expert"][layers] = physical_to_logical
        for layer, row in zip(layers, physical_to_logical, strict=True):
            replicas[layer] = np.bincount(row, minlength=replicas.shape[1])
            order = np.argsort(row, kind="stable")
            place = np.arange(len(row)) - np.searchsorted(row[order], row[order])
            slots[layer, row[order], place] = order
        returning = bool(self.record["returning"][0])
        for task, tokens in enumerate(self._tokens):
            out = np.zeros((len(layers), self.ranks, len(_PLACEMENT_MEASURES)))
            measure_placement(
                arrays["bank"],
                tokens,
                slots,
                replicas,
                self.ranks,
                per_rank,
                returning,
                layers,
                out,
            )
            for i, name in enumerate(_PLACEMENT_MEASURES):
                arrays[name][layers, :, task] = out[..., i]
        # Loads from all tokens of the bank; traffic and variance from the sample.
        weight = self._popularity[:, layers[:, None], physical_to_logical] / np.take_along_axis(
            replicas[layers], physical_to_logical, axis=1
        )
        shares = weight.reshape(len(weight), len(layers), self.ranks, per_rank).sum(axis=3)
        arrays["share"][layers] = np.moveaxis(shares, 0, 2)
        tabulate_layers(self._groups, self._index, layers)

    def transfer_s(self, wanted: Placement) -> FloatArray:
        """Return how long each layer takes to move to another placement, shape (layers,); 0 where none moves."""
        received = moved_experts(self.placement, wanted)  # (layers, ranks)
        share = self.config.replacement.link_share if self.config.replacement.mode == "async" else 1.0
        per_expert = self.shape.expert_bytes / (self.shape.link_gb_s * 1e9 * share)
        busiest = received.max(axis=1)
        overhead = self.config.replacement.layer_overhead_s
        changed = (wanted.physical_to_logical != self.placement.physical_to_logical).any(axis=1)
        return np.asarray(np.where(changed, overhead + busiest * per_expert, 0.0))

    # ------------------------------------------------------------------------------------------------ load
    def load(self, *, sources: bool = True, coactivation: bool = False, future: FloatArray | None = None) -> ExpertLoad:
        """Return the load of the last window, as the engine would report it.

        Args:
            sources: with the tokens by source rank.
            coactivation: with the pairs of experts in adjacent layers, of a sample of the window's tokens.
            future: granted to an oracle.
        """
        arrays = self._arrays
        by_engine = self._by_engine()
        tokens = by_engine.sum(axis=0)
        per_engine = self.ranks // len(by_engine)
        by_source = np.repeat(by_engine / per_engine, per_engine, axis=0).swapaxes(0, 1) if sources else None
        pairs = None
        if coactivation:
            pairs = np.zeros((tokens.shape[0] - 1, tokens.shape[1], tokens.shape[1]))
            count_pairs(arrays["bank"], self._sample(arrays["window"].sum(axis=(0, 1))), pairs)
        return ExpertLoad(
            tokens=tokens,
            by_source=by_source,
            coactivation=pairs,
            steps=int(arrays["bucket_steps"].sum()),
            future=future,
            expert_bytes=self.shape.expert_bytes,
            top_k=self.bank.top_k,
        )

    def expected_load(self, weights: FloatArray) -> FloatArray:
        """Return the expected experts chosen per token under a mix of tasks, shape (layers, experts)."""
        return np.asarray(np.tensordot(weights, self._popularity, axes=1))

    def _by_engine(self) -> FloatArray:
        """Experts chosen in the window by source engine, shape (engines, layers, experts)."""
        if self.config.mode == "sampled":
            return np.asarray(self._arrays["counts"].sum(axis=0))
        return np.asarray(np.tensordot(self._arrays["window"].sum(axis=0), self._popularity, axes=1))

    def _sample(self, task_tokens: FloatArray) -> IntArray:
        """Draw tokens of the bank in the window's mix of tasks."""
        total = task_tokens.sum()
        if total == 0:
            return np.zeros(0, dtype=np.int64)
        counts = self._rng.multinomial(self.config.replacement.coactivation_tokens, task_tokens / total)
        known = self.bank.token_task()
        return np.concatenate(
            [self._rng.choice(np.flatnonzero(known == task), size=count) for task, count in enumerate(counts)]
        )

    def rank_heat(self) -> FloatArray:
        """Return each rank's load of the window over the mean by layer, shape (layers, ranks); 1 is balanced."""
        loads = rank_loads(self._by_engine().sum(axis=0), self.placement)
        means = loads.mean(axis=1, keepdims=True)
        return np.asarray(np.where(means > 0, loads / np.maximum(means, 1e-300), 1.0))

    # ------------------------------------------------------------------------------------------------ statistics
    def statistics(self) -> dict[str, float]:
        """Return the means over the steps so far: imbalance, balancedness, and time in experts and in exchange."""
        record = self.record[0]
        steps = max(int(record["steps"]), 1)
        return {
            "steps": int(record["steps"]),
            "imbalance": float(record["imbalance_sum"] / steps) if record["steps"] else 1.0,
            "balancedness": float(record["balancedness_sum"] / steps) if record["steps"] else 1.0,
            "experts_s": float(record["experts_s"] / steps),
            "exchange_s": float(record["exchange_s"] / steps),
        }


def new_groups(count: int) -> npt.NDArray[Any]:
    """Return the table of ``count`` groups."""
    return np.zeros(count, dtype=EXPERTS)


def _config_fields(config: ExpertsConfig) -> dict[str, Any]:
    """Fields of the EXPERTS record that follow from the config."""
    replacement = config.replacement
    first = replacement.first_steps
    return {
        "sampled": config.mode == "sampled",
        "returning": config.traffic == "return",
        "most_replicas": 1 + config.redundant_experts,
        "chunk_sample": config.chunk_sample,
        "bucket_steps": max(replacement.window_steps // WINDOW_BUCKETS, 1),
        "next_placement": first if first is not None else max(replacement.interval_steps // 4, 1),
    }


def _cost_fields(costs: ExpertCosts) -> dict[str, Any]:
    """Fields of the EXPERTS record that follow from the costs."""
    return {
        "expert_s": costs.expert_s,
        "compute_size": len(costs.compute_s),
        "compute_scale": costs.compute_scale,
        "exchange_size": len(costs.exchange_s),
        "exchange_factor": 1.0,
        "uniform_traffic": costs.uniform_traffic,
    }


def _array_shapes(record: Any) -> dict[str, tuple[tuple[int, ...], npt.DTypeLike]]:
    """Shape and type of the arrays that begin as zeros, by name, for an EXPERTS record with its sizes set."""
    layers, experts, slots, ranks, tasks, engines = (
        int(record[name]) for name in ("layers", "experts", "slots", "ranks", "tasks", "engines")
    )
    by_task = dict.fromkeys(_PLACEMENT_MEASURES, ((layers, ranks, tasks), np.float64))
    return by_task | {
        "slot_expert": ((layers, slots), np.int32),
        "replicas": ((layers, experts), np.int32),
        "expert_slots": ((layers, experts, int(record["most_replicas"])), np.int32),
        "active": ((layers, BATCH_SIZES, ranks), np.float64),
        "active_excess": ((layers, BATCH_SIZES), np.float64),
        "load_excess": ((layers, BATCH_SIZES), np.float64),
        "step_tasks": ((tasks,), np.float64),
        "source_tasks": ((engines, tasks), np.float64),
        "slot_load": ((layers, slots), np.float64),
        "traffic": ((4, layers, ranks), np.float64),
        "touched": ((int(record["top_k"]),), np.int64),
        "bucket_steps": ((WINDOW_BUCKETS,), np.int64),
        "window": ((WINDOW_BUCKETS, engines, tasks), np.float64),
        "counts": ((WINDOW_BUCKETS if record["sampled"] else 0, engines, layers, experts), np.float64),
        "rank_load": ((ranks,), np.float64),
    }
