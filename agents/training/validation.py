"""Evaluation during training: the most probable action on held-out seeds, through the runtime that is deployed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from servegym.agents.training.config import EvaluationConfig
from servegym.agents.training.episodes import FinishedEpisode
from servegym.baselines.heuristic import TURN, turns
from servegym.baselines.interface import pick
from servegym.engine_bridge.decisions import Decisions
from servegym.engine_bridge.set_scorer import SetScorer
from servegym.errors import InputError

# The metrics that are logged, where the environment has them.
METRICS = ("ttft_s", "ttft_p99_s", "tpot_s", "e2e_s", "throughput_rps")
EXCESS = 10.0


def run_episode(scorer: SetScorer, decisions: Decisions, env: gym.Env[Any, Any], seed: int) -> FinishedEpisode:
    """Play one episode greedily with a network.

    Args:
        scorer: the network without torch.
        decisions: what it decides.
        env: an environment with such decisions.
        seed: of the episode.
    """
    observation, _ = env.reset(seed=seed)
    items, context = decisions.observation
    reward, length, action = 0.0, 0, -1
    while True:
        eligible = observation["mask"] > 0
        logits = scorer.logits(observation[items][:, : len(decisions.items)], observation[context], eligible)
        # As bundles choose: of equal engines, the next one after the previous request's; of equal requests, the oldest.
        first = action + 1 if decisions.layer == "engine" else 0
        action = pick(TURN * turns(len(logits), first) - logits, eligible)
        observation, gained, terminated, truncated, info = env.step(action)
        reward += float(gained)
        length += 1
        if terminated or truncated:
            return FinishedEpisode(reward, length, info.get("metrics", {}), info.get("reference_metrics", {}))


def summarise(episodes: Sequence[FinishedEpisode]) -> dict[str, float]:
    """Return means over episodes: ``return``, each metric, and ``METRIC_ratio`` against the reference.

    A ratio is the geometric mean of the episodes' ratios, as in reports: an overloaded episode does not outweigh the
    others, nor does one in which the reference is far off.
    """
    means = {"return": float(np.mean([episode.reward for episode in episodes]))}
    for name in METRICS:
        if all(name in episode.metrics for episode in episodes):
            means[name] = float(np.mean([episode.metrics[name] for episode in episodes]))
        ratios = [ratio for episode in episodes if (ratio := _ratio(episode, name)) is not None]
        if len(ratios) == len(episodes):
            means[f"{name}_ratio"] = float(np.exp(np.mean(np.log(ratios))))
    return means


def objective(means: Mapping[str, float], settings: EvaluationConfig) -> float:
    """Return the weighted sum of ratios to the reference (of plain metrics without one); lower is better.

    A metric beyond its limit adds :data:`EXCESS` times what it is beyond.

    Raises:
        InputError: the environment reports no such metric.
    """
    total = sum(weight * _mean(means, name, "objective") for name, weight in settings.objective.items())
    excess = (max(0.0, _mean(means, name, "limits") - limit) for name, limit in settings.limits.items())
    return total + EXCESS * sum(excess)


def _mean(means: Mapping[str, float], name: str, field: str) -> float:
    value = means.get(f"{name}_ratio", means.get(name))
    if value is None:
        known = ", ".join(metric for metric in METRICS if metric in means)
        raise InputError("config", f"evaluation.{field}.{name}", f"not a metric of the environment; known: {known}")
    return value


def _ratio(episode: FinishedEpisode, name: str) -> float | None:
    mine, reference = episode.metrics.get(name), episode.reference_metrics.get(name)
    return None if not mine or not reference else float(mine) / float(reference)
