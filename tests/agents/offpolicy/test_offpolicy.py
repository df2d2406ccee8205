"""Learning from logs whose truth is known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gateway_support import gateway_before
from support import TOY

from servegym.agents.networks import Actor
from servegym.agents.offpolicy.estimate import CostModel, cost_ratio, doubly_robust, effective_decisions
from servegym.agents.offpolicy.finetune import FinetuneConfig, finetune
from servegym.agents.offpolicy.transitions import Transitions, read_transitions
from servegym.agents.training.export import actor_weights, torch_logits
from servegym.baselines.interface import E_ITL_EWMA_S, pick
from servegym.configuration import validate
from servegym.engine_bridge.bundle import load_bundle
from servegym.engine_bridge.bundle_policy import EngineBundlePolicy
from servegym.engine_bridge.bundle_writer import write_bundle
from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.cluster.launcher import running_cluster
from servegym.engine_bridge.decisions import ADMISSION, DISPATCH, Decisions
from servegym.engine_bridge.golden import draw_dispatch
from servegym.engine_bridge.manifest import Provenance
from servegym.envs.engine_dispatch import EngineDispatchEnv
from servegym.envs.live.replay import ReplayConfig, replay
from servegym.envs.simulation import SimulationConfig, simulate
from servegym.envs.workloads.table import RequestTable
from servegym.errors import InputError

EPSILON = 0.3


def bundle(folder: Path, decisions: Decisions = DISPATCH, prior: Any = "least_requests") -> Path:
    torch.manual_seed(0)
    actor = Actor(decisions, 16)
    actor.start_from(prior, 4.0)
    training = Provenance(run="base", config_sha256="0" * 64, seed=0, steps=0, environment="none")
    write_bundle(folder, decisions, actor_weights(actor), torch_logits(actor), training, {})
    return folder


def bandit(count: int, seed: int = 0) -> tuple[Transitions, np.ndarray]:
    """Decisions among three engines with known mean costs, logged by a policy that mostly takes the first one."""
    rng = np.random.default_rng(seed)
    items = rng.normal(size=(count, 3, len(DISPATCH.items))).astype(np.float32)
    context = rng.normal(size=(count, len(DISPATCH.context))).astype(np.float32)
    mask = np.ones((count, 3), dtype=bool)
    mask[:, 2] = rng.random(count) < 0.5
    # Only the last part is what the regression can find.
    truth = np.sin(3 * items[:, :, 0]) + items[:, :, 1] * context[:, None, 0] + 2 * items[:, :, 2]
    chances = np.where(mask, EPSILON / mask.sum(axis=1, keepdims=True), 0.0)
    chances[:, 0] += 1.0 - EPSILON
    action = np.array([rng.choice(3, p=row) for row in chances])
    rows = np.arange(count)
    cost = truth[rows, action] + 0.3 * rng.normal(size=count)
    return Transitions(items, context, mask, action, chances[rows, action], cost, Counter()), truth


def test_the_estimate_is_the_truth_whatever_the_regression_is_worth() -> None:
    seen, _ = bandit(2000, seed=1)
    errors: dict[str, list[float]] = {"regression": [], "none": []}
    for seed in range(2, 42):
        log, truth = bandit(2000, seed)
        best = np.where(log.mask, truth, np.inf).argmin(axis=1)
        policy = np.eye(3)[best]
        expected = CostModel(seen)(log)
        for name, model in (("regression", expected), ("none", np.zeros_like(expected))):
            estimate = doubly_robust(log, model, policy).mean()
            errors[name].append(float(estimate - truth[np.arange(len(log)), best].mean()))
        assert 200 < effective_decisions(log, policy) < 2000
    for found in errors.values():
        # Forty estimates; their mean is within three of its standard errors.
        assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(40)
    assert np.std(errors["regression"]) < np.std(errors["none"])


def test_a_ratio_has_its_interval() -> None:
    rng = np.random.default_rng(0)
    terms = rng.normal(size=4000)
    worse = cost_ratio(terms + np.log(1.2) + 0.1 * rng.normal(size=4000), terms)
    assert worse.low < 1.2 < worse.high
    assert worse.high - worse.low < 0.03


def write_log(path: Path, base: Path, profile: Path, episodes: int = 2, signal: bool = True) -> dict[str, Any]:
    """Play the base policy, with exploration, on two engines of which one is slow, and log as a gateway does."""
    cluster = {"groups": [{"profile": str(profile)}, {"profile": str(profile), "slowdown": 4.0}]}
    settings = {"cluster": cluster, "workload": {"name": "azure-conv", "load": 0.4}, "episode_requests": 700}
    env, policy, rng = EngineDispatchEnv(settings), load_bundle(base), np.random.default_rng(7)
    assert isinstance(policy, EngineBundlePolicy)
    with path.open("w") as file:
        for episode in range(episodes):
            env.reset(seed=episode)
            records, over = [], False
            while not over:
                memory = env._run.memory  # type: ignore[union-attr]
                row, matrix = memory.request_row.copy(), memory.engine_view.copy()
                best = pick(-policy.logits(row, matrix).astype(float), matrix[:, 0])
                chosen = int(rng.integers(2)) if rng.random() < EPSILON else best
                row[~np.isfinite(row)] = np.nan
                views = {"request": row.tolist(), "engines": matrix.tolist()}
                records.append((chosen, EPSILON / 2 + (1 - EPSILON) * (chosen == best), views))
                _, _, over, _, _ = env.step(chosen)
            requests = memory.requests
            for r, (chosen, propensity, views) in enumerate(records):
                ttft = requests["first_s"][r] - requests["arrival_s"][r]
                record = {"arrival_s": 1e4 * episode + requests["arrival_s"][r], "chosen": chosen, "engine": chosen}
                record |= {"propensity": propensity, "ended": "complete", "output_tokens": int(requests["output"][r])}
                record |= {"ttft_s": ttft if signal else float(rng.lognormal()), "e2e_s": ttft + 1.0}
                file.write(json.dumps(record | {"observation": views}).replace("NaN", "null") + "\n")
    return cluster


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(TOY))
    return path


@pytest.mark.slow
def test_a_bundle_learns_from_a_log_and_is_better_where_it_came_from(profile: Path, tmp_path: Path) -> None:
    base = bundle(tmp_path / "base")
    cluster = write_log(tmp_path / "log.jsonl", base, profile, episodes=3)
    shares: list[float] = []
    result = finetune(base, [tmp_path / "log.jsonl"], tmp_path / "out", progress=shares.append)
    assert result.proven
    assert result.folder == tmp_path / "out" / "policy"
    assert result.decisions == (1470, 630)
    assert shares[-1] == 1.0
    assert result.against_old.high < 1.0
    assert 0.0 < result.changed < 0.9
    means = {}
    for name in (base, result.folder):
        config = {
            "cluster": cluster,
            "workload": {"name": "azure-conv", "requests": 2000, "load": 0.4},
            "policies": {"engine": str(name)},
            "seed": 99,
        }
        outcome = simulate(validate(SimulationConfig, config, "test")).outcome
        means[name] = float(np.log(outcome.ttft_s).mean())
    measured = np.exp(means[result.folder] - means[base])
    print(result.against_old, measured)
    assert measured < 0.95
    # The same log gives the same bundle.
    again = finetune(base, [tmp_path / "log.jsonl"], tmp_path / "again")
    assert (again.folder / "policy.safetensors").read_bytes() == (result.folder / "policy.safetensors").read_bytes()


@pytest.mark.slow
def test_what_is_not_proven_is_kept_apart(profile: Path, tmp_path: Path) -> None:
    base = bundle(tmp_path / "base")
    write_log(tmp_path / "log.jsonl", base, profile, signal=False)
    result = finetune(base, [tmp_path / "log.jsonl"], tmp_path / "out", FinetuneConfig(epochs=5))
    assert not result.proven
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unproven"]
    with pytest.raises(InputError, match=r"policy.json: missing"):
        load_bundle(tmp_path / "out")


def lines(**changes: Any) -> str:
    row, matrix = draw_dispatch(np.random.default_rng(0))
    observation = {"request": row.tolist(), "engines": np.repeat(matrix[:1], 2, axis=0).tolist()}
    record = {"arrival_s": 0.0, "chosen": 0, "engine": 0, "propensity": 0.5, "ended": "complete", "ttft_s": 0.1}
    record |= {"e2e_s": 1.0, "output_tokens": 5, "observation": observation}
    record |= changes
    return json.dumps({key: value for key, value in record.items() if value != "absent"}) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no decision to learn from (empty); allowed: logs of deployments with log_observations: true and epsilon"),
        (lines(observation="absent"), "no decision to learn from (1 without observation)"),
        (lines(propensity=1.0), "no decision to learn from (1 chosen for sure)"),
        (lines(engine=1), "(1 served by another engine)"),
        (lines(ended="failed"), "(1 failed)"),
        (lines(ttft_s=None), "(1 without ttft_s)"),
        (lines() + "[]\n", "log.jsonl:2: not a line of a decision log"),
        (lines(observation={"request": [1.0], "engines": [[1.0]]}), "log.jsonl:1: not a line of a decision log"),
        (lines() * 30 + '{"half', "30 decisions to learn from and to judge by; allowed: 200 each"),
    ],
)
def test_logs_that_teach_nothing(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(InputError) as caught:
        finetune(bundle(tmp_path / "base"), [tmp_path / "log.jsonl"], tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_decision_whose_features_are_no_numbers_is_left_out(tmp_path: Path) -> None:
    row, matrix = draw_dispatch(np.random.default_rng(0))
    matrix = np.repeat(matrix[:1], 2, axis=0)
    matrix[1, E_ITL_EWMA_S] = -1.0  # its logarithm is none
    broken = lines(observation={"request": row.tolist(), "engines": matrix.tolist()})
    (tmp_path / "log.jsonl").write_text(lines() + broken + lines())
    found = read_transitions([tmp_path / "log.jsonl"], {"ttft_s": 1.0})
    assert len(found) == 2
    assert found.dropped == {"with features that are not finite": 1}


def test_only_dispatch_bundles_learn_from_these_logs(tmp_path: Path) -> None:
    other = bundle(tmp_path / "base", ADMISSION, "shortest")
    with pytest.raises(InputError, match="layer: got request; allowed: engine"):
        finetune(other, [], tmp_path / "out")
    with pytest.raises(InputError, match=r"objective: got .*; allowed: metrics of a decision log, not itl_s"):
        validate(FinetuneConfig, {"objective": {"itl_s": 1.0}}, "--set")


@pytest.mark.slow
def test_from_live_traffic(fake_cluster: Callable[..., ClusterFile], tmp_path: Path) -> None:
    """A gateway before two engines of which one is slow, under a bundle that does not know: the next one does."""
    base = bundle(tmp_path / "base")
    with (
        running_cluster(fake_cluster({"ttft_s": 0.01}, engines=1), tmp_path / "fast") as fast,
        running_cluster(fake_cluster({"ttft_s": 0.08}, engines=1), tmp_path / "slow") as slow,
        gateway_before(
            [fast.engines[0].url, slow.engines[0].url],
            tmp_path / "gateway",
            policy=str(base),
            epsilon=EPSILON,
            log_observations=True,
        ) as deployment,
    ):
        rng = np.random.default_rng(0)
        table = RequestTable.build(np.cumsum(rng.exponential(1 / 60, 900)), rng.integers(10, 200, 900), np.full(900, 4))
        config = ReplayConfig.model_validate({"workload": {"name": "fixed", "rate_rps": 1}})
        result = replay(table, (f"http://{deployment.listen}",), fast.model, config)
        assert not result.errors
    transitions = read_transitions([tmp_path / "gateway" / "decisions.jsonl"], {"ttft_s": 1.0})
    assert len(transitions) == 900
    assert np.isfinite(transitions.items).all()
    assert np.isfinite(transitions.context).all()
    assert np.isfinite(transitions.cost).all()
    assert set(np.round(transitions.propensity, 6)) == {0.15, 0.85}
    learned = finetune(base, [tmp_path / "gateway" / "decisions.jsonl"], tmp_path / "out")
    assert learned.proven
    assert learned.against_old.value < 0.95
