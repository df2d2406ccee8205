"""All three layers as one Gymnasium environment: engine, priority and placement at each arriving request."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, SupportsFloat

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from pydantic import Field

from servegym.baselines.interface import R_INDEX, ExpertPolicy
from servegym.baselines.placement_features import PLACEMENT_CONTEXT, PLACEMENT_FEATURES
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.envs.engine_dispatch import EngineDispatchConfig, EngineDispatchEnv
from servegym.envs.episode import Observation, feature_box
from servegym.envs.expert_placement import CLUSTER, MENU
from servegym.envs.placement_menu import PlacementMenu
from servegym.envs.simulator.config import ClusterConfig
from servegym.errors import InputError

if TYPE_CHECKING:
    from servegym.envs.live.placement import LivePlacement


class MultiLayerConfig(EngineDispatchConfig):
    """Arguments of :class:`MultiLayerEnv`; ``expert_policy`` is that of the reference."""

    cluster: ClusterConfig = Field(default=CLUSTER, description="with an expert model")
    request_policy: PolicySpec = Field(default=PolicySpec(name="priority"), description="must heed priorities")
    expert_policy: PolicySpec = Field(
        default=PolicySpec(name="eplb"), description="placement of the experts in the reference run"
    )
    priorities: Annotated[int, Field(ge=1, le=16)] = Field(default=3, description="priority classes; 0 goes first")
    menu: tuple[PolicySpec, ...] = Field(default=MENU, min_length=1, description="placement rules, beside keeping")


class MultiLayerEnv(EngineDispatchEnv):
    """Decide all three layers at each arriving request.

    ## Description
    As :class:`~servegym.envs.engine_dispatch.EngineDispatchEnv`, on a cluster with an expert model. The agent also gives
    the request its priority class, which orders the engines' waiting queues, and names the placement rule that is to be
    followed at the next opportunity for a re-placement (every ``replacement.interval_steps`` engine steps).

    With `backend: live` the engines are a cluster that was started with ``experts: true`` and that heeds priorities: by
    our scheduler, which then follows ``request_policy``, or by vLLM's ``scheduling-policy: priority``. An opportunity
    for a re-placement comes every ``live.replacement_s`` seconds; rules that need sources or co-activations, which live
    engines do not report, cannot be on the menu, nor replicas, which a live placement has none of.

    ## Action Space
    `MultiDiscrete([max_engines, priorities, 1 + menu])`: engine; priority class, 0 first; placement rule, 0 keeps.
    `action_masks()` and `info["action_mask"]` are those of the three parts one after the other; all classes and rules
    are always allowed, and an engine that is not allowed raises `ValueError`.

    ## Observation Space
    `Dict`:

    | key | shape | content |
    |---|---|---|
    | `engines` | (max_engines, features) float32 | `servegym.baselines.features.ENGINE_FEATURES`; zeros for absent engines |
    | `request` | (features,) float32 | `servegym.baselines.features.REQUEST_FEATURES` |
    | `candidates` | (1 + menu, features) float32 | `servegym.baselines.placement_features.PLACEMENT_FEATURES`, as of the last opportunity; zeros before the first |
    | `placement` | (features,) float32 | `PLACEMENT_CONTEXT`, as of the last opportunity |
    | `mask` | (max_engines + priorities + 1 + menu,) int8 | 1 where a part of the action is allowed |

    ## Rewards
    As in `EngineDispatch-v0`.

    ## Starting State
    An empty cluster with the linear placement.

    ## Episode End
    Terminated when all requests have finished; never truncated. `info["metrics"]` as in `EngineDispatch-v0`.

    ## Arguments
    `config`: a :class:`MultiLayerConfig`, or a mapping with its fields.
    """  # noqa: E501 - tables cannot be wrapped

    _name = "MultiLayer-v0"
    _lives = True
    _config_class = MultiLayerConfig
    config: MultiLayerConfig
    features = EngineDispatchEnv.features | {"candidates": PLACEMENT_FEATURES, "placement": PLACEMENT_CONTEXT}

    def __init__(
        self, config: MultiLayerConfig | Mapping[str, Any] | None = None, *, render_mode: str | None = None
    ) -> None:
        super().__init__(config, render_mode=render_mode)
        if self._target is not None:
            self._target.require_priorities(self.config.request_policy)
            _check_live_rules(self.config.menu)
        elif self.config.cluster.experts is None:
            raise InputError(self._name, "cluster.experts", "missing; allowed: an expert model")
        size = 1 + len(self.config.menu)
        self._menu = PlacementMenu(self.config.menu)
        self._expert_policy = self._menu
        parts = [self.max_engines, self.config.priorities, size]
        self.action_space: spaces.MultiDiscrete = spaces.MultiDiscrete(parts)  # type: ignore[assignment]
        self.observation_space = spaces.Dict(
            {
                "engines": self.observation_space["engines"],
                "request": self.observation_space["request"],
                "candidates": feature_box(PLACEMENT_FEATURES, size),
                "placement": feature_box(PLACEMENT_CONTEXT),
                "mask": spaces.Box(0, 1, (sum(parts),), np.int8),
            }
        )

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which parts of an action are allowed, shape (max_engines + priorities + 1 + menu,)."""
        return self._whole_mask().astype(np.bool_)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; see the class."""
        self._menu.chosen[0] = 0
        self._menu.reset(0)
        observation, info = super().reset(seed=seed, options=options)
        info["action_mask"] = self._whole_mask()
        return observation, info

    def step(self, action: Any) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Send the pending request to an engine, with a priority, and name the placement rule."""
        run = self._running()
        engine, priority, rule = (int(part) for part in action)
        if not self.action_space.contains(np.array([engine, priority, rule])):
            raise ValueError(f"got action {[engine, priority, rule]}; allowed: below {self.action_space.nvec.tolist()}")
        run.memory.requests["priority"][int(run.memory.request_row[R_INDEX])] = priority
        self._menu.chosen[0] = rule
        observation, reward, over, truncated, info = super().step(engine)
        info["action_mask"] = self._whole_mask()
        observation["mask"] = self._whole_mask()
        placement: LivePlacement | None = getattr(run, "placement", None)
        if over and placement is not None:
            info["metrics"] |= {"replacements": placement.replacements, "experts_moved": placement.moved}
        return observation, reward, over, truncated, info

    def _live_expert_policies(self) -> Sequence[ExpertPolicy]:
        return [copy.deepcopy(self._menu) for _ in range(self.most_engines)]

    def _whole_mask(self) -> npt.NDArray[np.int8]:
        rest = np.ones(self.config.priorities + 1 + len(self.config.menu), dtype=np.int8)
        return np.concatenate([self._mask, rest])

    def _observe(self) -> Observation:
        observation = super()._observe()
        # The groups' copies of the menu know what they saw last; of several groups the first stands for all.
        menu = self._running().expert_policies[0]
        assert isinstance(menu, PlacementMenu)
        observation["candidates"] = menu.features.astype(np.float32)
        observation["placement"] = menu.context.astype(np.float32)
        observation["mask"] = self._whole_mask()
        return observation


def _check_live_rules(menu: Sequence[PolicySpec]) -> None:
    """Raise InputError if a rule needs what live engines do not report."""
    for index, rule in enumerate(menu):
        policy = create("expert", rule)
        for need, what in (
            ("needs_sources", "counts by source rank"),
            ("needs_coactivation", "experts of adjacent layers"),
            ("needs_oracle", "the future"),
        ):
            if getattr(policy, need, False):
                raise InputError(
                    "MultiLayer-v0", f"menu.{index}", f"got {rule}, which needs {what}; live engines do not report that"
                )
