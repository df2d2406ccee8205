"""The expert level as a Gymnasium environment: whether and how to place the experts anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, SupportsFloat

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from pydantic import Field

from servegym.baselines.interface import ExpertLoad, Placement
from servegym.baselines.placement_features import PLACEMENT_CONTEXT, PLACEMENT_FEATURES
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.configuration import Config, validate
from servegym.envs.placement_menu import PlacementMenu
from servegym.envs.randomisation import ClusterRandomisation, Sampled, draw
from servegym.envs.rendering import RENDER_MODES, check_mode, render
from servegym.envs.requests import RequestSource, WorkloadChoice
from servegym.envs.rewards import PARTS, RewardConfig
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.simulator.experts.config import ExpertsConfig, Replacement
from servegym.envs.simulator.metrics import RunOutcome, engine_metrics
from servegym.errors import InputError

Count = Annotated[int, Field(ge=1)]
Observation = dict[str, npt.NDArray[Any]]

MENU = tuple(PolicySpec(name=name) for name in ("eplb", "flashlb", "source_aware", "edr", "metro"))
CLUSTER = ClusterConfig(
    engines=4,
    profile="qwen3-30b-a3b-h200-ep4",
    mode="lockstep",
    experts=ExpertsConfig(replacement=Replacement(interval_steps=250, window_steps=250)),
)


class ExpertPlacementConfig(Config):
    """Arguments of :class:`ExpertPlacementEnv`."""

    cluster: ClusterConfig = Field(default=CLUSTER, description="with an expert model")
    workload: WorkloadChoice = WorkloadChoice(name="azure-conv", load=0.7)
    randomise: ClusterRandomisation = ClusterRandomisation()
    load: Sampled | None = Field(default=None, description="load per episode, overrides the workload's")
    episode_requests: Count = Field(default=4000, description="requests of an episode")
    menu: tuple[PolicySpec, ...] = Field(default=MENU, min_length=1, description="rules to choose from, beside keeping")
    request_policy: PolicySpec = PolicySpec(name="fcfs")
    engine_policy: PolicySpec = PolicySpec(name="round_robin")
    reward: RewardConfig = Field(default=RewardConfig(ttft=0.0, tpot=1.0), description="default: TPOT alone")


class _Given:
    """Proposes what is already known."""

    def __init__(self, wanted: Placement | None) -> None:
        self._wanted = wanted

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        return self._wanted


class ExpertPlacementEnv(gym.Env[Observation, np.int64]):
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
    The negated integrals of :mod:`servegym.envs.rewards` since the last decision, weighted; by default the sum of TPOT,
    so that the undiscounted return is minus the summed TPOT of the episode's requests, in seconds.
    `info["elapsed_s"]` is the time that the step took, for discounting per second.

    ## Starting State
    An empty cluster with the linear placement, run up to the first opportunity. `reset(seed=...)` draws the requests,
    their tasks, and the cluster where it is randomised. `options={"load": 0.9}` fixes the load.

    ## Episode End
    Terminated when all requests have finished; never truncated. The last `info` holds `metrics`: TTFT, TPOT, E2E in
    seconds, throughput, balancedness, re-placements.

    ## Arguments
    `config`: an :class:`ExpertPlacementConfig`, or a mapping with its fields.
    """  # noqa: E501 - tables cannot be wrapped

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}  # noqa: RUF012 - Gymnasium declares it as an instance attribute

    def __init__(
        self, config: ExpertPlacementConfig | Mapping[str, Any] | None = None, *, render_mode: str | None = None
    ) -> None:
        check_mode("ExpertPlacement-v0", render_mode)
        if not isinstance(config, ExpertPlacementConfig):
            config = validate(ExpertPlacementConfig, config or {}, "ExpertPlacement-v0")
        if config.cluster.experts is None:
            raise InputError("ExpertPlacement-v0", "cluster.experts", "missing; allowed: an expert model")
        self.config = config
        self.render_mode = render_mode
        self._source = RequestSource(config.workload, config.cluster)
        self._policies = create("request", config.request_policy), create("engine", config.engine_policy)
        self._weights = config.reward.weights()
        self._run: SimulatedCluster | None = None
        size = 1 + len(config.menu)
        self._mask = np.zeros(size, dtype=np.int8)
        self._mask[0] = 1
        self.action_space = spaces.Discrete(size)
        self.observation_space: spaces.Dict = spaces.Dict(  # type: ignore[assignment]
            {
                "candidates": spaces.Box(-np.inf, np.inf, (size, len(PLACEMENT_FEATURES)), np.float32),
                "context": spaces.Box(-np.inf, np.inf, (len(PLACEMENT_CONTEXT),), np.float32),
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
        super().reset(seed=seed)
        config, rng = self.config, self.np_random
        run_seed = int(rng.integers(2**31))
        cluster = config.randomise.draw(config.cluster, rng)
        load = (options or {}).get("load")
        if load is None and config.load is not None:
            load = draw(config.load, rng)
        table = self._source.table(run_seed, load=load, requests=config.episode_requests, cluster=cluster)
        self._run = SimulatedCluster(cluster, table, *self._policies, seed=run_seed)
        self._menus = [PlacementMenu(config.menu) for _ in self._run.replacers]
        # What happens before the first decision enters the first reward, so that the return is the metric.
        self._totals, self._now_s = np.zeros(3), 0.0
        self._group = self._run.next_placement()
        observation = self._observe()
        return observation, {"action_mask": self._mask.copy(), "seed": run_seed, "group": self._group or 0}

    def step(self, action: np.int64 | int) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Take an entry of the menu and run on to the next opportunity."""
        run = self._run
        if run is None:
            raise RuntimeError("call reset() before step()")
        if not 0 <= action < len(self._mask):
            raise ValueError(f"got action {action}; allowed: 0 to {len(self._mask) - 1}")
        before = self._now_s
        if self._group is not None:
            run.place(_Given(self._menus[self._group].candidates[int(action)]))
            self._group = run.next_placement()
        parts = self._account()
        observation = self._observe()
        info: dict[str, Any] = {"elapsed_s": self._now_s - before, "action_mask": self._mask.copy()}
        info["reward_parts"] = dict(zip(PARTS, parts.tolist(), strict=True))
        over = self._group is None
        if over:
            info["metrics"] = _metrics(run)
        else:
            info["group"] = self._group
        return observation, float(parts.sum()), over, False, info

    def _account(self) -> npt.NDArray[np.float64]:
        """Return the weighted rewards since the last call, shape (3,), and move the clock on."""
        run = self._run
        assert run is not None
        gained = run.totals - self._totals
        self._totals = run.totals.copy()
        self._now_s = run.decided_s
        return np.asarray(-self._weights * gained)

    def _observe(self) -> Observation:
        run = self._run
        assert run is not None
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

    def render(self) -> str | npt.NDArray[np.uint8] | None:
        """Return queues, KV use and expert heat per engine: text, or a picture of shape (540, 960, 3)."""
        return render(self._run, self.render_mode)


def _metrics(run: SimulatedCluster) -> dict[str, Any]:
    metrics, engines = RunOutcome.of(run).metrics(), engine_metrics(run)
    found = {name: metrics[name]["mean"] for name in ("ttft_s", "tpot_s", "e2e_s")}
    found |= {"ttft_p99_s": metrics["ttft_s"]["p99"], "requests": metrics["requests"]}
    found["throughput_rps"] = metrics["throughput_rps"]
    return found | {name: engines[name] for name in ("expert_balancedness", "replacements", "transfer_s")}
