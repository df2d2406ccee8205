"""Configuration of a training run. Loads neither torch nor Stable-Baselines3."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from servegym.agents.execution import BackendConfig
from servegym.agents.priors import PRIORS, Prior
from servegym.agents.training.tasks import TASKS, Task, TaskName
from servegym.configuration import Config, merged, validate
from servegym.engine_bridge.decisions import DECISIONS, Level
from servegym.envs.episode import EpisodeConfig

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class AlgorithmConfig(Config):
    """PPO, plain or with invalid-action masking, from Stable-Baselines3 and sb3-contrib.

    The sizes are chosen for an environment of some ten microseconds a step: many environments and large batches learn
    ten times as many steps per second as the libraries' defaults.
    """

    name: Literal["MaskablePPO", "PPO"] = "MaskablePPO"
    n_envs: Count = Field(default=64, description="environments that are stepped together, in one process")
    n_steps: Count = Field(default=128, description="steps of each environment between updates")
    batch_size: Count = Field(default=1024, description="minibatch of an update")
    n_epochs: Count = Field(default=4, description="passes over the collected steps")
    learning_rate: Positive = 1e-3
    learning_rate_schedule: Literal["constant", "linear"] = Field(
        default="linear", description="linear: falls to zero at the last step"
    )
    clip_range: Positive = 0.2
    ent_coef: NonNegative = Field(default=0.0, description="weight of the entropy bonus")
    vf_coef: NonNegative = Field(default=0.5, description="weight of the value error")
    max_grad_norm: Positive = 0.5
    gae_lambda: Fraction = Field(default=0.95, description="decay of the advantage's traces, per decision")
    discount_rate_per_s: NonNegative = Field(
        default=0.1,
        description=(
            "rewards are discounted by exp(-rate * seconds): decisions come at random intervals, so that a discount per"
            " step would mean another horizon at each load; 0 for none"
        ),
    )
    paired_envs: Count = Field(
        default=1,
        description=(
            "environments that play the same episodes; with more than one, an advantage counts from the mean of its"
            " group at the same decision, so that luck with the arrivals is not taken for merit"
        ),
    )
    target_kl: Positive | None = Field(default=0.03, description="ends an update's passes at 1.5 times this divergence")

    @field_validator("batch_size")
    @classmethod
    def _batches_are_equal(cls, size: int, info: ValidationInfo) -> int:
        collected = info.data.get("n_envs", size) * info.data.get("n_steps", 1)
        if collected % size:
            raise ValueError(f"a divisor of n_envs * n_steps = {collected}")
        return size

    @model_validator(mode="after")
    def _groups_are_equal(self) -> Self:
        if self.n_envs % self.paired_envs:
            raise ValueError(f"paired_envs: a divisor of n_envs = {self.n_envs}")
        return self


class Phase(Config):
    """A part of a search: the layers whose weights it tunes together; those of the others stay."""

    layers: tuple[Level, ...] = Field(min_length=1)
    steps: Count | None = Field(default=None, description="decisions; default: to the end, for the last phase only")


class EvolutionConfig(Config):
    """CMA-ES over the weights of the network, on whole episodes.

    Several layers may be tuned: in turn, then together, on one cost.
    """

    tune: Literal["linear", "gated", "network"] = Field(
        default="linear",
        description=(
            "linear: the weights of the features alone, without hidden layers; gated: and how they change with the"
            " context; network: all weights"
        ),
    )
    gate: tuple[str, ...] = Field(
        default=(), description="features of the context by which weights change, with tune: gated; default: all"
    )
    episodes: Count = Field(default=8, description="of a generation, the same ones for all candidates")
    population: Annotated[int, Field(ge=4)] | None = Field(
        default=None, description="candidates of a generation; default: 4 + 3 ln(weights)"
    )
    sigma: Positive = Field(default=0.5, description="first standard deviation of the weights")
    workers: Annotated[int, Field(ge=1)] = Field(
        default=1, description="processes that play episodes; the result does not depend on it"
    )
    phases: tuple[Phase, ...] = Field(
        default=(), description="one after the other; default: the environment's own layer throughout"
    )
    start_from: dict[Level, str] = Field(
        default_factory=dict,
        description=(
            "bundles from whose weights layers start, such as engine: servegym/dispatch, or heuristics of"
            " servegym.agents.priors, such as request: aged"
        ),
    )

    budget_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description=(
            "share of the engines' token budget from which the request level's search starts; default: the one that it"
            " starts from stays, which is all where there is none"
        ),
    )

    @model_validator(mode="after")
    def _gate_is_used(self) -> Self:
        if self.gate and self.tune != "gated":
            raise ValueError("gate only with tune: gated")
        return self

    @model_validator(mode="after")
    def _phases_end(self) -> Self:
        open_ended = [phase.steps is None for phase in self.phases]
        if any(open_ended[:-1]) or not all(open_ended[-1:]):
            raise ValueError("steps in all phases but the last")
        return self


class NetworkConfig(Config):
    """The set network of :mod:`servegym.agents.networks`."""

    width: Count = Field(default=32, description="units of each hidden layer")
    prior: Prior = Field(default="lmetric", description="the heuristic that the untrained policy is a softmax of")
    prior_scale: Positive = Field(
        default=4.0,
        description="inverse temperature of that softmax: larger explores less, starts closer to the heuristic",
    )


class EvaluationConfig(Config):
    """Evaluations during training, with the most probable action, on seeds that training never draws."""

    every_steps: Count = 100_000
    episodes: Count = Field(default=8, description="held-out seeds: the same in every evaluation")
    first_seed: Annotated[int, Field(ge=0)] = Field(
        default=10_000, description="reports use small seeds; a policy must not be chosen on those it is judged on"
    )
    env: dict[str, Any] = Field(default_factory=dict, description="changes to `env` for evaluations, key by key")
    objective: dict[str, float] = Field(
        default_factory=lambda: {"ttft_s": 1.0, "tpot_s": 1.0},
        description=(
            "the best policy has the lowest sum of weight * metric / reference metric, averaged over the seeds (plain"
            " metrics where the environment names no reference)"
        ),
    )
    limits: dict[str, Positive] = Field(
        default_factory=dict,
        description=(
            "the highest ratio to the reference that a metric may have (plain metrics where the environment names no"
            " reference); what is beyond it adds to the objective ten times over"
        ),
    )


class TrainConfig(Config):
    """One training run: same config, same result, bit for bit on one machine."""

    name: str = Field(pattern=r"^[\w.-]+$", description="of the run; its folder is runs/NAME/TIMESTAMP")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    total_steps: Count = Field(description="decisions; rounded up to whole rollouts of n_envs * n_steps")
    checkpoint_every_steps: Count = 250_000
    torch_threads: Count = Field(
        default=1, description="more rarely helps networks this small, and hurts on shared cores"
    )
    algorithm: AlgorithmConfig = AlgorithmConfig()
    evolution: EvolutionConfig | None = Field(default=None, description="CMA-ES, in place of `algorithm`")
    network: NetworkConfig = NetworkConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    environment: TaskName = Field(default="EngineDispatch-v0", description="what is trained")
    env: SerializeAsAny[EpisodeConfig] = Field(
        default=cast(EpisodeConfig, {}), description="arguments of that environment"
    )

    backend: BackendConfig = Field(default=BackendConfig(), exclude=True, description="where the runs of seeds run")

    @field_validator("env", mode="before")
    @classmethod
    def _is_of_the_environment(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = TASKS[info.data["environment"]].config if "environment" in info.data else EpisodeConfig
        return validate(wanted, value, "") if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        own = PRIORS[self.task.decisions.layer]
        if self.network.prior not in own:
            raise ValueError(f"a network.prior for {self.environment}, not {self.network.prior}: {', '.join(own)}")
        if self.evolution is not None and self.env.backend == "live":
            raise ValueError("evolution in the simulator")
        if self.evolution is None and self.task.decisions.layer == "expert":
            raise ValueError("evolution for ExpertPlacement-v0, whose actions are a menu")
        for layer in self.layers:
            if layer not in (self.task.decisions.layer, "expert", *self.evolution_starts):
                known = ", ".join(PRIORS[layer])
                raise ValueError(
                    f"evolution.start_from.{layer}, a bundle or one of {known}: the network's prior is of another layer"
                )
        if self.evolution is not None and self.evolution.budget_share is not None and "request" not in self.layers:
            raise ValueError("evolution.budget_share only where the request level is trained")
        for layer in self.layers:
            for name in () if self.evolution is None else self.evolution.gate:
                if name not in DECISIONS[layer].context_names:
                    raise ValueError(f"evolution.gate: features of the {layer} level's context, not {name}")
        if self.algorithm.paired_envs > 1 and self.environment != "EngineDispatch-v0":
            raise ValueError("algorithm.paired_envs with EngineDispatch-v0, whose episodes have a decision per request")
        self.validation_env()
        return self

    @property
    def layers(self) -> tuple[Level, ...]:
        """The layers with a learned policy; the environment's own first."""
        found: dict[Level, None] = {self.task.decisions.layer: None}
        for phase in self.evolution.phases if self.evolution is not None else ():
            found.update(dict.fromkeys(phase.layers))
        return tuple(found)

    @property
    def evolution_starts(self) -> dict[Level, str]:
        """Bundles or heuristics from which layers start."""
        return {} if self.evolution is None else self.evolution.start_from

    @property
    def task(self) -> Task:
        """The environment and its decisions."""
        return TASKS[self.environment]

    def validation_env(self) -> EpisodeConfig:
        """Return the environment of the evaluations: ``env`` with the changes of ``evaluation.env``.

        Raises:
            InputError: the changes are not valid.
        """
        changed = merged(self.env.model_dump(mode="json"), self.evaluation.env)
        return validate(self.task.config, changed, "evaluation.env")

    @property
    def rollout_steps(self) -> int:
        """Decisions between two updates."""
        return self.algorithm.n_envs * self.algorithm.n_steps

    def identity(self) -> dict[str, Any]:
        """Return all values that make a difference to the result, as plain data."""
        return self.model_dump(mode="json", exclude={"evolution": {"workers"}})

    def sha256(self) -> str:
        """Return the hash of all values that make a difference, which identifies the config in bundles."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
