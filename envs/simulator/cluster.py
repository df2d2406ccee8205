"""A simulated cluster: SimPy for what happens to the cluster, the compiled kernel for what happens in its engines.

The kernel runs from one SimPy event to the next. Faults, given or random, are SimPy processes; users add their own
(autoscaling, say) to ``SimulatedCluster.environment`` and act through ``kill``, ``leave`` and the other methods.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import numpy.typing as npt
import simpy

from servegym.baselines.interface import (
    EnginePolicy,
    EngineViews,
    ExpertLoad,
    ExpertPolicy,
    FloatArray,
    QueueView,
    RequestPolicy,
    RequestView,
)
from servegym.baselines.user_code import not_a_number
from servegym.envs.simulator.build import Memory
from servegym.envs.simulator.compile import announce_compilation
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.simulator.engine_control import EngineControl
from servegym.envs.simulator.experts.model import ExpertModel
from servegym.envs.simulator.experts.replacement import Replacer
from servegym.envs.simulator.frontend import common_frontend, delayed
from servegym.envs.simulator.kernel.cluster import (
    DISPATCH,
    DONE,
    HORIZON,
    NOT_A_NUMBER,
    ORDER,
    PLACEMENT,
    advance_to_decision,
)
from servegym.envs.simulator.kernel.state import NONE
from servegym.envs.simulator.policy_forms import PolicyForms
from servegym.envs.simulator.python_policies import EngineChooser, score_queue
from servegym.envs.simulator.random_faults import RandomFaults
from servegym.envs.simulator.views import engine_views, queue_view, request_view
from servegym.envs.workloads.table import RequestTable


class SimulatedCluster(EngineControl):
    """One run of a table of requests on a cluster, under a request policy and an engine policy.

    Without an engine policy the caller decides: :meth:`next_decision` and :meth:`dispatch` alternate. With one,
    :meth:`run` goes to the end; policies with a compiled form never leave the kernel.

    Attributes:
        frontend: what the profiles add to the records' times, None for nothing.
        experts: the expert model, None without one.
        replacers: re-placements of its groups.
        expert_policies: the expert policy of each group, a copy each.

    Args:
        config: the cluster.
        table: the requests.
        request_policy: order of the waiting queues; None if the caller admits.
        engine_policy: choice of engines, or None if the caller dispatches.
        expert_policy: placement of experts, with an expert model; None keeps the linear one.
        seed: seed of the run's own randomness, that of randomised policies.
        tunable: score waiting requests anew at each step, so that ``memory.request_params`` may change in the run.
        record_totals: keep the reward integrals at each arrival (open-loop tables only).
        source: where the table comes from, for error messages.

    Raises:
        InputError: a request that can never fit, an unknown profile; later, a policy whose scores are not numbers.
    """

    def __init__(
        self,
        config: ClusterConfig,
        table: RequestTable,
        request_policy: RequestPolicy | None,
        engine_policy: EnginePolicy | None = None,
        expert_policy: ExpertPolicy | None = None,
        *,
        seed: int = 0,
        tunable: bool = False,
        record_totals: bool = False,
        source: str = "workload",
    ) -> None:
        self.config = config
        self.table = table
        self.specs = config.expand()
        self.frontend = common_frontend(self.specs)
        self.environment = simpy.Environment()
        self.totals = np.zeros(3)
        self._request_policy = request_policy
        self._engine_policy = engine_policy
        self._chooser = EngineChooser(engine_policy)
        self.experts = self._make_experts(seed)
        self.replacers = [Replacer(group, self.environment) for group in self.experts.groups] if self.experts else []
        # Groups learn apart from each other; a policy with state of its own is copied for each.
        self.expert_policies = [copy.deepcopy(expert_policy) for _ in self.replacers]
        self._paused = False
        announce_compilation()
        self.memory = Memory(
            delayed(table, self.frontend),
            self.specs,
            PolicyForms.of(request_policy, engine_policy, tunable=tunable),
            telemetry=config.telemetry,
            router=config.router,
            lockstep=config.mode == "lockstep",
            log_events=self._chooser.log_events,
            record_totals=record_totals,
            experts=self.experts,
            seed=seed,
            source=source,
        )
        for policy in (request_policy, engine_policy, *self.expert_policies):
            reset = getattr(policy, "reset", None)
            if reset is not None:
                reset(seed)
        for fault in config.faults:
            self.schedule(fault)
        self.random_faults = RandomFaults(self.environment, config.random_faults, self.memory.engines, self.apply, seed)
        self._place_static()

    def _make_experts(self, seed: int) -> ExpertModel | None:
        if self.config.experts is None:
            return None
        profiles = [spec.profile for spec in self.specs]
        lockstep = self.config.mode == "lockstep"
        return ExpertModel(self.config.experts, profiles, self.table, lockstep=lockstep, seed=seed)

    def _place_static(self) -> None:
        """Let policies that do not look at the load place the experts as they are loaded, which costs nothing."""
        for replacer, policy in zip(self.replacers, self.expert_policies, strict=True):
            if getattr(policy, "static", False):
                assert policy is not None
                group = replacer.group
                wanted = policy.place(group.load(), group.placement)
                if wanted is not None:
                    group.set_layers(np.arange(len(wanted.physical_to_logical)), wanted.physical_to_logical)

    # ------------------------------------------------------------------------------------------------ running
    @property
    def now_s(self) -> float:
        """Time reached, in seconds from the start of the run."""
        return float(self.memory.cluster["now_s"][0])

    @property
    def decided_s(self) -> float:
        """Time of the pending decision, up to which ``totals`` holds the reward integrals; at the end, the end."""
        return float(self.memory.cluster["totals_s"][0])

    @property
    def finished(self) -> int:
        """Requests that have finished."""
        return int(self.memory.cluster["finished"][0])

    @property
    def arrived(self) -> int:
        """Requests that have arrived."""
        return int(self.memory.cluster["arrived"][0])

    def close(self) -> None:
        """Nothing to give back: a simulation holds only memory."""

    def run(self, progress: Callable[[float], None] | None = None) -> None:
        """Run to the end: all requests finished, or waiting for an engine that never returns.

        Args:
            progress: called now and then with the share of requests that have finished.
        """
        if progress is not None:
            self.environment.process(self._report(progress))
        pending = self.next_decision()
        while pending:
            pending = self.dispatch(self._choose())

    def warm_up(self) -> None:
        """Compile or load the kernel now, so that what follows is simulation only."""
        advance_to_decision(self.memory.cluster, -1.0, NONE, self.totals)

    def next_decision(self) -> bool:
        """Advance to the next request that needs a dispatch decision; False at the end of the run."""
        return self._advance_to_dispatch(NONE)

    def dispatch(self, engine: int) -> bool:
        """Send the pending request to ``engine`` and advance to the next decision; False at the end of the run."""
        return self._advance_to_dispatch(engine)

    @property
    def horizon_s(self) -> float:
        """Time of the next event outside of the kernel, up to which lanes may run the cluster."""
        return float(self.environment.peek())

    def go_on(self, reason: int) -> bool:
        """Advance to the next decision from where a lane of the kernel stopped; False at the end of the run.

        Args:
            reason: why it stopped.
        """
        return self._advance_to_dispatch(NONE, reason)

    def next_placement(self) -> int | None:
        """Advance to the next time that an expert group may be placed anew; None at the end of the run.

        The engine policy dispatches meanwhile. The caller answers by :meth:`place`, before anything else.
        """
        reason = self._advance(NONE)
        while reason == DISPATCH:
            reason = self._advance(self._choose())
        if reason == DONE:
            return None
        return int(self.memory.cluster["placement_group"][0])

    def next_admission(self) -> int | None:
        """Advance to the next engine that may admit one of several waiting requests; None at the end of the run.

        The other policies decide meanwhile. The caller answers by :meth:`admit`.
        """
        reason = self._advance(NONE)
        while reason in (DISPATCH, PLACEMENT):
            if reason == PLACEMENT:
                self.place(self.expert_policies[int(self.memory.cluster["placement_group"][0])])
                reason = self._advance(NONE)
            else:
                reason = self._advance(self._choose())
        return int(self.memory.cluster["order_engine"][0]) if reason == ORDER else None

    def run_until(self, time_s: float) -> bool:
        """Run on to a time, under the run's own policies; False if the run ended before."""

        def pause() -> Generator[simpy.Event, Any, None]:
            yield self.environment.timeout(max(time_s - self.environment.now, 0.0))
            self._paused = True

        self.environment.process(pause())
        reason = self._advance_to_dispatch(NONE)
        while reason:
            reason = self._advance_to_dispatch(self._choose())
        paused, self._paused = self._paused, False
        return paused and self.finished < len(self.table)

    def waiting_requests(self, engine: int) -> tuple[QueueView, npt.NDArray[np.int32]]:
        """Return the waiting queue of an engine in order of arrival, and which requests they are."""
        return queue_view(self.memory, engine)

    def admit(self, engine: int, request: int) -> None:
        """Have an engine consider this waiting request next; it is admitted if it fits."""
        self.memory.engines["picked"][engine] = request

    def place(self, policy: ExpertPolicy | None) -> None:
        """Ask a policy for the pending group's placement and begin what it wants; None keeps the placement.

        Raises:
            InputError: the policy's placement loses an expert or has another shape.
        """
        cluster = self.memory.cluster
        index, now = int(cluster["placement_group"][0]), float(cluster["placement_s"][0])
        cluster["placement_group"] = NONE
        if policy is None:
            self.replacers[index].postpone()
        else:
            future = self._future_load(index, now) if getattr(policy, "needs_oracle", False) else None
            self.replacers[index].ask(policy, now, future)

    def request_view(self) -> RequestView:
        """The pending request."""
        return request_view(self.memory)

    def engine_views(self) -> EngineViews:
        """The engines at the pending decision."""
        return engine_views(self.memory)

    def _choose(self) -> int:
        return self._chooser.choose(self.memory)

    def _advance_to_dispatch(self, action: int, stopped: int | None = None) -> bool:
        reason = self._advance(action, stopped)
        while reason == PLACEMENT:
            self.place(self.expert_policies[int(self.memory.cluster["placement_group"][0])])
            reason = self._advance(NONE)
        return reason == DISPATCH

    def _advance(self, action: int, stopped: int | None = None) -> int:
        """Advance to a decision, a pause or the end: DISPATCH, PLACEMENT, ORDER, HORIZON or DONE.

        Args:
            action: answer to a pending dispatch.
            stopped: why the kernel stopped, where it has run already.
        """
        cluster = self.memory.cluster
        while True:
            horizon = self.horizon_s
            reason = advance_to_decision(cluster, horizon, action, self.totals) if stopped is None else stopped
            action, stopped = NONE, None
            if reason in (DISPATCH, PLACEMENT):
                return reason
            if reason == ORDER:
                if self._request_policy is None:
                    return ORDER
                score_queue(self._request_policy, self.memory, int(cluster["order_engine"][0]))
            elif reason == HORIZON:
                self.environment.step()
            elif reason == NOT_A_NUMBER:
                policy = self._engine_policy if cluster["engine_nan"][0] else self._request_policy
                raise not_a_number(policy, "compiled")
            else:
                # Later events, a recovery for instance, matter only to requests that wait for an engine.
                if horizon == float("inf") or self.finished == len(self.table) or self._given_up():
                    return DONE
                cluster["now_s"] = horizon
                self.environment.step()
            if self._paused:
                return HORIZON

    def expert_load(self, index: int, policy: ExpertPolicy) -> ExpertLoad:
        """Return the load of a group's last window, with what a policy needs of it."""
        now = float(self.memory.cluster["placement_s"][0])
        return self.replacers[index].load(policy, self._future_load(index, now))

    def _future_load(self, index: int, now: float) -> FloatArray:
        """Expected load of the mix of tasks that will arrive in the coming interval; for an oracle."""
        assert self.experts is not None
        group = self.experts.groups[index]
        steps = max(int(group.record["steps"][0]), 1)
        middle = now + 0.5 * group.config.replacement.interval_steps * now / steps
        return group.expected_load(self.experts.weights_at(middle))

    def _given_up(self) -> bool:
        """Whether only random faults can still happen, none of which brings an engine back."""
        last = max((fault.at_s for fault in self.config.faults), default=0.0)
        return bool(self.config.random_faults) and self.environment.now >= last and not self.random_faults.pending

    def _report(self, progress: Callable[[float], None]) -> Generator[simpy.Event, Any, None]:
        span = float(self.table.arrival_s.max()) / 100 or 1.0
        while self.finished < len(self.table):
            yield self.environment.timeout(span)
            progress(self.finished / len(self.table))
