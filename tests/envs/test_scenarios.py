"""Episodes that are drawn from several scenarios."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from servegym.configuration import validate
from servegym.envs.engine_dispatch import EngineDispatchConfig, EngineDispatchEnv
from servegym.envs.scenarios import EpisodeSource
from servegym.errors import InputError

GROUP = {"profile": "qwen3-30b-a3b-h200"}
CONFIG: dict[str, Any] = {
    "cluster": {"engines": 2, "profile": "qwen3-30b-a3b-h200"},
    "scenarios": {
        "fixed": {"workload": {"name": "fixed"}},
        "unequal": {
            "workload": {"name": "azure-conv"},
            "cluster": {"groups": [GROUP | {"count": 3}, GROUP | {"count": 1, "slowdown": 2.0}]},
        },
    },
    "load": [0.5, 0.9],
    "episode_requests": 30,
}


def _config(**changes: Any) -> EngineDispatchConfig:
    return validate(EngineDispatchConfig, CONFIG | changes, "test")


def test_each_episode_is_of_one_scenario() -> None:
    source = EpisodeSource(_config())
    sizes, constant = [], []
    for seed in range(40):
        cluster, table, _ = source.draw(np.random.default_rng(seed))
        sizes.append(cluster.size)
        constant.append(len(np.unique(table.prompt_tokens)) == 1)
        assert len(table) == 30
    assert set(sizes) == {2, 4}
    assert constant == [size == 2 for size in sizes]
    assert 10 < sizes.count(2) < 30


def test_a_scenario_may_be_asked_for_and_say_how_many_requests_it_has() -> None:
    scenarios = {name: dict(scenario) for name, scenario in CONFIG["scenarios"].items()}
    scenarios["unequal"] = scenarios["unequal"] | {"workload": {"name": "azure-conv", "requests": 50}}
    source = EpisodeSource(_config(scenarios=scenarios))
    drawn = [source.draw(np.random.default_rng(7), scenario=k) for k in range(4)]
    assert [(cluster.size, len(table)) for cluster, table, _ in drawn] == [(2, 30), (4, 50)] * 2
    # What else is drawn does not depend on how the scenario was chosen.
    assert len({seed for _, _, seed in drawn}) == 1


def test_randomised_sizes_leave_groups_as_they_are() -> None:
    config = _config(randomise={"engines": [3, 5]})
    assert config.largest_cluster == 5
    sizes = {EpisodeSource(config).draw(np.random.default_rng(seed))[0].size for seed in range(30)}
    assert sizes == {3, 4, 5}


def test_groups_keep_their_proportions_where_a_size_allows_it() -> None:
    config = _config(randomise={"engines": [2, 3, 8]})
    counts = set()
    for seed in range(30):
        cluster, table, _ = EpisodeSource(config).draw(np.random.default_rng(seed), scenario=1)
        counts.add(tuple(group.count for group in cluster.groups))
        assert len(table) == 30
    assert counts == {(6, 2)}
    assert config.largest_cluster == 8


def test_requests_may_grow_with_the_engines() -> None:
    source = EpisodeSource(_config(randomise={"engines": [3, 8]}, requests_grow=True))
    drawn = [source.draw(np.random.default_rng(seed), scenario=seed) for seed in range(30)]
    assert {(cluster.size, len(table)) for cluster, table, _ in drawn} == {(3, 45), (8, 120), (8, 60)}


def test_the_environment_plays_them() -> None:
    env = EngineDispatchEnv(_config())
    seen = {env.reset(seed=seed)[1]["engines"] for seed in range(12)}
    assert seen == {2, 4}


def test_rewards_in_units_of_the_reference_are_the_relative_gain() -> None:
    config = CONFIG | {"reference": "least_requests", "reward": {"ttft": 1.0, "scale_s": "reference"}}
    env = EngineDispatchEnv(config)
    _, info = env.reset(seed=3)
    total, over, step = 0.0, False, 0
    while not over:
        _, reward, over, _, info = env.step(step % 2)
        total, step = total + float(reward), step + 1
    mine, reference = info["metrics"]["ttft_s"], info["reference_metrics"]["ttft_s"]
    assert total == pytest.approx(30 * (1 - mine / reference))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scenarios": {"x": {"workload": {"name": "fixed"}, "cluster": {"engins": 2}}}},
            "scenarios.x.cluster.*engins",
        ),
        ({"max_engines": 3}, "max_engines of at least 4"),
        ({"reward": {"scale_s": "reference"}}, "a reference policy with reward.scale_s: reference"),
        ({"reward": {"scale_s": 0}}, "scale_s"),
    ],
)
def test_bad_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _config(**changes)
