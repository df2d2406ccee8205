"""The compiled form of every heuristic gives the very numbers of its Python form."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from servegym.baselines import registry
from servegym.baselines.heuristic import compiled_form
from servegym.baselines.interface import C_PREFILL_TOKENS_PER_S, CONTEXT_COLUMNS, pick

ROW, MATRIX = numba.float64[::1], numba.float64[:, ::1]
ENGINE = [*registry.names("engine"), "session_sticky,max_gap=1", "load_aware,theta_k=0.5,theta_diff=0.3"]
ENGINE += [
    "dynamo,temperature=0.7",
    "sglang,abs_gap=2",
    "ray_prefix,gap=2",
    "ray_prefix,gap=none",
    "autellix,long_tokens=99",
]
ENGINE += ["chwbl,bound=1", "smetric,c2=1e-5,slack=0.2", "dualmap,slo_base_s=0.3"]
REQUEST = [*registry.names("request"), "spf_aging,gamma=0", "sjf_age,theta_age_s=12", "sjf_predicted,unknown_tokens=9"]
REQUEST += [
    "mlfq,starvation_s=15",
    "mlfq,quantum_s=0.001,starvation_s=30",
    "sjf_noisy,sigma=2,seed=5",
    "ewsjf,step_tokens=64",
    "chunked,inner=sjf_age",
]


@pytest.mark.parametrize("spec", ENGINE)
def test_engine_forms_agree(spec, draw_decision) -> None:
    policy = registry.create("engine", spec)
    function, params = compiled_form(policy)
    compiled = numba.njit(numba.void(ROW, MATRIX, ROW, ROW))(function)
    rng = np.random.default_rng(5)
    seen = {"tie": 0, "none available": 0, "choice": 0}
    for _ in range(400):
        request, engines = draw_decision(rng)
        before = engines.data.copy()
        python = policy.score(request, engines)
        native = np.full(len(engines), np.nan)
        compiled(request.row(), engines.data, params, native)
        np.testing.assert_array_equal(python, native)
        np.testing.assert_array_equal(engines.data, before)
        assert np.all(np.isinf(python[engines.available == 0]))
        choice = pick(python, engines.available)
        assert choice == pick(native, engines.available)
        if engines.available.any():
            assert python[choice] < np.inf  # the policy itself never leaves a request without an engine
        loads = engines.inflight[engines.available > 0]
        seen["tie"] += len(loads) > len(np.unique(loads))
        seen["none available"] += choice == -1
        seen["choice"] += len(loads) > 1
    assert min(seen.values()) > 20  # the random views do contain what they are for


@pytest.mark.parametrize("spec", REQUEST)
def test_request_forms_agree(spec, draw_queue) -> None:
    policy = registry.create("request", spec)
    function, params = compiled_form(policy)
    compiled = numba.njit(numba.float64(ROW, ROW, ROW))(function)
    rng = np.random.default_rng(6)
    context = np.zeros(CONTEXT_COLUMNS)
    context[C_PREFILL_TOKENS_PER_S] = 40_000.0
    for _ in range(300):
        queue = draw_queue(rng)
        before = queue.data.copy()
        native = np.array([compiled(item, context, params) for item in queue.data])
        np.testing.assert_array_equal(policy.score(queue), native)
        np.testing.assert_array_equal(queue.data, before)


@pytest.mark.parametrize("layer", ["request", "engine"])
def test_every_heuristic_of_the_first_set_compiles(layer) -> None:
    assert all(row["compiled"] for row in registry.describe(layer))


def test_a_policy_without_compiled_form_says_so() -> None:
    assert compiled_form(registry.create("expert", "linear")) is None
