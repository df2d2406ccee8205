"""The cells of an evaluation on live engines.

Machines drift, so all policies of a cell run one after the other, and each repetition (seed) begins with another one.
Every run has tokens of its own: none finds what the one before has left in the prefix caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
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
    config: EvaluationConfig,
    options: LiveOptions,
    cells: list[tuple[int, float, int]],
    progress: Callable[[float], None] = lambda share: None,
) -> Iterator[tuple[tuple[int, float, int], list[dict[str, Any]]]]:
    """Run cells, (index of the workload, rate, seed), and yield each with a row per policy.

    Args:
        config: the evaluation.
        options: how requests are sent.
        cells: what to run.
        progress: called with the share of the present cell that is done.

    Raises:
        InputError: no such cluster, or engines whose waiting queue we cannot order.
        EngineError: engines that do not answer, or do not take up a request policy.
    """
    target = options.target()
    bench = _Bench(config, options, target, _shimmed(target, config))
    with nullcontext() if bench.shimmed is None else bench.shimmed.restoring_policy():
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
                progress(len(rows) / len(labels))
            yield (index, rate, seed), [rows[label] for label in labels]


@dataclass(frozen=True, slots=True)
class _Bench:
    config: EvaluationConfig
    options: LiveOptions
    target: Target
    shimmed: LiveCluster | None

    def run(self, table: RequestTable, policies: Policies, seed: int) -> dict[str, Any]:
        target, shimmed = self.target, self.shimmed
        failures = 0
        if shimmed is not None:
            failures = shimmed.failed_decisions
            shimmed.follow(policies.request)
        dispatcher = by_policy(policies.engine, table, self.options, len(target.urls), seed)
        result = replay(table, target.urls, target.model, self.options, dispatcher=dispatcher)
        metrics = result.metrics(self.config.slo, self.config.warmup_share)
        del metrics["wall_s"]
        fallbacks = sum(dispatcher.router.fallbacks.values()) - failures
        fallbacks += 0 if shimmed is None else shimmed.failed_decisions
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
