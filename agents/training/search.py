"""Tuning of a policy's weights by CMA-ES on whole episodes, which run inside the simulator's compiled kernel.

The weights of several layers may be tuned, in turn and then together, on the one cost of whole episodes. All candidates
of a generation meet the same episodes (common random numbers), and an episode's cost is relative to that
of the reference on the same requests. No gradient and no credit to assign: what counts is what an episode came to.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cmaes
import numpy as np
import torch

from servegym.agents.networks import Actor
from servegym.agents.priors import PRIORS
from servegym.agents.runs import RunFolder, write_json
from servegym.agents.training import checkpoint
from servegym.agents.training.best import BestPolicy
from servegym.agents.training.config import Phase, TrainConfig
from servegym.agents.training.episodes import FinishedEpisode
from servegym.agents.training.export import actor_weights
from servegym.agents.training.progress import TrainingProgress
from servegym.agents.training.scalars import SEARCH, SearchScalars, open_writer
from servegym.agents.training.validation import objective, summarise
from servegym.baselines.features import Float32Array
from servegym.baselines.interface import FloatArray
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.engine_bridge.bundle import load_bundle
from servegym.engine_bridge.bundle_policy import LearnedPlacement
from servegym.engine_bridge.decisions import DECISIONS, Level
from servegym.engine_bridge.set_scorer import SetScorer, compiled_admission, compiled_dispatch
from servegym.envs.episode import EpisodeConfig, episode_metrics
from servegym.envs.scenarios import EpisodeSource
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.workloads.table import RequestTable
from servegym.errors import InputError

_LEAST_SHARE = 0.02


class Part:
    """The network of one layer, and the weights of it that are tuned.

    Args:
        config: of the run.
        layer: whose.

    Attributes:
        actor: the network, for bundles.
        vector: the tuned weights in one row; of the request level, behind them the logarithm of the share of the token
            budget over where it started, if that is tuned.
    """

    def __init__(self, config: TrainConfig, layer: Level) -> None:
        assert config.evolution is not None
        decisions = DECISIONS[layer]
        start = config.evolution.start_from.get(layer)
        self._share: float | None = None
        if start in PRIORS[layer]:
            self.actor = Actor(decisions, config.network.width)
            self.actor.start_from(start, config.network.prior_scale)
        elif start is not None:
            bundle = load_bundle(start)
            if bundle.manifest.layer != layer:
                raise InputError(
                    "config", f"evolution.start_from.{layer}", f"{start} is of the {bundle.manifest.layer} level"
                )
            self.actor = Actor(decisions, bundle.manifest.widths.hidden)
            self._load(dict(bundle.weights))
            self._share = bundle.manifest.budget_share
        else:
            own = layer == config.task.decisions.layer
            self.actor = Actor(decisions, config.network.width)
            self.actor.start_from(config.network.prior if own else "none", config.network.prior_scale)
        self.layer = layer
        self._first = actor_weights(self.actor)
        self._shapes = {
            name: array.shape
            for name, array in self._first.items()
            if config.evolution.tune == "network" or name == "prior.weight"
        }
        self.vector = np.concatenate([self._first[name].ravel() for name in self._shapes]).astype(np.float64)
        self._tunes_share = layer == "request" and config.evolution.budget_share is not None
        if self._tunes_share:
            self._share = config.evolution.budget_share
            self.vector = np.append(self.vector, 0.0)

    def budget_share(self, vector: FloatArray) -> float | None:
        """Return the share of an engine's token budget that a step may use."""
        if self._share is None or not self._tunes_share:
            return self._share
        return min(max(self._share * math.exp(vector[-1]), _LEAST_SHARE), 1.0)

    def policy(self, vector: FloatArray) -> Any:
        """Return the policy with these weights."""
        weights = self._weights(vector)
        if self.layer == "expert":
            return LearnedPlacement(SetScorer(weights))
        return Candidate(weights, self.layer, self.budget_share(vector))

    def settle(self, vector: FloatArray) -> Any:
        """Give the network these weights, and return the policy."""
        self._load(self._weights(vector))
        return self.policy(vector)

    def _weights(self, vector: FloatArray) -> dict[str, Float32Array]:
        found, at = dict(self._first), 0
        for name, shape in self._shapes.items():
            size = math.prod(shape)
            found[name] = vector[at : at + size].reshape(shape).astype(np.float32)
            at += size
        return found

    def _load(self, weights: Mapping[str, Float32Array]) -> None:
        with torch.no_grad():
            self.actor.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})


