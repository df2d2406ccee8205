"""The expert level as a Gymnasium environment: whether and how to place the experts anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, SupportsFloat

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from pydantic import Field

from servegym.baselines.interface import ExpertLoad, Placement
from servegym.baselines.placement_features import PLACEMENT_CONTEXT, PLACEMENT_FEATURES
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.envs.episode import EpisodeConfig, Observation, ServingEnv, feature_box
from servegym.envs.placement_menu import PlacementMenu
from servegym.envs.requests import WorkloadChoice
from servegym.envs.rewards import RewardConfig
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.simulator.experts.config import ExpertsConfig, Replacement
from servegym.envs.simulator.metrics import engine_metrics
from servegym.errors import InputError

MENU = tuple(PolicySpec(name=name) for name in ("eplb", "flashlb", "source_aware", "edr", "metro"))
CLUSTER = ClusterConfig(
    engines=4,
    profile="qwen3-30b-a3b-h200-ep4",
    mode="lockstep",
    experts=ExpertsConfig(replacement=Replacement(interval_steps=250, window_steps=250)),
)


class ExpertPlacementConfig(EpisodeConfig):
    """Arguments of :class:`ExpertPlacementEnv`."""

    cluster: ClusterConfig = Field(default=CLUSTER, description="with an expert model")
    workload: WorkloadChoice = Field(
        default=WorkloadChoice(name="azure-conv", load=0.7), description="the requests of an episode"
    )
    episode_requests: Annotated[int, Field(ge=1)] = Field(default=4000, description="requests of an episode")
    menu: tuple[PolicySpec, ...] = Field(default=MENU, min_length=1, description="rules to choose from, beside keeping")
    request_policy: PolicySpec = Field(default=PolicySpec(name="fcfs"), description="order of the waiting queues")
    engine_policy: PolicySpec = Field(default=PolicySpec(name="round_robin"), description="choice of engines")
    reference: PolicySpec | None = Field(
        default=None, description="expert policy whose integrals on the same requests are subtracted from the reward"
    )
    reward: RewardConfig = Field(default=RewardConfig(ttft=0.0, tpot=1.0), description="default: TPOT alone")


class _Given:
    """Proposes what is already known."""

    def __init__(self, wanted: Placement | None) -> None:
        self._wanted = wanted

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        return self._wanted


class ExpertPlacementEnv(ServingEnv[np.int64]):
    """Place the experts of a Mixture-of-Experts model anew, by one rule of a menu, or keep them.

    ## Description
    Engines with expert parallelism serve a stream of requests, whose tokens choose experts by task; the mix of tasks may
    drift. Every ``cluster.experts.replacement.interval_steps`` engine steps the agent sees what each rule of the menu
    would do with the load of the last window, and takes one or none. Moving experts costs time (bytes over links, and
    an overhead per layer), during which nothing else may be moved.

    ## Action Space
    `Discrete(1 + len(menu))`: 0 keeps the placement, ``i`` takes what rule ``i - 1`` of the menu proposes.
    `action_masks()` and `info["action_mask"]` exclude what would change nothing: rules that propose no change, and all
    but 0 while experts move. Such an action keeps the placement.

    ## Observation Space
    `Dict`:

    | key | shape | content |
    |---|---|---|
    | `candidates` | (1 + menu, features) float32 | `servegym.baselines.placement_features.PLACEMENT_FEATURES`: shares and ratios, 0 to about 10 |
    | `context` | (features,) float32 | `PLACEMENT_CONTEXT`: logarithms and shares, 0 to about 12 |
    | `mask` | (1 + menu,) int8 | 1 where the action would do something, and for 0 |

    Only what a live engine can report enters: counts per layer and expert in the window, per source rank where a rule
    needs them, and experts of adjacent layers for a sample of tokens.

    ## Rewards
    As in `EngineDispatch-v0`; by default TPOT alone, so that without a reference the undiscounted return is minus the
    summed TPOT of the episode's requests, in seconds.

    ## Starting State
    An empty cluster with the linear placement, run up to the first opportunity. `reset(seed=...)` draws the requests,
    their tasks, and the cluster where it is randomised. `options={"load": 0.9}` fixes the load.

    ## Episode End
    Terminated when all requests have finished; never truncated. The last `info` holds `metrics`: TTFT, TPOT, E2E in
    seconds, throughput, balancedness, re-placements; with a reference also `reference_metrics`.

    ## Arguments
    `config`: an :class:`ExpertPlacementConfig`, or a mapping with its fields.
    """  # noqa: E501 - tables cannot be wrapped

    config: ExpertPlacementConfig
    features = {"candidates": PLACEMENT_FEATURES, "context": PLACEMENT_CONTEXT}  # noqa: RUF012 - never written to
    _name = "ExpertPlacement-v0"
    _config_class = ExpertPlacementConfig

    def __init__(
        self, config: ExpertPlacementConfig | Mapping[str, Any] | None = None, *, render_mode: str | None = None
    ) -> None:
        super().__init__(config, render_mode=render_mode)
        config = self.config
        if config.cluster.experts is None:
            raise InputError(self._name, "cluster.experts", "missing; allowed: an expert model")
        self._policies = create("request", config.request_policy), create("engine", config.engine_policy)
        size = 1 + len(config.menu)
        self._mask = np.zeros(size, dtype=np.int8)
        self._mask[0] = 1
        self.action_space = spaces.Discrete(size)
        self.observation_space: spaces.Dict = spaces.Dict(  # type: ignore[assignment]
            {
                "candidates": feature_box(PLACEMENT_FEATURES, size),
                "context": feature_box(PLACEMENT_CONTEXT),
                "mask": spaces.Box(0, 1, (size,), np.int8),
            }
        )

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which actions are allowed, shape (1 + menu,)."""
        return self._mask.astype(np.bool_)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; see the class."""
        cluster, table, run_seed = self._draw_episode(seed, options)
        run = SimulatedCluster(cluster, table, *self._policies, seed=run_seed)
        paired: SimulatedCluster | None = None
        if self.config.reference is not None:
            expert = create("expert", self.config.reference)
            paired = SimulatedCluster(cluster, table, *self._policies, expert, seed=run_seed)
            paired.run()
        self._begin(run, paired)
        self._menus = [PlacementMenu(self.config.menu) for _ in run.replacers]
        self._group = run.next_placement()
        observation = self._observe()
        return observation, {"action_mask": self._mask.copy(), "seed": run_seed, "group": self._group or 0}

    def step(self, action: np.int64 | int) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Take an entry of the menu and run on to the next opportunity."""
        run = self._simulated()
        if not 0 <= action < len(self._mask):
            raise ValueError(f"got action {action}; allowed: 0 to {len(self._mask) - 1}")
        if self._group is not None:
            run.place(_Given(self._menus[self._group].candidates[int(action)]))
            self._group = run.next_placement()
        parts, info = self._rewards()
        observation = self._observe()
        info["action_mask"] = self._mask.copy()
        over = self._group is None
        if over:
            engines = engine_metrics(run)
            names = ("expert_balancedness", "replacements", "transfer_s")
            info |= self._final_metrics()
            info["metrics"] |= {name: engines[name] for name in names}
        else:
            info["group"] = self._group
        return observation, float(parts.sum()), over, False, info

    def _observe(self) -> Observation:
        run = self._simulated()
        self._mask = np.zeros(len(self._mask), dtype=np.int8)
        self._mask[0] = 1
        if self._group is None:
            return {
                "candidates": np.zeros((len(self._mask), len(PLACEMENT_FEATURES)), dtype=np.float32),
                "context": np.zeros(len(PLACEMENT_CONTEXT), dtype=np.float32),
                "mask": self._mask.copy(),
            }
        menu, replacer = self._menus[self._group], run.replacers[self._group]
        load = run.expert_load(self._group, menu)
        menu.propose(load, replacer.group.placement)
        if not replacer.busy:
            self._mask = np.array(menu.allowed(), dtype=np.int8)
        return {
            "candidates": menu.features.astype(np.float32),
            "context": menu.context.astype(np.float32),
            "mask": self._mask.copy(),
        }
