"""The state of a training run between two updates, complete enough to go on bit for bit.

The file holds tensors and plain data only and is read with ``weights_only=True``: opening a checkpoint runs no code.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from servegym.agents.training.episodes import EpisodeVecEnv
from servegym.errors import InputError

FORMAT = 2


def capture(model: Any, envs: EpisodeVecEnv, best_objective: float) -> dict[str, Any]:
    """Return the state of a model and its environments; later training does not change it.

    Args:
        model: a Stable-Baselines3 on-policy algorithm between two rollouts.
        envs: its environments.
        best_objective: of the evaluations so far; infinity before the first.
    """
    # Stable-Baselines3 shuffles its batches with numpy's global generator.
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    python_version, python_keys, python_gauss = random.getstate()
    return {
        "format": FORMAT,
        "steps": model.num_timesteps,
        "updates": model._n_updates,
        "best_objective": best_objective,
        "policy": {key: value.clone() for key, value in model.policy.state_dict().items()},
        "optimizer": copy.deepcopy(model.policy.optimizer.state_dict()),
        "torch_rng": torch.get_rng_state(),
        "numpy_rng": [name, [int(key) for key in keys], position, has_gauss, cached],
        "python_rng": [python_version, list(python_keys), python_gauss],
        "episodes": envs.positions(),
        "episode_starts": [bool(start) for start in model._last_episode_starts],
    }


def write(state: dict[str, Any], file: BinaryIO) -> None:
    """Write a state to an open file."""
    torch.save(state, file)


def read(path: Path) -> dict[str, Any]:
    """Read a state.

    Raises:
        InputError: not a checkpoint, damaged, or of another format.
    """
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:
        raise InputError(str(path), "", f"not a readable checkpoint: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(str(path), "format", f"allowed: {FORMAT}, that of this version of servegym")
    return state


def restore(model: Any, envs: EpisodeVecEnv, state: dict[str, Any], source: Path) -> None:
    """Bring a new model and new environments into a state.

    Raises:
        InputError: the state is that of another network, or an episode does not replay.
    """
    try:
        model.policy.load_state_dict(state["policy"])
        model.policy.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise InputError(
            str(source), "policy", f"does not fit the config: {' '.join(str(error).split())[:200]}"
        ) from None
    model.num_timesteps = state["steps"]
    model._n_updates = state["updates"]
    model._last_obs = envs.restore(state["episodes"])
    model._last_episode_starts = np.array(state["episode_starts"], dtype=bool)
    # Last, as the environments may draw from the global generators while they replay.
    name, keys, position, has_gauss, cached = state["numpy_rng"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    python_version, python_keys, python_gauss = state["python_rng"]
    random.setstate((python_version, tuple(python_keys), python_gauss))
    torch.set_rng_state(state["torch_rng"])
