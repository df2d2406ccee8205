"""Tuning of a policy's weights by CMA-ES on whole episodes, which run inside the simulator's compiled kernel.

The weights of several layers may be tuned, in turn and then together, on the one cost of whole episodes. All candidates
of a generation meet the same episodes (common random numbers), and an episode's cost is relative to that
of the reference on the same requests. No gradient and no credit to assign: what counts is what an episode came to.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import cmaes
import numpy as np
import torch

from servegym.agents.execution import BackendConfig, open_executor
from servegym.agents.runs import RunFolder, write_json
from servegym.agents.training import checkpoint
from servegym.agents.training.best import BestPolicy
from servegym.agents.training.config import Phase, TrainConfig
from servegym.agents.training.episodes import FinishedEpisode
from servegym.agents.training.part import Part
from servegym.agents.training.play import Episodes, Games, Policies, Unit, play
from servegym.agents.training.progress import TrainingProgress
from servegym.agents.training.scalars import SEARCH, SearchScalars, open_writer
from servegym.agents.training.validation import objective, summarise
from servegym.baselines.interface import FloatArray
from servegym.engine_bridge.decisions import Level
from servegym.envs.episode import EpisodeConfig


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
        self._validation_env = config.validation_env()
        for env in (config.env, self._validation_env):
            Episodes(config.task.decisions.layer, env)  # so that a mistake in it is told at once
        torch.manual_seed(config.seed)
        self._parts = {layer: Part(config, layer) for layer in config.layers}
        self._phases = self._evolution.phases or (Phase(layers=(config.task.decisions.layer,)),)
        self._costs: list[list[float]] = []
        self._decisions: list[int] = []
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

    def run(self, run: RunFolder, resumed: bool, show: bool) -> None:
        """Search to the end of the budget; what it finds is in the run folder."""
        config, best_objective = self._config, math.inf
        if resumed:
            state = checkpoint.read(run.newest_checkpoint())
            best_objective = state["best_objective"]
            self._replay(state["costs"], state["decisions"])
            run.forget_after(self._steps)
            run.write_config(config.model_dump(mode="json"))
        best = BestPolicy(config, run, best_objective)
        with (
            open_executor(BackendConfig(workers=self._evolution.workers)) as self._executor,
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
        return self._steps // period > (self._steps - self._decisions[-1]) // period

    def _generation(self, scalars: SearchScalars) -> None:
        candidates = [self._optimizer.ask() for _ in range(self._optimizer.population_size)]
        units = [(self._seed(k), k) for k in range(self._evolution.episodes)]
        played = self._play(self._config.env, units, [self._policies(candidate) for candidate in candidates])
        costs = [self._cost(episodes) for episodes in played]
        self._told(candidates, costs, sum(episode.length for episodes in played for episode in episodes))
        scalars.generation(self._steps, candidates, costs)

    def _told(self, candidates: list[FloatArray], costs: list[float], decisions: int) -> None:
        """Tell the optimizer what its candidates cost in so many decisions; at the end of a phase, begin the next."""
        self._optimizer.tell(list(zip(candidates, costs, strict=True)))
        self._costs.append(list(costs))
        self._decisions.append(decisions)
        self._steps += decisions
        for part, vector in self._split(self._optimizer.mean).items():
            self._parts[part].vector = vector
        ends = [phase.steps for phase in self._phases[: self._phase + 1]]
        if ends[-1] is not None and self._steps >= sum(steps or 0 for steps in ends):
            self._enter(self._phase + 1)

    def _replay(self, costs: list[list[float]], decisions: list[int]) -> None:
        """Bring the optimizer to where it was: it asks the same questions and hears the same answers."""
        for row, count in zip(costs, decisions, strict=True):
            self._told([self._optimizer.ask() for _ in row], row, count)

    def _seed(self, episode: int) -> int:
        source = np.random.SeedSequence(self._config.seed, spawn_key=(len(self._costs), episode))
        return int(source.generate_state(1)[0])

    def _policies(self, vector: FloatArray) -> Policies:
        """Return the policies of all layers with these weights of the phase's."""
        vectors = {layer: part.vector for layer, part in self._parts.items()} | self._split(vector)
        return {layer: part.policy(vectors[layer]) for layer, part in self._parts.items()}

    def _play(
        self, env: EpisodeConfig, units: Sequence[Unit], candidates: Sequence[Policies]
    ) -> list[list[FinishedEpisode]]:
        """Play episodes with each candidate; returns, for each of them, the episodes in order."""
        games = Games(env, self._config.task.decisions.layer, candidates)
        played = dict(self._executor.run(play, games, units))
        return [list(episodes) for episodes in zip(*(played[unit] for unit in units), strict=True)]

    def _cost(self, episodes: Sequence[FinishedEpisode]) -> float:
        cost = objective(summarise(episodes), self._config.evaluation)
        return cost if math.isfinite(cost) else 1e9

    def _split(self, vector: FloatArray) -> dict[Level, FloatArray]:
        """Return the weights of each layer of the phase."""
        ends = np.cumsum([len(part.vector) for part in self._tuned])
        return {part.layer: piece for part, piece in zip(self._tuned, np.split(vector, ends[:-1]), strict=True)}

    def _evaluate(self, best: BestPolicy, shown: TrainingProgress, scalars: SearchScalars) -> None:
        settings = self._config.evaluation
        policies = {layer: part.settle(part.vector) for layer, part in self._parts.items()}
        units = [(settings.first_seed + k, k) for k in range(settings.episodes)]
        (episodes,) = self._play(self._validation_env, units, [policies])
        own, *others = self._parts.values()
        shares = [part.budget_share(part.vector) for part in self._parts.values() if part.layer == "request"]
        means = best.evaluated(
            own.actor, self._steps, episodes, {part.layer: part.actor for part in others}, next(iter(shares), None)
        )
        scalars.evaluation(self._steps, means, episodes)
        shown.say(f"{self._steps:,} steps: objective {means['objective']:.4f}, best {best.best_objective:.4f}")

    def _save(self, run: RunFolder, best: BestPolicy) -> None:
        state = {
            "format": checkpoint.FORMAT,
            "best_objective": best.best_objective,
            "costs": self._costs,
            "decisions": self._decisions,
        }
        run.add_checkpoint(self._steps, lambda file: checkpoint.write(state, file))
