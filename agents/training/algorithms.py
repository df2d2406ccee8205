"""Algorithms of Stable-Baselines3 and sb3-contrib by name, set up from a config."""

from __future__ import annotations

from typing import Any

from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO

from servegym.agents.networks import MaskableSetPolicy, SetPolicy
from servegym.agents.training.config import TrainConfig
from servegym.agents.training.discount import MaskableTimedRolloutBuffer, TimedRolloutBuffer
from servegym.agents.training.episodes import EpisodeVecEnv


class _WithoutMonitor:
    def _update_info_buffer(self, infos: Any, dones: Any = None) -> None:
        """Look for no episodes of ``Monitor`` in the infos: they are in ``EpisodeVecEnv.finished``."""


class _MaskablePPO(_WithoutMonitor, MaskablePPO):
    def collect_rollouts(self, env: Any, callback: Any, buffer: Any, steps: int, use_masking: bool = True) -> bool:
        """Collect without masks beside those of the observations, which the network heeds itself."""
        return super().collect_rollouts(env, callback, buffer, steps, use_masking=False)


class _PPO(_WithoutMonitor, PPO):
    pass


_ALGORITHMS: dict[str, tuple[type[Any], type[Any], type[Any]]] = {
    "MaskablePPO": (_MaskablePPO, MaskableSetPolicy, MaskableTimedRolloutBuffer),
    "PPO": (_PPO, SetPolicy, TimedRolloutBuffer),
}


def make_model(config: TrainConfig, envs: EpisodeVecEnv) -> Any:
    """Return the algorithm with a new network.

    Args:
        config: the run.
        envs: its environments.
    """
    settings, network = config.algorithm, config.network
    algorithm, policy, buffer = _ALGORITHMS[settings.name]
    rate = settings.learning_rate
    return algorithm(
        policy,
        envs,
        n_steps=settings.n_steps,
        batch_size=settings.batch_size,
        n_epochs=settings.n_epochs,
        learning_rate=rate if settings.learning_rate_schedule == "constant" else lambda left: rate * max(left, 0.0),
        clip_range=settings.clip_range,
        ent_coef=settings.ent_coef,
        vf_coef=settings.vf_coef,
        max_grad_norm=settings.max_grad_norm,
        target_kl=settings.target_kl,
        gamma=1.0,  # the buffer discounts per second
        gae_lambda=settings.gae_lambda,
        rollout_buffer_class=buffer,
        rollout_buffer_kwargs={
            "elapsed_s": envs.elapsed_s,
            "discount_rate_per_s": settings.discount_rate_per_s,
            "group": settings.paired_envs,
        },
        policy_kwargs=network.model_dump()
        | {"decisions": config.task.decisions, "entropy_bonus": settings.ent_coef > 0.0},
        seed=config.seed,
        device="cpu",  # networks this small are slower on a GPU
    )
