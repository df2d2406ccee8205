"""Environments that can be brought back to where they were, and discounting per second."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from servegym.agents.training.discount import TimedRolloutBuffer
from servegym.agents.training.episodes import EpisodeVecEnv
from servegym.errors import InputError


def play(envs: EpisodeVecEnv, steps: int, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Random allowed actions; returns what was observed and gained."""
    seen = []
    for _ in range(steps):
        masks = np.stack(envs.env_method("action_masks"))
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        observation, rewards, dones, _ = envs.step(actions)
        seen.append((observation["engines"].copy(), rewards, dones))
    return seen


def test_restored_environments_go_on_as_the_originals_did(make_toy) -> None:
    envs = EpisodeVecEnv(make_toy, 3, seed=7)
    envs.reset()
    play(envs, 100, np.random.default_rng(0))
    positions, observation = envs.positions(), {key: value.copy() for key, value in envs.buf_obs.items()}
    expected = play(envs, 80, np.random.default_rng(1))

    copy = EpisodeVecEnv(make_toy, 3, seed=7)
    restored = copy.restore(positions)
    for key, value in observation.items():
        np.testing.assert_array_equal(restored[key], value)
    for mine, theirs in zip(play(copy, 80, np.random.default_rng(1)), expected, strict=True):
        for part, other in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(part, other)


def test_episodes_differ_between_environments_episodes_and_seeds(make_toy) -> None:
    first = [EpisodeVecEnv(make_toy, 2, seed=seed) for seed in (0, 0, 1)]
    observations = [envs.reset()["request"] for envs in first]
    np.testing.assert_array_equal(observations[0], observations[1])
    assert not np.array_equal(observations[0], observations[2])
    assert not np.array_equal(observations[0][0], observations[0][1])
    play(first[0], 60, np.random.default_rng(0))
    assert not np.array_equal(first[0].buf_obs["request"], observations[0])


def test_finished_episodes_are_reported_with_their_metrics(make_toy) -> None:
    envs = EpisodeVecEnv(make_toy, 2, seed=0)
    envs.reset()
    rewards = sum(rewards for _, rewards, _ in play(envs, 60, np.random.default_rng(0)))
    finished = envs.take_finished()
    assert [episode.length for episode in finished] == [60, 60]
    np.testing.assert_allclose([episode.reward for episode in finished], rewards, rtol=1e-5)
    assert all(episode.metrics["ttft_s"] > 0 and episode.reference_metrics["ttft_s"] > 0 for episode in finished)
    assert envs.take_finished() == []


def test_an_episode_that_ends_early_does_not_replay(make_toy) -> None:
    with pytest.raises(InputError, match="does not replay"):
        EpisodeVecEnv(make_toy, 1, seed=0).restore([(0, [0] * 60)])


def test_advantages_discount_by_elapsed_time() -> None:
    space = spaces.Dict({"engines": spaces.Box(-1, 1, (2, 3)), "mask": spaces.Box(0, 1, (2,), np.int8)})
    elapsed = np.zeros(2)
    steps, rate, lam = 5, 0.3, 0.9
    buffer = TimedRolloutBuffer(
        steps, space, spaces.Discrete(2), gae_lambda=lam, n_envs=2, elapsed_s=elapsed, discount_rate_per_s=rate
    )
    rng = np.random.default_rng(0)
    seconds = rng.uniform(0, 3, (steps, 2))
    rewards, values = rng.normal(size=(steps, 2)), rng.normal(size=(steps + 1, 2))
    starts = np.zeros((steps + 1, 2))
    starts[3, 0] = 1.0  # environment 0 starts an episode at step 3
    starts[5, 1] = 1.0  # environment 1 at the very end
    for step in range(steps):
        elapsed[:] = seconds[step]
        observation = {"engines": np.zeros((2, 2, 3)), "mask": np.ones((2, 2), dtype=np.int8)}
        value, log_prob = torch.tensor(values[step]), torch.zeros(2)
        buffer.add(observation, np.zeros((2, 1)), rewards[step], starts[step], value, log_prob)
    buffer.compute_returns_and_advantage(torch.tensor(values[steps]), starts[steps].astype(bool))

    for env in range(2):
        for step in range(steps):
            expected, weight = 0.0, 1.0
            for later in range(step, steps):
                discount = np.exp(-rate * seconds[later, env]) * (1 - starts[later + 1, env])
                delta = rewards[later, env] + discount * values[later + 1, env] - values[later, env]
                expected += weight * delta
                weight *= discount * lam
            assert buffer.advantages[step, env] == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(buffer.returns, buffer.advantages + values[:steps], atol=1e-5)
