"""One cell of an evaluation, run again with everything recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

import servegym.engine_bridge.bundle  # noqa: F401 - makes bundles available by path
from servegym.agents.evaluation.config import Condition, EvaluationConfig
from servegym.agents.evaluation.report import Evaluation
from servegym.agents.report.explain import Decision, ExplainedEnginePolicy, QueueWatch, readable_queue
from servegym.agents.report.selection import Selection
from servegym.envs.requests import RequestSource
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.metrics import RunOutcome
from servegym.envs.simulator.recording import Recording, Series
from servegym.envs.workloads.table import RequestTable

_SAMPLES = 160
_DECISIONS = 24
ExplainedLayer = Literal["engine", "request"]


@dataclass(frozen=True, slots=True)
class DetailRun:
    """A recorded run of one policy.

    Attributes:
        label: of the policy.
        outcome: of each request.
        counted: requests after the warm-up, shape (requests,), bool.
        series: engines and experts over time.
        decisions: sampled ones.
        deviation: relative difference of its mean TTFT to the evaluation's own run; 0 means reproduced.
    """

    label: str
    outcome: RunOutcome
    counted: np.ndarray[tuple[int], np.dtype[np.bool_]]
    series: Series
    decisions: tuple[Decision, ...]
    deviation: float


@dataclass(frozen=True, slots=True)
class Detail:
    """The recorded runs of one cell, on the same requests.

    Attributes:
        selection: which cell and which policies.
        condition: what the cell runs on.
        explained: layer of the sampled decisions; None where neither engines nor queues are a choice.
        runs: one per policy, in order of the selection.
    """

    selection: Selection
    condition: Condition
    explained: ExplainedLayer | None
    runs: tuple[DetailRun, ...]


def record(result: Evaluation, selection: Selection, progress: Callable[[float], None] | None = None) -> Detail:
    """Run the policies of a selection again on its cell.

    Args:
        result: the evaluation.
        selection: cell and policies.
        progress: called with the share of runs that have finished.

    Raises:
        InputError: a policy or a trace that is no longer there.
    """
    index, level, seed = selection.cell
    condition = result.config.conditions[index]
    source = RequestSource(condition.workload, condition.cluster)
    rates = result.config.rates_rps
    table = source.table(seed, rate_rps=level) if rates else source.table(seed, load=level)
    explained = _explained_layer(result.config, condition)
    rows = {
        row["policy"]: row
        for row in result.rows
        if (row["workload"], row[result.config.level_name], row["seed"]) == (condition.label, level, seed)
    }
    every_s = max(rows[label]["simulated_s"] for label in selection.policies) / _SAMPLES
    runs = []
    for number, label in enumerate(selection.policies):
        recorder = _Recorder(result.config, condition, table, explained, every_s, seed)
        runs.append(recorder.run(label, rows[label]["ttft_s"]["mean"]))
        if progress is not None:
            progress((number + 1) / len(selection.policies))
    return Detail(selection, condition, explained, tuple(runs))


def _explained_layer(config: EvaluationConfig, condition: Condition) -> ExplainedLayer | None:
    """The layer in which the policies differ; engines first."""
    policies = config.policies.values()
    if condition.cluster.size > 1 and len({str(one.engine) for one in policies}) > 1:
        return "engine"
    if len({str(one.request) for one in policies}) > 1:
        return "request"
    return None


@dataclass(frozen=True, slots=True)
class _Recorder:
    config: EvaluationConfig
    condition: Condition
    table: RequestTable
    explained: ExplainedLayer | None
    every_s: float
    seed: int

    def run(self, label: str, expected_ttft_s: float | None) -> DetailRun:
        request, engine, expert = self.config.policies[label].make()
        if self.explained == "engine":
            engine = ExplainedEnginePolicy(engine, self._sampled_requests())
        if self.explained == "request":
            request = readable_queue(request)
        cluster = SimulatedCluster(
            self.condition.cluster,
            self.table,
            request,
            engine,
            expert,
            seed=self.seed,
            source=self.condition.workload.label,
        )
        recording = Recording(cluster, self.every_s)
        watch = QueueWatch(cluster, request, self.every_s) if self.explained == "request" else None
        cluster.run()
        outcome = RunOutcome.of(cluster)
        ttft_s = outcome.metrics(warmup_share=self.config.warmup_share)["ttft_s"]["mean"]
        known = expected_ttft_s is not None and ttft_s is not None
        return DetailRun(
            label=label,
            outcome=outcome,
            counted=outcome.counted(self.config.warmup_share),
            series=recording.series(),
            decisions=tuple(_evenly(engine.decisions if watch is None else watch.decisions))
            if self.explained is not None
            else (),
            deviation=abs(ttft_s / expected_ttft_s - 1) if known else 0.0,
        )

    def _sampled_requests(self) -> list[int]:
        """Requests that come evenly spaced after the warm-up, the same for all policies."""
        order = np.argsort(self.table.arrival_s, kind="stable")
        first = int(self.config.warmup_share * len(order))
        places = np.linspace(first, len(order) - 1, num=min(_DECISIONS, len(order) - first) + 2)[1:-1]
        return [int(request) for request in order[places.astype(int)]]


def _evenly(decisions: Sequence[Decision]) -> list[Decision]:
    """At most ``_DECISIONS`` of them, evenly spaced, in order of time."""
    ordered = sorted(decisions, key=lambda one: one.time_s)
    if len(ordered) <= _DECISIONS:
        return ordered
    return [ordered[int(place)] for place in np.linspace(0, len(ordered) - 1, num=_DECISIONS)]
