"""Tuning of a policy's weights by CMA-ES on whole episodes, which run inside the simulator's compiled kernel.

All candidates of a generation meet the same episodes (common random numbers), and an episode's cost is relative to that
of the reference on the same requests. No gradient and no credit to assign: what counts is what an episode came to.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import cmaes
import numpy as np
import torch

from servegym.agents.networks import Actor
from servegym.agents.runs import RunFolder, write_json
from servegym.agents.training import checkpoint
from servegym.agents.training.best import BestPolicy
from servegym.agents.training.config import TrainConfig
from servegym.agents.training.episodes import FinishedEpisode
from servegym.agents.training.export import actor_weights
from servegym.agents.training.progress import TrainingProgress
from servegym.agents.training.validation import objective, summarise
from servegym.baselines.features import Float32Array
from servegym.baselines.interface import FloatArray
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.engine_bridge.set_scorer import SetScorer, compiled_admission, compiled_dispatch
from servegym.envs.episode import EpisodeConfig, draw_episode, episode_metrics
from servegym.envs.requests import RequestSource
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.workloads.table import RequestTable


class Search:
    """A search over the weights of a network.

    Args:
        config: with ``evolution``.
    """

    def __init__(self, config: TrainConfig) -> None:
        assert config.evolution is not None
        self._config, self._evolution = config, config.evolution
        self._episodes = Episodes(config, config.env)
        self._validation = Episodes(config, config.validation_env())
        torch.manual_seed(config.seed)
        self._actor = Actor(config.task.decisions, config.network.width)
        self._actor.start_from(config.network.prior, config.network.prior_scale)
        weights = self._first = actor_weights(self._actor)
        self._shapes = {
            name: array.shape
            for name, array in weights.items()
            if self._evolution.tune == "network" or name == "prior.weight"
        }
        start = np.concatenate([weights[name].ravel() for name in self._shapes]).astype(np.float64)
        self._optimizer = cmaes.CMA(
            mean=start, sigma=self._evolution.sigma, seed=config.seed, population_size=self._evolution.population
        )
        self._costs: list[list[float]] = []

    @property
    def generation_steps(self) -> int:
        """Decisions of a generation, those of the reference apart."""
        requests = self._config.env.episode_requests
        return int(self._optimizer.population_size) * self._evolution.episodes * requests

    def run(self, run: RunFolder, resumed: bool, show: bool) -> None:
        """Search to the end of the budget; what it finds is in the run folder."""
        config, best_objective = self._config, math.inf
        if resumed:
            state = checkpoint.read(run.newest_checkpoint())
            best_objective = state["best_objective"]
            self._replay(state["costs"])
            run.forget_after(self._steps)
            run.write_config(config.model_dump(mode="json"))
        best = BestPolicy(config, run, best_objective)
        with TrainingProgress(config.total_steps, self._steps, show) as shown:
            try:
                if not resumed:
                    self._evaluate(best, shown)
                while self._steps < config.total_steps:
                    self._generation()
                    if self._passed(config.evaluation.every_steps) or self._steps >= config.total_steps:
                        self._evaluate(best, shown)
                    if self._passed(config.checkpoint_every_steps):
                        self._save(run, best)
                    shown.update(self._steps, None, best.last_evaluation.get("ttft_s_ratio"))
            except KeyboardInterrupt:
                self._save(run, best)
                print(f"interrupted; resume with: servegym train --resume {run.path}", file=sys.stderr, flush=True)
                raise
        self._save(run, best)
        outcome = {
            "steps": self._steps,
            "best_objective": best.best_objective,
            "evaluation": best.last_evaluation,
        }
        write_json(run.done, outcome)

    @property
    def _steps(self) -> int:
        return len(self._costs) * self.generation_steps

    def _passed(self, period: int) -> bool:
        return self._steps // period > (self._steps - self.generation_steps) // period

    def _generation(self) -> None:
        drawn = [self._episodes.draw(self._seed(k)) for k in range(self._evolution.episodes)]
        candidates = [self._optimizer.ask() for _ in range(self._optimizer.population_size)]
        costs = [self._cost(drawn, candidate) for candidate in candidates]
        self._optimizer.tell(list(zip(candidates, costs, strict=True)))
        self._costs.append(costs)

    def _replay(self, costs: list[list[float]]) -> None:
        """Bring the optimizer to where it was: it asks the same questions and hears the same answers."""
        for row in costs:
            self._optimizer.tell([(self._optimizer.ask(), cost) for cost in row])
        self._costs = [list(row) for row in costs]

    def _seed(self, episode: int) -> int:
        source = np.random.SeedSequence(self._config.seed, spawn_key=(len(self._costs), episode))
        return int(source.generate_state(1)[0])

    def _cost(self, drawn: list[Drawn], vector: FloatArray) -> float:
        policy = Candidate(self._weights(vector), self._config.task.decisions.layer)
        means = summarise([self._episodes.play(one, policy) for one in drawn])
        cost = objective(means, self._config.evaluation.objective)
        return cost if math.isfinite(cost) else 1e9

    def _weights(self, vector: FloatArray) -> dict[str, Float32Array]:
        found, at = dict(self._first), 0
        for name, shape in self._shapes.items():
            size = math.prod(shape)
            found[name] = vector[at : at + size].reshape(shape).astype(np.float32)
            at += size
        return found

    def _evaluate(self, best: BestPolicy, shown: TrainingProgress) -> None:
        settings = self._config.evaluation
        weights = self._weights(self._optimizer.mean)
        policy = Candidate(weights, self._config.task.decisions.layer)
        seeds = range(settings.first_seed, settings.first_seed + settings.episodes)
        episodes = [self._validation.play(self._validation.draw(seed), policy) for seed in seeds]
        with torch.no_grad():
            self._actor.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
        means = best.evaluated(self._actor, self._steps, episodes)
        shown.say(f"{self._steps:,} steps: objective {means['objective']:.4f}, best {best.best_objective:.4f}")

    def _save(self, run: RunFolder, best: BestPolicy) -> None:
        state = {"format": checkpoint.FORMAT, "best_objective": best.best_objective, "costs": self._costs}
        run.add_checkpoint(self._steps, lambda file: checkpoint.write(state, file))


class Candidate:
    """A network as a policy that never leaves the kernel.

    Args:
        weights: of a :class:`~servegym.engine_bridge.set_scorer.SetScorer`.
        layer: engine or request.
    """

    def __init__(self, weights: dict[str, Float32Array], layer: str) -> None:
        self._params = SetScorer(weights).packed()
        self.compiled = compiled_dispatch if layer == "engine" else compiled_admission

    def compiled_params(self) -> FloatArray:
        """Return what ``compiled`` reads."""
        return self._params


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
        config: of the run.
        env: arguments of the environment.
    """

    def __init__(self, config: TrainConfig, env: EpisodeConfig) -> None:
        self._layer, self._env = config.task.decisions.layer, env
        self._source = RequestSource(env.workload, env.cluster)
        self._reference: PolicySpec | None = getattr(env, "reference", None)

    def draw(self, seed: int) -> Drawn:
        """Draw an episode and let the reference play it."""
        cluster, table, run_seed = draw_episode(self._env, self._source, np.random.default_rng(seed))
        drawn = Drawn(cluster, table, run_seed, {})
        if self._reference is None:
            return drawn
        return Drawn(cluster, table, run_seed, self._metrics(drawn, create(self._layer, self._reference)))

    def play(self, drawn: Drawn, policy: Any) -> FinishedEpisode:
        """Play an episode with a policy of the layer."""
        metrics = self._metrics(drawn, policy)
        # What the environment's rewards would sum to, those parts apart that no metric tells.
        weights, reward = self._env.reward, 0.0
        for name, weight in (("ttft_s", weights.ttft), ("e2e_s", weights.e2e), ("tpot_s", weights.tpot)):
            reward += weight * (drawn.reference.get(name, 0.0) - metrics[name]) * len(drawn.table) / weights.scale_s
        return FinishedEpisode(reward, len(drawn.table), metrics, drawn.reference)

    def _metrics(self, drawn: Drawn, policy: Any) -> dict[str, Any]:
        env: Any = self._env
        expert = create("expert", env.expert_policy)
        if self._layer == "engine":
            policies = create("request", env.request_policy), policy, expert
        else:
            policies = policy, create("engine", env.engine_policy), expert
        run = SimulatedCluster(drawn.cluster, drawn.table, *policies, seed=drawn.seed)
        run.run()
        return episode_metrics(run)
