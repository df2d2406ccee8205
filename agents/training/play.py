"""Whole episodes, drawn as an environment draws them and played by policies that never leave the kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from servegym.agents.training.episodes import FinishedEpisode
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.engine_bridge.decisions import Level
from servegym.envs.episode import EpisodeConfig, episode_metrics
from servegym.envs.scenarios import EpisodeSource
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.workloads.table import RequestTable


@dataclass(frozen=True, slots=True)
class Drawn:
    """The cluster and the requests of an episode, and what the reference made of them."""

    cluster: ClusterConfig
    table: RequestTable
    seed: int
    reference: dict[str, Any]


class Episodes:
    """Draws episodes as the environment does, and plays them with a policy.

    Args:
        layer: of the environment.
        env: its arguments.
    """

    def __init__(self, layer: Level, env: EpisodeConfig) -> None:
        self._layer: Level = layer
        self._env = env
        self._source = EpisodeSource(env)
        self._reference: PolicySpec | None = getattr(env, "reference", None)

    def draw(self, seed: int, scenario: int) -> Drawn:
        """Draw an episode and let the reference play it.

        Args:
            seed: of the draw.
            scenario: which one, counted on beyond the last: each as often as the others.
        """
        cluster, table, run_seed = self._source.draw(np.random.default_rng(seed), scenario=scenario)
        drawn = Drawn(cluster, table, run_seed, {})
        if self._reference is None:
            return drawn
        reference = {self._layer: create(self._layer, self._reference)}
        return Drawn(cluster, table, run_seed, self._metrics(drawn, reference))

    def play(self, drawn: Drawn, policies: Mapping[Level, Any]) -> FinishedEpisode:
        """Play an episode with policies of some layers; the others follow the environment's."""
        metrics = self._metrics(drawn, policies)
        # What the environment's rewards would sum to, those parts apart that no metric tells.
        weights, reward = self._env.reward, 0.0
        per_s = len(drawn.table) / weights.scale(drawn.reference.get("ttft_s", math.nan))
        for name, weight in (("ttft_s", weights.ttft), ("e2e_s", weights.e2e), ("tpot_s", weights.tpot)):
            reward += weight * (drawn.reference.get(name, 0.0) - metrics[name]) * per_s
        return FinishedEpisode(reward, len(drawn.table), metrics, drawn.reference)

    def _metrics(self, drawn: Drawn, policies: Mapping[Level, Any]) -> dict[str, Any]:
        layers: tuple[Level, ...] = ("request", "engine", "expert")
        every: list[Any] = [
            policies[layer] if layer in policies else create(layer, getattr(self._env, f"{layer}_policy"))
            for layer in layers
        ]
        run = SimulatedCluster(drawn.cluster, drawn.table, *every, seed=drawn.seed)
        run.run()
        return episode_metrics(run)


Policies = Mapping[Level, Any]
Unit = tuple[int, int]
"""An episode: the seed of its draw, and its scenario as :meth:`Episodes.draw` counts them."""


@dataclass(frozen=True)
class Games:
    """What is played: by each of several candidates the same episodes.

    Attributes:
        env: arguments of the environment.
        layer: of the environment.
        candidates: the policies of each.
    """

    env: EpisodeConfig
    layer: Level
    candidates: Sequence[Policies]


def play(games: Games, unit: Unit) -> list[FinishedEpisode]:
    """Draw an episode and play it with each candidate; a unit of work of :mod:`servegym.agents.execution`."""
    key = games.layer + games.env.model_dump_json()
    if key not in _episodes:
        _episodes[key] = Episodes(games.layer, games.env)
    episodes = _episodes[key]
    drawn = episodes.draw(*unit)
    return [episodes.play(drawn, policies) for policies in games.candidates]


_episodes: dict[str, Episodes] = {}
