"""The network without torch gives torch's answers, in numpy and compiled."""

from __future__ import annotations

import time
from pathlib import Path

import numba
import numpy as np
import pytest
import safetensors.numpy
import torch
from support import random_table

from servegym.agents.training.export import actor_weights, torch_logits
from servegym.baselines.features import ENGINE_FEATURES, REQUEST_FEATURES
from servegym.baselines.heuristic import TURN, compiled_form
from servegym.baselines.interface import (
    C_WAITING,
    E_AVAILABLE,
    Q_DEADLINE_S,
    Q_PREDICTED_TOKENS,
    Q_USER_SERVED,
    R_LAST_ENGINE,
    R_PRIORITY,
    R_PROMPT_TOKENS,
    R_RECEIVED_TOKENS,
    R_TURN,
    EngineViews,
    QueueView,
    RequestView,
    pick,
)
from servegym.baselines.registry import create
from servegym.engine_bridge.bundle import load_bundle
from servegym.engine_bridge.decisions import ADMISSION, DISPATCH, Decisions
from servegym.engine_bridge.golden import draw_dispatch, draw_queue
from servegym.engine_bridge.set_scorer import SetScorer
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig


def views(row: np.ndarray, matrix: np.ndarray) -> tuple[RequestView, EngineViews]:
    request = RequestView(
        index=0,
        now_s=row[0],
        arrival_s=row[1],
        prompt_tokens=int(row[R_PROMPT_TOKENS]),
        priority=int(row[R_PRIORITY]),
        deadline_s=row[4],
        turn=int(row[R_TURN]),
        last_engine=int(row[R_LAST_ENGINE]),
        received_tokens=int(row[R_RECEIVED_TOKENS]),
    )
    return request, EngineViews(matrix)


def test_numpy_equals_torch_on_a_thousand_random_observations(actor) -> None:
    scorer, reference = SetScorer(actor_weights(actor)), torch_logits(actor)
    rng = np.random.default_rng(1)
    for _ in range(1000):
        count = int(rng.integers(1, 17))
        available = rng.random(count) < 0.8
        available[rng.integers(count)] = True
        engines = rng.normal(size=(count, len(ENGINE_FEATURES))).astype(np.float32) * available[:, None]
        request = rng.normal(size=len(REQUEST_FEATURES)).astype(np.float32)
        mine, theirs = scorer.logits(engines, request, available), reference(engines, request, available)
        np.testing.assert_allclose(mine[available], theirs[available], rtol=0, atol=1e-5)
        assert np.where(available, mine, -np.inf).argmax() == theirs.argmax()


def test_the_compiled_form_equals_the_numpy_runtime(bundle) -> None:
    policy = load_bundle(bundle)
    function, params = compiled_form(policy)
    compiled = numba.njit(function)
    rng = np.random.default_rng(2)
    for case in range(300):
        row, matrix = draw_dispatch(rng)
        if case % 10 == 0:
            matrix[:, E_AVAILABLE] = 0.0
        scores = policy.score(*views(row, matrix))
        for run in (compiled, function) if case < 20 else (compiled,):
            out = np.full(len(matrix), np.nan)
            run(row, matrix, params, out)
            np.testing.assert_allclose(out, scores, rtol=0, atol=1e-5)
            assert pick(out, matrix[:, E_AVAILABLE]) == pick(scores, matrix[:, E_AVAILABLE])


def test_equal_engines_take_turns_and_unavailable_ones_none(bundle) -> None:
    policy = load_bundle(bundle)
    row, matrix = draw_dispatch(np.random.default_rng(0))
    matrix = np.repeat(matrix[:1], 4, axis=0)
    matrix[:, E_AVAILABLE] = [1, 1, 0, 1]
    row[R_RECEIVED_TOKENS] = 0.0  # one that resumes may follow the last
    chosen = []
    for last in (-1, 0, 1, 3):
        row[R_LAST_ENGINE] = last
        out = np.empty(4)
        policy.compiled(row, matrix, policy.compiled_params(), out)
        assert np.isinf(out[2])
        chosen.append((pick(policy.score(*views(row, matrix)), matrix[:, E_AVAILABLE]), int(out.argmin())))
    assert chosen == [(0, 0), (1, 1), (3, 3), (0, 0)]


def test_scores_do_not_depend_on_engines_that_are_down(bundle) -> None:
    policy = load_bundle(bundle)
    row, matrix = draw_dispatch(np.random.default_rng(5))
    longer = np.vstack([matrix, np.full_like(matrix[:2], 77.0)])
    longer[-2:, E_AVAILABLE] = 0.0
    scores = policy.score(*views(row, longer))
    np.testing.assert_allclose(scores[: len(matrix)], policy.score(*views(row, matrix)), atol=1e-5)
    assert np.isinf(scores[-2:]).all()


def test_no_engines_give_no_scores(bundle) -> None:
    row, matrix = draw_dispatch(np.random.default_rng(5))
    assert load_bundle(bundle).score(*views(row, matrix[:0])).shape == (0,)


def test_requests_are_scored_alike_by_torch_numpy_and_the_compiled_form(request_actor, request_bundle) -> None:
    policy, reference = load_bundle(request_bundle), torch_logits(request_actor)
    function, params = compiled_form(policy)
    compiled = numba.njit(function)
    rng = np.random.default_rng(3)
    for case in range(200):
        context, queue = draw_queue(rng)
        if case % 2:
            queue[:, [Q_DEADLINE_S, Q_PREDICTED_TOKENS, Q_USER_SERVED]] = [np.inf, np.nan, np.nan]
        view = QueueView(queue, *context[:C_WAITING].tolist())
        np.testing.assert_array_equal(view.context(), context)
        scores = policy.score(view)
        items, shared = ADMISSION.features(context, queue)
        np.testing.assert_allclose(scores, -reference(items, shared, np.ones(len(queue))), rtol=0, atol=1e-5)
        for run in (compiled, function) if case < 20 else (compiled,):
            np.testing.assert_allclose([run(row, context, params) for row in queue], scores, rtol=0, atol=1e-5)


