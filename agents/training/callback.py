"""What happens between two updates: evaluation, bundles, checkpoints, scalars, progress."""

from __future__ import annotations

import math
import time
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from servegym.agents.networks import Actor
from servegym.agents.runs import RunFolder
from servegym.agents.training import checkpoint
from servegym.agents.training.best import BestPolicy
from servegym.agents.training.config import TrainConfig
from servegym.agents.training.episodes import EpisodeVecEnv, Observation
from servegym.agents.training.export import actor_weights
from servegym.agents.training.progress import TrainingProgress
from servegym.agents.training.scalars import reference_means
from servegym.agents.training.validation import run_episode, summarise
from servegym.engine_bridge.set_scorer import SetScorer


class TrainingCallback(BaseCallback):
    """Keeps a run folder up to date.

    Args:
        config: the resolved config.
        run: the folder.
        envs: the training environments.
        validation_env: the environment of the evaluations.
        progress: where progress is shown.
        best_objective: of earlier evaluations, when a run is resumed.
        resumed_at: steps of the checkpoint that the run was resumed from, -1 for a new run.

    Attributes:
        state: the run after the last update, ready to be written as a checkpoint.
        best: keeps the bundles.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        envs: EpisodeVecEnv,
        validation_env: gym.Env[Any, Any],
        progress: TrainingProgress,
        best_objective: float,
        resumed_at: int,
    ) -> None:
        super().__init__()
        self.state: dict[str, Any] | None = None
        self.best = BestPolicy(config, run, best_objective)
        self._config, self._run, self._envs, self._progress = config, run, envs, progress
        self._validation_env = validation_env
        self._resumed_at = resumed_at
        self._rollout_began = time.perf_counter()
        self._last_return: float | None = None
        self._last_ratio: float | None = None

    @property
    def actor(self) -> Actor:
        """The network that is trained."""
        return cast(Actor, self.model.policy.actor)

    def _on_rollout_start(self) -> None:
        self._check()
        fresh = self.num_timesteps != self._resumed_at  # a checkpoint comes after all else that belongs to its step
        if fresh and self._passed(self._config.evaluation.every_steps):
            self._evaluate()
        self.state = checkpoint.capture(self.model, self._envs, self.best.best_objective)
        if fresh and self._passed(self._config.checkpoint_every_steps):
            self.save()
        self._rollout_began = time.perf_counter()

    def _on_training_end(self) -> None:
        if self.num_timesteps == self._resumed_at:
            return
        self._check()
        self._evaluate()
        self.state = checkpoint.capture(self.model, self._envs, self.best.best_objective)
        self.save()
        self.logger.dump(self.num_timesteps)

    def _on_step(self) -> bool:
        return True

    def save(self) -> bool:
        """Write the state after the last update as a checkpoint; False if there is no state yet."""
        state = self.state
        if state is None:
            return False
        self._run.add_checkpoint(state["steps"], lambda file: checkpoint.write(state, file))
        return True

    def _passed(self, period: int) -> bool:
        """Whether the last rollout passed a multiple of ``period`` steps; true at the very start."""
        before = self.num_timesteps - self._config.rollout_steps
        return before < 0 or self.num_timesteps // period > before // period

    def _evaluate(self) -> None:
        settings = self._config.evaluation
        scorer = SetScorer(actor_weights(self.actor))
        seeds = range(settings.first_seed, settings.first_seed + settings.episodes)
        decisions = self.actor.decisions
        episodes = [run_episode(scorer, decisions, self._validation_env, seed) for seed in seeds]
        means = self.best.evaluated(self.actor, self.num_timesteps, episodes)
        figures = {f"evaluation/{name}": value for name, value in means.items()} | reference_means(episodes)
        for name, value in figures.items():
            self.logger.record(name, value)
        self._last_ratio = means.get("ttft_s_ratio", self._last_ratio)

    def _on_rollout_end(self) -> None:
        buffer = cast(OnPolicyAlgorithm, self.model).rollout_buffer
        slots = cast(spaces.Discrete, self.model.action_space).n
        share = np.bincount(buffer.actions.astype(np.int64).ravel(), minlength=int(slots)) / buffer.actions.size
        for place, part in enumerate(share):
            self.logger.record(f"policy/share_{self.actor.decisions.layer}_{place:02d}", float(part))
        self.logger.record("policy/entropy", self._entropy())
        self.logger.record("rollout/reward_per_step", float(buffer.rewards.mean()))
        rate = self._config.rollout_steps / (time.perf_counter() - self._rollout_began)
        self.logger.record("time/collect_steps_per_s", rate)
        finished = self._envs.take_finished()
        if finished:
            means = summarise(finished)
            for name, value in means.items():
                self.logger.record(f"rollout/{name}", value)
            self._last_return = means["return"]
        self._progress.trained(self.num_timesteps, self._last_return, self._last_ratio)

    def _check(self) -> None:
        """Raise FloatingPointError once an update has broken the network: its distribution is not checked elsewhere."""
        if not math.isfinite(entropy := self._entropy()):
            raise FloatingPointError(
                f"the policy's entropy after {self.num_timesteps} steps is {entropy}; a lower learning_rate may help"
            )

    @torch.no_grad()
    def _entropy(self) -> float:
        """Return the mean entropy of the actions' distributions at the environments' present observations, nats."""
        observation = cast(Observation, self.model._last_obs)
        inputs = {key: torch.as_tensor(values).float() for key, values in observation.items()}
        log_chance = torch.log_softmax(self.actor(*self.actor.observed(inputs)), dim=-1)
        return -float((log_chance.exp() * log_chance).sum(-1).mean())
