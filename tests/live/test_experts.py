"""Counting, recording and moving the experts of a real engine."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.baselines.interface import Placement
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.engine_bridge.cluster.checkpoint import EXPERTS, LAYERS, TOP_K
from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.cluster.launcher import LiveCluster, running_cluster
from servegym.engine_bridge.experts import LiveExperts
from servegym.engine_bridge.vllm_plugin.plugin import CPU_EXPERTS_VARIABLE
from servegym.envs.live.replay import ReplayConfig, replay
from servegym.envs.multi_layer import MultiLayerEnv
from servegym.envs.simulator.experts.routing.recorded import load_routing
from servegym.envs.workloads.table import RequestTable
from servegym.errors import EngineError, InputError

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
CONFIG = ReplayConfig.model_validate({"workload": {"name": "fixed", "rate_rps": 1}})


@pytest.fixture(scope="module")
def two_ranks(local_cluster: ClusterFile, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    """One engine on two ranks, tensor parallel outside the MoE layers and expert parallel inside."""
    changes: dict[str, Any] = {
        "engines": 1,
        "experts": True,
        "request_policy": PolicySpec(name="priority"),
        "arguments": local_cluster.arguments | {"tensor-parallel-size": 2, "enable-expert-parallel": True},
        # Two workers need processes of their own, whatever one engine on one rank prefers.
        "environment": {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1", CPU_EXPERTS_VARIABLE: "1"},
    }
    folder = tmp_path_factory.mktemp("two_ranks")
    with running_cluster(local_cluster.model_copy(update=changes), folder) as cluster:
        yield cluster


def answers(cluster: LiveCluster) -> tuple[list[str], list[dict[str, float]]]:
    """Greedy answers, and the log-probabilities of the likeliest first tokens."""
    texts, first = [], []
    for prompt in ("the first prompt", "another one, somewhat longer than the first"):
        body = {"model": cluster.model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        body |= {"logprobs": 5, "return_tokens_as_token_ids": True}
        request = urllib.request.Request(
            f"{cluster.engines[0].url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            choice = json.load(response)["choices"][0]
        texts.append(choice["text"])
        first.append(choice["logprobs"]["top_logprobs"][0])
    return texts, first


def test_counts_and_traces_are_those_of_the_tokens(two_ranks: LiveCluster, tmp_path: Path) -> None:
    experts = LiveExperts(two_ranks.engines[0].url)
    with pytest.raises(EngineError, match="nothing was counted; call servegym_start first"):
        LiveExperts(two_ranks.engines[0].url).load()
    assert experts.start(keep=True) == (LAYERS, EXPERTS)
    rng = np.random.default_rng(0)
    table = RequestTable.build(np.arange(20) * 0.01, rng.integers(20, 300, 20), rng.integers(2, 20, 20))
    assert not replay(table, (two_ranks.engines[0].url,), two_ranks.model, CONFIG).errors
    # The last token of each output is never fed back to the model.
    tokens = int((table.prompt_tokens + table.output_tokens - 1).sum())
    load = experts.load()
    assert load.tokens.shape == (LAYERS, EXPERTS)
    assert load.tokens.sum(axis=1).tolist() == [tokens * TOP_K] * LAYERS
    assert load.steps >= table.output_tokens.max() - 1
    assert len({tuple(layer) for layer in load.tokens}) == LAYERS  # each layer routes in its own way
    assert experts.save_trace(tmp_path / "routing.npz") == tokens
    bank = load_routing(tmp_path / "routing.npz")
    assert bank.expert_ids.shape == (tokens, LAYERS, TOP_K)
    lengths = np.diff(bank.sequence_start)
    assert sorted(lengths) == sorted(table.prompt_tokens + table.output_tokens - 1)
    for layer in range(LAYERS):
        counted = np.bincount(bank.expert_ids[:, layer].ravel(), minlength=EXPERTS)
        np.testing.assert_array_equal(counted, load.tokens[layer])
    with pytest.raises(EngineError, match="no tokens to write"):
        experts.save_trace(tmp_path / "nothing.npz")


def test_a_placement_is_applied_and_changes_answers_by_rounding_only(two_ranks: LiveCluster) -> None:
    experts = LiveExperts(two_ranks.engines[0].url)
    experts.start()
    (texts, first), at_first = answers(two_ranks), experts.placement()
    load = experts.load()
    wanted = create("expert", "eplb").place(load, at_first)
    assert wanted is not None
    moved = experts.place(wanted)
    assert sum(moved) > 0
    now = experts.placement()
    for layer in range(LAYERS):
        for rank in range(2):
            slots = slice(rank * EXPERTS // 2, (rank + 1) * EXPERTS // 2)
            assert set(now.physical_to_logical[layer, slots]) == set(wanted.physical_to_logical[layer, slots])
    # Sums over ranks now round in another order, which a random model's later tokens may not survive.
    for before, after in zip(first, answers(two_ranks)[1], strict=True):
        common = before.keys() & after.keys()
        assert len(common) >= 4
        assert all(after[token] == pytest.approx(before[token], abs=0.05) for token in common)
    assert experts.place(wanted) == [0] * LAYERS
    assert sum(experts.place(at_first)) == sum(moved)
    assert answers(two_ranks)[0] == texts
    with pytest.raises(InputError, match="has replicas; allowed: each expert once"):
        experts.place(Placement(np.zeros((LAYERS, EXPERTS), dtype=np.int64), 2))


def test_an_agent_decides_all_three_layers(two_ranks: LiveCluster) -> None:
    """Every request with a priority of its own, and experts that move while tokens flow."""
    live = {"cluster": str(two_ranks.folder), "output_scale": 0.1, "prompt_scale": 0.3, "replacement_s": 0.5}
    env = MultiLayerEnv(
        {
            "backend": "live",
            "live": live,
            "workload": {"name": "azure-conv", "rate_rps": 15},
            "episode_requests": 60,
            "menu": ["eplb"],
        }
    )
    observation, _ = env.reset(seed=0)
    over, step, seen = False, 0, 0
    while not over:
        seen += np.count_nonzero(observation["candidates"])
        assert env.observation_space.contains(observation)
        observation, _, over, _, info = env.step([0, step % 3, 1])
        step += 1
    assert step == 60
    assert info["metrics"]["requests"] == 60
    assert info["metrics"]["replacements"] >= 1
    assert info["metrics"]["experts_moved"] >= 1
    assert seen > 0
    env.close()


def test_an_engine_without_the_extension_says_so(one_engine: LiveCluster) -> None:
    with pytest.raises(EngineError, match="takes no calls; its cluster file needs experts: true"):
        LiveExperts(one_engine.engines[0].url).start()
