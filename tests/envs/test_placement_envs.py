"""The environments with an expert model: ExpertPlacement-v0 and MultiLayer-v0."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import yaml
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_sb3
from support import TOY

from servegym.envs.expert_placement import ExpertPlacementEnv
from servegym.envs.multi_layer import MultiLayerEnv
from servegym.errors import InputError

SHAPE = {"layers": 4, "experts": 16, "top_k": 2, "expert_us": 20.0, "expert_bytes": 1_000_000}
SHAPE |= {"token_bytes": 4096, "link_gb_s": 10, "link_latency_us": 5}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("profiles") / "experts.yaml"
    path.write_text(yaml.safe_dump(TOY | {"experts": SHAPE}))
    experts = {
        "routing": {"source": "power_law", "preset": "power_law_1.2", "tokens": 1024},
        "replacement": {"interval_steps": 100, "window_steps": 100, "layer_overhead_s": 0.001},
    }
    return {"engines": 4, "profile": str(path), "mode": "lockstep", "experts": experts}


@pytest.fixture
def config(cluster: dict[str, Any]) -> dict[str, Any]:
    return {"cluster": cluster, "workload": {"name": "fixed", "rate_rps": 40}, "episode_requests": 200}


def play(env: Any, choose: Any, seed: int = 0) -> tuple[float, int, dict[str, Any]]:
    observation, info = env.reset(seed=seed)
    total, steps, over = 0.0, 0, False
    while not over:
        assert env.observation_space.contains(observation)
        observation, reward, over, _, info = env.step(choose(observation, steps))
        total += float(reward)
        steps += 1
    return total, steps, info


class TestExpertPlacement:
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_checkers(self, config: dict[str, Any]) -> None:
        env = gymnasium.make("servegym/ExpertPlacement-v0", config=config)
        check_env(env.unwrapped, skip_render_check=True)
        check_sb3(env.unwrapped)

    def test_return_is_the_summed_tpot(self, config: dict[str, Any]) -> None:
        total, steps, info = play(ExpertPlacementEnv(config), lambda *_: 0)
        assert steps > 3
        assert -total / 200 == pytest.approx(info["metrics"]["tpot_s"], rel=1e-6)
        assert info["metrics"]["replacements"] == 0

    def test_balancing_pays(self, config: dict[str, Any]) -> None:
        kept, _, _ = play(ExpertPlacementEnv(config), lambda *_: 0)
        once, _, info = play(ExpertPlacementEnv(config), lambda observation, step: int(step == 0))
        assert info["metrics"]["replacements"] == 1
        assert once > kept

    def test_mask_and_features_agree(self, config: dict[str, Any]) -> None:
        def choose(observation: dict[str, Any], step: int) -> int:
            rows, mask = observation["candidates"], observation["mask"]
            assert mask[0] == 1
            assert rows[0, 0] == 1.0  # keep
            for row, allowed in zip(rows[1:], mask[1:], strict=True):
                if allowed:
                    assert row[0] == 0.0
            return int(mask.argmax()) if step % 2 else int(np.flatnonzero(mask)[-1])

        play(ExpertPlacementEnv(config), choose)

    def test_a_reference_is_what_the_return_is_relative_to(self, config: dict[str, Any]) -> None:
        total, _, info = play(ExpertPlacementEnv(config | {"reference": "linear"}), lambda *_: 0)
        assert total == pytest.approx(0.0, abs=1e-6)  # keeping is the linear placement
        assert info["reference_metrics"]["tpot_s"] == info["metrics"]["tpot_s"]

    def test_same_seed_same_episode(self, config: dict[str, Any]) -> None:
        first, second = (play(ExpertPlacementEnv(config), lambda *_: 1, seed=5)[0] for _ in range(2))
        assert first == second

    def test_bad_input(self, config: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=r"cluster\.experts: missing"):
            ExpertPlacementEnv({"cluster": {"engines": 2}})
        with pytest.raises(InputError, match="menu"):
            ExpertPlacementEnv(config | {"menu": []})
        env = ExpertPlacementEnv(config)
        env.reset(seed=0)
        with pytest.raises(ValueError, match="got action 9; allowed: 0 to 5"):
            env.step(9)


class TestMultiLayer:
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_checkers(self, config: dict[str, Any]) -> None:
        env = gymnasium.make("servegym/MultiLayer-v0", config=config)
        check_env(env.unwrapped, skip_render_check=True)
        check_sb3(env.unwrapped)

    def test_each_part_of_the_action_has_its_effect(self, config: dict[str, Any]) -> None:
        config = config | {"workload": {"name": "fixed", "rate_rps": 120}}
        plain, _, info = play(MultiLayerEnv(config), lambda _, step: np.array([step % 4, 0, 0]))
        env = MultiLayerEnv(config)
        placed, _, _ = play(env, lambda _, step: np.array([step % 4, 0, 1]))
        assert env._run is not None
        assert env._run.replacers[0].count >= 1
        assert placed != plain
        ordered, _, _ = play(MultiLayerEnv(config), lambda _, step: np.array([step % 4, step // 4 % 3, 0]))
        assert ordered != plain
        herded, _, info = play(MultiLayerEnv(config), lambda *_: np.array([0, 0, 0]))
        assert herded < plain
        assert info["metrics"]["engine_share"] == [1, 0, 0, 0]

    def test_mask_covers_all_parts(self, config: dict[str, Any]) -> None:
        env = MultiLayerEnv(config | {"max_engines": 6})
        observation, info = env.reset(seed=0)
        expected = [1, 1, 1, 1, 0, 0] + [1] * 3 + [1] * 6
        assert observation["mask"].tolist() == info["action_mask"].tolist() == expected
        with pytest.raises(ValueError, match="engine 5"):
            env.step(np.array([5, 0, 0]))
        with pytest.raises(ValueError, match="allowed: below"):
            env.step(np.array([0, 3, 0]))

    def test_the_last_opportunity_is_seen(self, config: dict[str, Any]) -> None:
        seen = []

        def choose(observation: dict[str, Any], step: int) -> Any:
            seen.append(observation["candidates"][1, 1])
            return np.array([step % 4, 0, 1])

        play(MultiLayerEnv(config), choose)
        assert seen[0] == 0
        assert max(seen) > 0