def test_a_request_is_scored_by_itself(request_bundle) -> None:
    """Two waiting requests and the same two among others have the same order, whoever the others are."""
    policy = load_bundle(request_bundle)
    context, queue = draw_queue(np.random.default_rng(11))
    shown = ADMISSION.features(context, queue)[0]
    np.testing.assert_array_equal(ADMISSION.features(context, queue[::-1])[0], shown[::-1])
    np.testing.assert_allclose(policy.logits(context, queue[:2]), policy.logits(context, queue)[:2], rtol=1e-5)


@pytest.mark.parametrize("layer", ["bundle", "request_bundle"])
def test_the_simulator_takes_a_bundle_compiled_and_as_python_alike(layer: str, request) -> None:
    """The kernel's own call of the network, and the same policy without its compiled form."""
    policy = load_bundle(request.getfixturevalue(layer))
    plain = type("Plain", (), {"score": lambda self, *views: policy.score(*views)})()
    config = ClusterConfig(engines=2 if layer == "bundle" else 1, engine={"max_num_batched_tokens": 2048})
    table = random_table(5, 300, rate_rps=40.0)
    finish = []
    for one in (policy, plain):
        chosen = (create("request", "fcfs"), one) if layer == "bundle" else (one, create("engine", "round_robin"))
        run = SimulatedCluster(config, table, *chosen)
        run.run()
        finish.append(run.memory.requests["finish_s"].copy())
    np.testing.assert_array_equal(*finish)


@pytest.mark.parametrize("count", [4, 16])
def test_a_decision_takes_microseconds(bundle, count: int) -> None:
    policy = load_bundle(bundle)
    row, matrix = draw_dispatch(np.random.default_rng(0))
    request, engines = views(row, np.repeat(matrix[:1], count, axis=0))
    times = []
    for _ in range(500):
        began = time.perf_counter()
        policy.score(request, engines)
        times.append(time.perf_counter() - began)
    assert np.median(times) < 300e-6  # 20 us on an idle core; the ceiling leaves room for a busy one


@pytest.mark.parametrize("layer", [DISPATCH, ADMISSION])
def test_a_network_of_some_features_sees_those_alone(layer: Decisions, save_actor, tmp_path) -> None:
    """In any order; its compiled form and its weights are those of a network that ignores the others."""
    some = layer.only(layer.item_names[:3] + layer.item_names[:4:-1], layer.context_names[1:])
    policy = load_bundle(save_actor(tmp_path / "policy", decisions=some, width=8))
    function, params = compiled_form(policy)
    every = SetScorer(policy.weights)
    rng = np.random.default_rng(4)
    for _ in range(50):
        row, matrix = (draw_dispatch if layer is DISPATCH else draw_queue)(rng)
        items, context = layer.features(row, matrix)
        names = [layer.item_names.index(name) for name in some.item_names]
        shown = np.ascontiguousarray(items[:, names])
        expected = policy._scorer.logits(shown, context[1:], layer.eligible(matrix))
        np.testing.assert_array_equal(policy.logits(row, matrix), expected)
        np.testing.assert_allclose(every.logits(items, context, layer.eligible(matrix)), expected, atol=1e-5)
        if layer is DISPATCH:
            out = np.empty(len(matrix))
            function(row, matrix, params, out)
            np.testing.assert_allclose(out, policy.score(*views(row, matrix)), atol=1e-5)
        else:
            np.testing.assert_allclose([function(one, row, params) for one in matrix], -expected, atol=1e-5)


def test_a_feature_that_came_later_changes_nothing_of_an_older_bundle(save_actor, tmp_path: Path) -> None:
    """Bit for bit: numpy multiplies the old columns alone, and the compiled form adds zeros behind them."""
    older = DISPATCH.only(DISPATCH.item_names[:28], DISPATCH.context_names)
    policy = load_bundle(save_actor(tmp_path / "older", width=1, decisions=older, linear=True))
    assert len(policy.manifest.item_features) == 28 < len(ENGINE_FEATURES)
    weights = SetScorer(safetensors.numpy.load_file(policy.folder / "policy.safetensors"))
    function, params = compiled_form(policy)
    compiled = numba.njit(function)
    rng = np.random.default_rng(6)
    for _ in range(200):
        row, matrix = draw_dispatch(rng)
        available = matrix[:, E_AVAILABLE] > 0.0
        items, context = DISPATCH.features(row, matrix)
        before = weights.logits(np.ascontiguousarray(items[:, :28]), context, available)
        np.testing.assert_array_equal(policy.logits(row, matrix), before)
        out = np.empty(len(matrix))
        compiled(row, matrix, params, out)
        places = (np.arange(len(matrix)) - (int(row[R_LAST_ENGINE]) + 1)) % len(matrix)
        scores = TURN * places
        for k in range(28):
            scores -= items[:, k].astype(np.float64) * float(weights.weights["prior.weight"][0, k])
        np.testing.assert_array_equal(out[available], scores[available])


def test_weights_survive_the_way_through_the_bundle(actor, bundle) -> None:
    state = actor.state_dict()
    loaded = load_bundle(bundle)._scorer.weights
    assert loaded.keys() == state.keys()
    assert all(torch.equal(torch.from_numpy(loaded[name]), tensor) for name, tensor in state.items())
