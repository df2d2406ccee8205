"""Environments that play the same episodes: an advantage counts from the mean of its group."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from servegym.agents.training import checkpoint
from servegym.agents.training.config import TrainConfig
from servegym.agents.training.discount import TimedRolloutBuffer
from servegym.agents.training.episodes import EpisodeVecEnv
from servegym.agents.training.trainer import train
from servegym.configuration import load_config, merged, validate
from servegym.errors import InputError


def newest(folder: Path) -> dict:
    return checkpoint.read(sorted((folder / "checkpoints").glob("*.pt"))[-1])


def test_paired_environments_play_the_same_episodes(make_toy) -> None:
    envs = EpisodeVecEnv(make_toy, 4, seed=0, group=2)
    requests = envs.reset()["request"]
    np.testing.assert_array_equal(requests[0], requests[1])
    np.testing.assert_array_equal(requests[2], requests[3])
    assert not np.array_equal(requests[0], requests[2])


def test_an_advantage_counts_from_the_mean_of_its_group() -> None:
    space = spaces.Dict({"engines": spaces.Box(-1, 1, (2, 3)), "mask": spaces.Box(0, 1, (2,), np.int8)})
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(3, 6)), rng.normal(size=(4, 6))
    buffers = []
    for group in (1, 3):
        buffer = TimedRolloutBuffer(
            3, space, spaces.Discrete(2), n_envs=6, elapsed_s=np.ones(6), discount_rate_per_s=0.1, group=group
        )
        for step in range(3):
            observation = {"engines": np.zeros((6, 2, 3)), "mask": np.ones((6, 2), dtype=np.int8)}
            value, log_prob = torch.tensor(values[step]), torch.zeros(6)
            buffer.add(observation, np.zeros((6, 1)), rewards[step], np.zeros(6), value, log_prob)
        buffer.compute_returns_and_advantage(torch.tensor(values[3]), np.zeros(6, dtype=bool))
        buffers.append(buffer)
    plain, grouped = buffers
    np.testing.assert_allclose(grouped.advantages.reshape(3, 2, 3).mean(-1), 0.0, atol=1e-6)
    expected = plain.advantages[:, :3] - plain.advantages[:, :3].mean(-1, keepdims=True)
    np.testing.assert_allclose(grouped.advantages[:, :3], expected, atol=1e-6)
    np.testing.assert_array_equal(grouped.returns, plain.returns)  # what the critic learns stays as it is


def test_a_paired_run_resumes_to_the_same_bits(make_config, make_toy, tmp_path: Path) -> None:
    config = make_config(algorithm={"paired_envs": 4})
    whole = train(config, out=tmp_path / "whole", progress=False, make_env=make_toy)
    cut = tmp_path / "cut"
    train(config, out=cut, progress=False, make_env=make_toy)
    for path in sorted((cut / "checkpoints").glob("*.pt"))[1:]:
        path.unlink()
    (cut / "done.json").unlink()
    train(None, resume=cut, progress=False, make_env=make_toy)
    for key, value in newest(whole.folder)["policy"].items():
        assert torch.equal(value, newest(cut)["policy"][key]), key


def test_groups_divide_the_environments(make_config) -> None:
    with pytest.raises(InputError, match="paired_envs"):
        make_config(algorithm={"paired_envs": 3})


def test_only_dispatch_has_a_decision_per_request() -> None:
    content = load_config(TrainConfig, "ordering_ppo", "train").model_dump(mode="json")
    with pytest.raises(InputError, match="paired_envs"):
        validate(TrainConfig, merged(content, {"algorithm": {"paired_envs": 2}}), "")
