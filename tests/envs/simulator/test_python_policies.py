"""Policies of the user's: scores that are not numbers are an error, in Python and in the compiled kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import random_table

from servegym.baselines.interface import EngineViews, FloatArray, QueueView, RequestView
from servegym.baselines.registry import create
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.errors import InputError


class NanEngines:
    """NaN at the first engines, infinity at the others."""

    def __init__(self, count: int = 3, rest: float = np.inf) -> None:
        self.count, self.rest = count, rest

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        return np.where(np.arange(len(engines)) < self.count, np.nan, self.rest)


class CompiledNanEngines(NanEngines):
    @staticmethod
    def compiled(request: Any, engines: Any, params: Any, out: Any) -> None:
        for e in range(len(out)):
            out[e] = np.nan if e < params[0] else params[1]

    def compiled_params(self) -> FloatArray:
        return np.array([self.count, self.rest])


class NanRequests:
    """NaN for one kind of prompt."""

    def score(self, queue: QueueView) -> FloatArray:
        return np.where(queue.prompt_tokens % 7 == 3, np.nan, queue.prompt_tokens)


class CompiledNanRequests(NanRequests):
    static = True

    @staticmethod
    def compiled(item: Any, context: Any, params: Any) -> float:
        return np.nan if item[1] % 7 == 3 else item[1]


class CompiledChangingNanRequests(CompiledNanRequests):
    static = False


def simulated(profile: str, request: Any, engine: Any) -> SimulatedCluster:
    config = ClusterConfig(engines=3, profile=profile)
    return SimulatedCluster(config, random_table(1, count=200, rate_rps=200.0), request, engine)


@pytest.mark.parametrize("kind", [NanEngines, CompiledNanEngines])
def test_an_engine_policy_without_a_number_is_an_error(toy_profile: str, kind: type[NanEngines]) -> None:
    for policy in (kind(), kind(1)):
        run = simulated(toy_profile, create("request", "fcfs"), policy)
        with pytest.raises(InputError, match=rf"test_python_policies.py:\d+: {kind.__name__}\.\w+: returned NaN;"):
            run.run()


@pytest.mark.parametrize("kind", [NanEngines, CompiledNanEngines])
def test_an_engine_with_a_number_goes_before_those_without(toy_profile: str, kind: type[NanEngines]) -> None:
    run = simulated(toy_profile, create("request", "fcfs"), kind(2, 1.0))
    run.run()
    assert set(run.memory.requests["engine"]) == {2}


@pytest.mark.parametrize("kind", [NanEngines, CompiledNanEngines])
def test_a_policy_that_excludes_all_engines_loses_no_request(toy_profile: str, kind: type[NanEngines]) -> None:
    run = simulated(toy_profile, create("request", "fcfs"), kind(0))
    run.run()
    assert run.finished == 200
    assert set(run.memory.requests["engine"]) == {0}


@pytest.mark.parametrize("kind", [NanRequests, CompiledNanRequests, CompiledChangingNanRequests])
def test_a_request_policy_without_a_number_is_an_error(toy_profile: str, kind: type[Any]) -> None:
    run = simulated(toy_profile, kind(), create("engine", "round_robin"))
    with pytest.raises(InputError, match=rf"test_python_policies.py:\d+: {kind.__name__}\.\w+: returned NaN;"):
        run.run()
