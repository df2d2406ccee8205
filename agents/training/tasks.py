"""What can be trained: environments with the decisions that their agents make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym

from servegym.engine_bridge.decisions import ADMISSION, DISPATCH, PLACEMENT, Decisions
from servegym.envs.engine_dispatch import EngineDispatchConfig, EngineDispatchEnv
from servegym.envs.episode import EpisodeConfig
from servegym.envs.expert_placement import ExpertPlacementConfig, ExpertPlacementEnv
from servegym.envs.request_ordering import RequestOrderingConfig, RequestOrderingEnv

TaskName = Literal["EngineDispatch-v0", "RequestOrdering-v0", "ExpertPlacement-v0"]


@dataclass(frozen=True, slots=True)
class Task:
    """An environment that policies are trained in.

    Attributes:
        decisions: what an agent decides there.
        config: of the environment.
        make: makes the environment.
    """

    decisions: Decisions
    config: type[EpisodeConfig]
    make: Callable[[Any], gym.Env[Any, Any]]


TASKS: dict[TaskName, Task] = {
    "EngineDispatch-v0": Task(DISPATCH, EngineDispatchConfig, EngineDispatchEnv),
    "RequestOrdering-v0": Task(ADMISSION, RequestOrderingConfig, RequestOrderingEnv),
    "ExpertPlacement-v0": Task(PLACEMENT, ExpertPlacementConfig, ExpertPlacementEnv),
}