class Search:
    """A search over the weights of the networks of one or more layers.

    Args:
        config: with ``evolution``.

    Raises:
        InputError: a bundle to start from is not one, or of another layer.
    """

    def __init__(self, config: TrainConfig) -> None:
        assert config.evolution is not None
        self._config, self._evolution = config, config.evolution
        self._episodes = Episodes(config, config.env)
        self._validation = Episodes(config, config.validation_env())
        torch.manual_seed(config.seed)
        self._parts = {layer: Part(config, layer) for layer in config.layers}
        self._phases = self._evolution.phases or (Phase(layers=(config.task.decisions.layer,)),)
        self._costs: list[list[float]] = []
        self._steps = 0
        self._enter(0)

    def _enter(self, phase: int) -> None:
        """Begin a phase: a search of its own over the weights of its layers, from where they are."""
        self._phase = phase
        self._tuned = [self._parts[layer] for layer in self._phases[phase].layers]
        start = np.concatenate([part.vector for part in self._tuned])
        self._optimizer = cmaes.CMA(
            mean=start,
            sigma=self._evolution.sigma,
            seed=self._config.seed + phase,
            population_size=self._evolution.population,
        )

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
        with (
            open_writer(run.tensorboard, SEARCH, self._steps if resumed else None) as writer,
            TrainingProgress(config.total_steps, self._steps, show) as shown,
        ):
            scalars = SearchScalars(writer)
            try:
                if not resumed:
                    self._evaluate(best, shown, scalars)
                while self._steps < config.total_steps:
                    self._generation(scalars)
                    if self._passed(config.evaluation.every_steps) or self._steps >= config.total_steps:
                        self._evaluate(best, shown, scalars)
                    if self._passed(config.checkpoint_every_steps):
                        self._save(run, best)
                    shown.trained(self._steps, None, best.last_evaluation.get("ttft_s_ratio"))
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

    def _passed(self, period: int) -> bool:
        return self._steps // period > (self._steps - self._last) // period

    def _generation(self, scalars: SearchScalars) -> None:
        drawn = [self._episodes.draw(self._seed(k), k) for k in range(self._evolution.episodes)]
        candidates = [self._optimizer.ask() for _ in range(self._optimizer.population_size)]
        costs = [self._cost(drawn, candidate) for candidate in candidates]
        self._told(candidates, costs)
        scalars.generation(self._steps, candidates, costs)

    def _told(self, candidates: list[FloatArray], costs: list[float]) -> None:
        """Tell the optimizer what its candidates cost; at the end of a phase, begin the next."""
        self._optimizer.tell(list(zip(candidates, costs, strict=True)))
        self._costs.append(list(costs))
        self._last = self.generation_steps
        self._steps += self._last
        for part, vector in self._split(self._optimizer.mean).items():
            self._parts[part].vector = vector
        ends = [phase.steps for phase in self._phases[: self._phase + 1]]
        if ends[-1] is not None and self._steps >= sum(steps or 0 for steps in ends):
            self._enter(self._phase + 1)

    def _replay(self, costs: list[list[float]]) -> None:
        """Bring the optimizer to where it was: it asks the same questions and hears the same answers."""
        for row in costs:
            self._told([self._optimizer.ask() for _ in row], row)

    def _seed(self, episode: int) -> int:
        source = np.random.SeedSequence(self._config.seed, spawn_key=(len(self._costs), episode))
        return int(source.generate_state(1)[0])

    def _cost(self, drawn: list[Drawn], vector: FloatArray) -> float:
        vectors = {layer: part.vector for layer, part in self._parts.items()} | self._split(vector)
        policies = {layer: part.policy(vectors[layer]) for layer, part in self._parts.items()}
        means = summarise([self._episodes.play(one, policies) for one in drawn])
        cost = objective(means, self._config.evaluation)
        return cost if math.isfinite(cost) else 1e9

    def _split(self, vector: FloatArray) -> dict[Level, FloatArray]:
        """Return the weights of each layer of the phase."""
        ends = np.cumsum([len(part.vector) for part in self._tuned])
        return {part.layer: piece for part, piece in zip(self._tuned, np.split(vector, ends[:-1]), strict=True)}

    def _evaluate(self, best: BestPolicy, shown: TrainingProgress, scalars: SearchScalars) -> None:
        settings = self._config.evaluation
        policies = {layer: part.settle(part.vector) for layer, part in self._parts.items()}
        drawn = [self._validation.draw(settings.first_seed + k, k) for k in range(settings.episodes)]
        episodes = [self._validation.play(one, policies) for one in drawn]
        own, *others = self._parts.values()
        shares = [part.budget_share(part.vector) for part in self._parts.values() if part.layer == "request"]
        means = best.evaluated(
            own.actor, self._steps, episodes, {part.layer: part.actor for part in others}, next(iter(shares), None)
        )
        scalars.evaluation(self._steps, means, episodes)
        shown.say(f"{self._steps:,} steps: objective {means['objective']:.4f}, best {best.best_objective:.4f}")

    def _save(self, run: RunFolder, best: BestPolicy) -> None:
        state = {"format": checkpoint.FORMAT, "best_objective": best.best_objective, "costs": self._costs}
        run.add_checkpoint(self._steps, lambda file: checkpoint.write(state, file))


class Candidate:
    """A network as a policy that never leaves the kernel.

    Args:
        weights: of a :class:`~servegym.engine_bridge.set_scorer.SetScorer`.
        layer: engine or request.
        budget_share: of the request level.
    """

    def __init__(self, weights: dict[str, Float32Array], layer: str, budget_share: float | None = None) -> None:
        self.budget_share = budget_share
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
        self._layer: Level = config.task.decisions.layer
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
