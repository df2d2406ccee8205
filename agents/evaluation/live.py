"""The cells of an evaluation on live engines.

Machines drift, so all policies of a cell run one after the other, and each repetition (seed) begins with another one.
Every run has tokens of its own: none finds what the one before has left in the prefix caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from servegym.agents.evaluation.config import EvaluationConfig
from servegym.engine_bridge.cluster.launcher import LiveCluster
from servegym.envs.live.dispatch import by_policy
from servegym.envs.live.options import LiveOptions, Target
from servegym.envs.live.replay import replay
from servegym.envs.simulation import Policies
from servegym.envs.workloads.table import RequestTable
from servegym.errors import InputError

_WARMUP_REQUESTS = 16


def run_live(
    config: EvaluationConfig, options: LiveOptions, cells: list[tuple[int, float, int]]
) -> Iterator[tuple[tuple[int, float, int], list[dict[str, Any]]]]:
    """Run cells, (index of the workload, rate, seed), and yield each with a row per policy.

    Raises:
        InputError: no such cluster, or engines whose waiting queue we cannot order.
        EngineError: engines that do not answer, or do not take up a request policy.
    """
    target = options.target()
    bench = _Bench(config, options, target, _shimmed(target, config))
    with _restored(bench.shimmed):
        for number, (index, rate, seed) in enumerate(cells):
            choice = config.workloads[index].model_copy(update={"load": None, "rate_rps": rate})
            table = options.table(choice, seed)
            if number == 0:
                replay(options.table(choice, seed, requests=_WARMUP_REQUESTS), target.urls, target.model, options)
            labels = list(config.policies)
            turn = config.seed_list.index(seed) % len(labels)
            rows = {}
            for label in labels[turn:] + labels[:turn]:
                measured = bench.run(table, config.policies[label], seed)
                rows[label] = {"workload": choice.label, "rate_rps": rate, "seed": seed, "policy": label} | measured
            yield (index, rate, seed), [rows[label] for label in labels]


@dataclass(frozen=True, slots=True)
class _Bench:
    config: EvaluationConfig
    options: LiveOptions
    target: Target
    shimmed: LiveCluster | None

    def run(self, table: RequestTable, policies: Policies, seed: int) -> dict[str, Any]:
        target, shimmed = self.target, self.shimmed
        failures = _failures(shimmed)
        if shimmed is not None:
            shimmed.follow(policies.request)
        dispatcher = by_policy(policies.engine, table, self.options, len(target.urls), seed)
        result = replay(table, target.urls, target.model, self.options, dispatcher=dispatcher)
        metrics = result.metrics(self.config.slo, self.config.warmup_share)
        del metrics["wall_s"]
        fallbacks = sum(dispatcher.router.fallbacks.values()) + _failures(shimmed) - failures
        return metrics | {"fallbacks": fallbacks}


def _shimmed(target: Target, config: EvaluationConfig) -> LiveCluster | None:
    """Return the cluster if its engines' waiting queues are ours to order; else make sure that nobody asks for it."""
    cluster = target.cluster
    if cluster is not None and cluster.ordered:
        return cluster
    for label, policies in config.policies.items():
        if policies.request.name != "fcfs":
            raise InputError(
                config.name,
                f"policies.{label}.request",
                f"got {policies.request}; allowed: fcfs on these engines; others on a cluster, by its name, whose file"
                " has a request_policy, so that our scheduler runs in its engines",
            )
    return None


@contextmanager
def _restored(cluster: LiveCluster | None) -> Iterator[None]:
    """Put the request policy of before in force again at the end."""
    before = None if cluster is None else cluster.request_policy
    try:
        yield
    finally:
        if cluster is not None and before is not None:
            cluster.set_request_policy(before)


def _failures(cluster: LiveCluster | None) -> int:
    states = [engine.shim_state() for engine in cluster.engines] if cluster is not None else []
    return sum(int(state["failures"]) for state in states if state is not None)
