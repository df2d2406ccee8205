"""The cells of a validation: a live run, and a simulation of the same requests under the same policies.

Machines drift, so repetitions go round all cells, and a profile that knows how far its machine drifted is simulated on
a slower and a faster one, too: between the two lies what it can promise. With our scheduler in the engines, records of
their steps say how fast the machine was during a run, compared with what the profile promises; one more simulation, at
that speed, tells what the model gets wrong from what the machine did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from servegym.engine_bridge.cluster.engine import completes
from servegym.engine_bridge.cluster.launcher import LiveCluster
from servegym.engine_bridge.vllm_plugin.steps import steps_file
from servegym.envs.calibration.records import Step, StepRecords
from servegym.envs.live.dispatch import by_policy
from servegym.envs.live.options import Target
from servegym.envs.live.replay import ReplayResult, replay
from servegym.envs.profiles.profile import Profile, load_profile
from servegym.envs.requests import RequestSource
from servegym.envs.simulation import Policies
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig, Fault
from servegym.envs.simulator.metrics import Float, RunOutcome, summary
from servegym.envs.validation.agreement import QueueLengths
from servegym.envs.validation.config import Cell, ValidationConfig
from servegym.envs.validation.sent import as_sent, with_live_prefixes
from servegym.envs.validation.speed import Speed
from servegym.envs.workloads.table import RequestTable
from servegym.errors import EngineError, InputError

_WARMUP_REQUESTS = 24


class Validator:
    """Runs cells on live engines and in the simulator; as a context manager, it restores the engines' order at the end.

    Args:
        config: what to compare.
        profile: what ``servegym calibrate`` has written.

    Raises:
        InputError: no such profile, engines that do not run, or that are not those of the profile.
    """

    def __init__(self, config: ValidationConfig, profile: str) -> None:
        self._config = config
        self._profile = load_profile(profile)
        self._target = config.live.target()
        self._cluster = ClusterConfig(engines=len(self._target.urls), profile=profile)
        self._sources = {
            label: RequestSource(scenario.workload, self._cluster) for label, scenario in config.scenarios.items()
        }
        self._capacities: dict[str, float] = {}
        self._warm = False
        self._leaving = ExitStack()
        _require_order(config, self._target)

    def __enter__(self) -> Self:
        if self._ordered is not None:
            self._leaving.enter_context(self._ordered.restoring_policy())
        return self

    def __exit__(self, *error: object) -> None:
        self._leaving.close()

    @property
    def _ordered(self) -> LiveCluster | None:
        """The cluster, if its engines' waiting queues are ours to order."""
        cluster = self._target.cluster
        return cluster if cluster is not None and cluster.ordered else None

    def rate_rps(self, cell: Cell) -> float:
        """Return the arrival rate of a cell, from the capacity that the simulator predicts.

        That is the rate at which its very requests are served if all are there from the start: with some hundreds of
        them their own mix decides, not that of the workload.
        """
        if cell.scenario not in self._capacities:
            table = self._sources[cell.scenario].table(self._config.seed, rate_rps=1.0)
            count = len(table)
            at_once = replace(table, arrival_s=np.zeros(count), parent=np.full(count, -1, dtype=np.int32))
            at_once = with_live_prefixes(at_once, self._profile.engine.block_size)
            finish_s = self._simulate(at_once, Policies(), None).finish_s
            self._capacities[cell.scenario] = count / float(finish_s.max())
        return cell.load * self._capacities[cell.scenario]

    def table(self, cell: Cell) -> RequestTable:
        """Return the requests of a cell, equal in all repetitions."""
        return self._sources[cell.scenario].table(self._config.seed, rate_rps=self.rate_rps(cell))

    def run(self, cell: Cell) -> dict[str, Any]:
        """Run a cell: the row of both sides.

        Raises:
            EngineError: a request failed.
        """
        table, policies = self.table(cell), self._config.policies[cell.policy]
        failed = 0 if self._ordered is None else -self._ordered.failed_decisions
        live, steps, rate = self._live(table, policies)
        failed += 0 if self._ordered is None else self._ordered.failed_decisions
        slip = live.slip_s
        repeated = with_live_prefixes(as_sent(table, live.outcome.arrival_s + slip), self._profile.engine.block_size)
        sides = {"simulated": self._simulate(repeated, policies, rate)}
        for side, factor in zip(("faster", "slower"), self._profile.slowness or (), strict=False):
            sides[side] = self._simulate(repeated, policies, rate, self._slow(factor))
        if any(steps):
            speeds = [Speed.of(engine, self._profile, live.start_s) for engine in steps]
            recorded = [fault for engine, speed in enumerate(speeds) for fault in speed.faults(engine)]
            sides["at_speed"] = self._simulate(repeated, policies, rate, recorded)
        row: dict[str, Any] = {
            "repetition": cell.repetition,
            "scenario": cell.scenario,
            "load": cell.load,
            "policy": cell.policy,
            "requests": len(table),
            "rate_rps": self.rate_rps(cell),
            "live": _metrics(live.outcome, slip),
            **{side: _metrics(outcome, np.zeros(len(table))) for side, outcome in sides.items()},
            "slip_s": summary(slip),
            "failed_decisions": failed,
            "queue": self._queues(live, {side: sides[side] for side in ("simulated", "at_speed") if side in sides}),
        }
        if any(steps):
            simulated = sides["simulated"]
            row |= {
                "step_time": [speed.summary() for speed in speeds],
                # Prompts less what the prefix caches had of them.
                "prefill_tokens": {
                    "live": sum(step.prefill_tokens for engine in steps for step in engine),
                    "simulated": int((simulated.prompt_tokens - simulated.hit_tokens).sum()),
                },
            }
        return row

    def _slow(self, factor: float) -> list[Fault]:
        return [Fault(at_s=0.0, engine=engine, kind="slow", factor=factor) for engine in range(len(self._target.urls))]

    def _live(self, table: RequestTable, policies: Policies) -> tuple[ReplayResult, list[list[Step]], float | None]:
        options, target = self._config.live, self._target
        with ExitStack() as stack:
            records: list[StepRecords] = []
            if self._ordered is not None:
                files = [steps_file(Path(str(engine.shim))) for engine in self._ordered.engines]
                records = [stack.enter_context(StepRecords(file)) for file in files]
                self._ordered.follow(policies.request)
            for record, url in zip(records, target.urls, strict=False):
                record.wait(partial(completes, url, target.model))
                _check_limits(record, self._profile, url)
            if not self._warm:
                replay(table.window(0, _WARMUP_REQUESTS), target.urls, target.model, options)
                self._warm = True
            for record in records:
                record.read()
            # In turn without our router, whose readings of telemetry an engine's server has to serve.
            dispatcher = None
            if policies.engine != Policies().engine:
                dispatcher = by_policy(policies.engine, table, options, len(target.urls), self._config.seed)
            result = replay(table, target.urls, target.model, options, dispatcher=dispatcher)
            steps = [record.read() for record in records]
        if result.errors:
            r, error = next(iter(result.errors.items()))
            raise EngineError(f"{len(result.errors)} of {len(table)} requests failed, request {r}: {error}")
        return result, steps, records[0].prefill_tokens_per_s if records else None

    def _simulate(
        self, table: RequestTable, policies: Policies, rate: float | None, faults: Sequence[Fault] = ()
    ) -> RunOutcome:
        cluster = self._cluster.model_copy(update={"faults": tuple(faults)})
        run = SimulatedCluster(cluster, table, *policies.make(), seed=self._config.seed, source=self._config.name)
        if rate is not None:
            # What the policies inside the engines were told.
            run.memory.engines["prefill_tokens_per_s"] = rate
        run.run()
        return RunOutcome.of(run)

    def _queues(self, live: ReplayResult, simulated: Mapping[str, RunOutcome]) -> dict[str, Any]:
        """Queue lengths over time, and the errors of the simulated ones."""
        begin = live.outcome.arrival_s + live.slip_s
        spans = {"live": (begin, live.outcome.arrival_s + live.outcome.ttft_s)}
        spans |= {label: (one.arrival_s, one.arrival_s + one.ttft_s) for label, one in simulated.items()}
        every_s = self._config.queue_every_s
        until_s = max(float(np.nanmax(first)) for _, first in spans.values())
        queues = {label: QueueLengths.of(sent, first, every_s, until_s) for label, (sent, first) in spans.items()}
        courses: dict[str, Any] = {label: queue.length.round(3).tolist() for label, queue in queues.items()}
        errors = {label: queues[label].error(queues["live"]) for label in simulated}
        return {"time_s": queues["live"].time_s.tolist(), **courses, "error": errors}


def _require_order(config: ValidationConfig, target: Target) -> None:
    """Make sure that the engines order their queues as the policies say.

    Raises:
        InputError: a request policy for engines that run vLLM's own scheduler.
    """
    if target.cluster is not None and target.cluster.ordered:
        return
    for label, policies in config.policies.items():
        if policies.request != Policies().request:
            raise InputError(
                config.name,
                f"policies.{label}.request",
                f"got {policies.request}; allowed: fcfs on these engines; others on a cluster whose file has a"
                " request_policy",
            )


def _check_limits(record: StepRecords, profile: Profile, url: str) -> None:
    for name, value in record.limits.items():
        if getattr(profile.engine, name) != value:
            raise InputError(
                "--profile",
                profile.name,
                f"{name} {getattr(profile.engine, name)}, while {url} has {value}; allowed: a profile of these engines",
            )


def _metrics(outcome: RunOutcome, slip_s: Float) -> dict[str, Any]:
    """Summarise what a client saw from sending on, which is what both sides have."""
    return {
        "ttft_s": summary(outcome.ttft_s - slip_s),
        "tpot_s": summary(outcome.tpot_s),
        "e2e_s": summary(outcome.e2e_s - slip_s),
    }
