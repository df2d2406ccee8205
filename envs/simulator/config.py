"""Configuration of a simulated cluster."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from servegym.baselines.prefix_index import PrefixIndexConfig
from servegym.configuration import Config, validate
from servegym.envs.profiles.profile import EngineLimits, Profile, StepFactors, load_profile
from servegym.envs.simulator.experts.config import ExpertsConfig

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class Telemetry(Config):
    """How engines report: a snapshot every ``period_s`` reaches the router ``lag_s`` later.

    Period 0 means always fresh.
    """

    period_s: NonNegative = Field(default=0.1, description="vLLM's coordinator publishes at most every 100 ms")
    lag_s: NonNegative = Field(default=0.0, description="delay from the engine to the router")

    @model_validator(mode="after")
    def _lag_needs_period(self) -> Self:
        if self.lag_s > 0 and self.period_s == 0:
            raise ValueError("lag_s > 0 only with period_s > 0")
        return self


class RouterConfig(Config):
    """What the router remembers of the requests that it has sent."""

    prefix_index: PrefixIndexConfig | None = Field(
        default=PrefixIndexConfig(),
        description="approximate index of the engines' prefix caches; none: no hits",
    )
    prefix_key_blocks: Annotated[int, Field(ge=1)] = Field(
        default=4, description="leading blocks of the index whose hash is a request's prefix key"
    )


class Fault(Config):
    """A change of one engine at a point in time."""

    at_s: NonNegative = Field(description="time from the start of the run, seconds")
    engine: Annotated[int, Field(ge=0)] = Field(description="number of the engine, from 0")
    kind: Literal["die", "recover", "hang", "resume", "slow", "mute", "unmute", "leave", "join"] = Field(
        description=(
            "die: lose all requests, which are dispatched again; recover: come back empty; hang/resume: stop and go on"
            " in the middle of a step; slow: multiply step times by factor from the next step; mute/unmute: telemetry"
            " stops and resumes; leave: drain and take no new requests; join: take requests again"
        )
    )
    factor: Positive = Field(default=1.0, description="for kind slow: 2 doubles each step's duration")


class RandomFault(Config):
    """Faults that befall each engine again and again, after times and for times that are exponentially distributed.

    An engine has one random fault at a time; one that would leave too few engines does not happen.
    """

    kind: Literal["die", "hang", "slow", "mute", "leave"] = Field(
        description="as in faults; ends by recover, resume, the old speed, unmute or join (leave/join: autoscaling)"
    )
    mean_between_s: Positive = Field(description="mean time of an engine from the end of a fault to the next, seconds")
    mean_duration_s: Positive = Field(description="mean duration, seconds")
    factor: tuple[Positive, Positive] = Field(
        default=(2.0, 2.0), description="for kind slow: range of the factor on step times, drawn uniformly"
    )
    min_alive: Annotated[int, Field(ge=0)] = Field(
        default=1, description="for die, hang and leave: engines that keep serving"
    )

    @model_validator(mode="after")
    def _range_is_ordered(self) -> Self:
        if self.factor[0] > self.factor[1]:
            raise ValueError("factor: smallest first")
        return self


class EngineGroup(Config):
    """Engines of one kind."""

    count: Annotated[int, Field(ge=1)] = Field(default=1, description="number of engines")
    profile: str = Field(description="their step times and limits: a shipped profile, or a file")
    engine: dict[str, Any] = Field(default_factory=dict, description="overrides of the profile's engine limits")
    slowdown: Positive = Field(default=1.0, description="factor on step times")
    step_factors: StepFactors = Field(default=StepFactors(), description="factors on the terms of the step time")


class ClusterConfig(Config):
    """A cluster: either ``engines`` equal ones of one ``profile``, or ``groups`` of different ones."""

    engines: Annotated[int, Field(ge=1)] = Field(default=4, description="number of engines, where there are no groups")
    profile: str = Field(
        default="qwen3-30b-a3b-h200", description="their step times and limits: a shipped profile, or a file"
    )
    engine: dict[str, Any] = Field(default_factory=dict, description="overrides of the profile's engine limits")
    step_factors: StepFactors = Field(default=StepFactors(), description="factors on the terms of the step time")
    groups: tuple[EngineGroup, ...] = Field(
        default=(), description="different kinds of engines, in place of engines, profile and engine"
    )
    mode: Literal["independent", "lockstep"] = Field(
        default="independent",
        description="lockstep: data parallel + expert parallel, all ranks take each step together",
    )
    moe_imbalance: Annotated[float, Field(ge=1)] | None = Field(
        default=None, description="overrides the profiles' load of the heaviest EP rank over the mean"
    )
    experts: ExpertsConfig | None = Field(
        default=None, description="model of unequal experts, in place of moe_imbalance; default: balanced ones"
    )
    telemetry: Telemetry = Field(default=Telemetry(), description="how often engines report, and how late")
    router: RouterConfig = Field(default=RouterConfig(), description="what the router remembers")
    faults: tuple[Fault, ...] = Field(default=(), description="faults at given times")
    random_faults: tuple[RandomFault, ...] = Field(default=(), description="faults as a random process")

    @model_validator(mode="after")
    def _one_account_of_imbalance(self) -> Self:
        if self.experts is not None and self.moe_imbalance is not None:
            raise ValueError("at most one of experts and moe_imbalance")
        return self

    @model_validator(mode="after")
    def _faults_name_engines(self) -> Self:
        for fault in self.faults:
            if fault.engine >= self.size:
                raise ValueError(f"faults of engines 0 to {self.size - 1} only, got engine {fault.engine}")
        return self

    @property
    def size(self) -> int:
        """Number of engines."""
        return sum(group.count for group in self.groups) or self.engines

    @property
    def all_groups(self) -> tuple[EngineGroup, ...]:
        """The groups, or the one that the cluster's own fields describe."""
        own = {"count": self.engines} | {name: getattr(self, name) for name in ("profile", "engine", "step_factors")}
        return self.groups or (EngineGroup(**own),)

    def resized(self, size: int) -> ClusterConfig | None:
        """Return the cluster with so many engines, groups in their proportions; None where those do not allow it."""
        if not self.groups:
            return self.model_copy(update={"engines": size})
        counts = [group.count * size for group in self.groups]
        if any(count % self.size for count in counts):
            return None
        groups = [
            group.model_copy(update={"count": count // self.size})
            for group, count in zip(self.groups, counts, strict=True)
        ]
        return self.model_copy(update={"groups": tuple(groups)})

    def expand(self, source: str = "cluster") -> list[EngineSpec]:
        """Resolve profiles and overrides to one entry per engine.

        Raises:
            InputError: an unknown profile or a wrong override.
        """
        specs = []
        for group in self.all_groups:
            profile = load_profile(group.profile).scaled(group.step_factors)
            if self.moe_imbalance is not None:
                step_time = profile.step_time.model_copy(update={"moe_imbalance": self.moe_imbalance})
                profile = profile.model_copy(update={"step_time": step_time})
            if group.engine:
                limits = validate(EngineLimits, profile.engine.model_dump() | group.engine, f"{source}: engine")
                profile = profile.model_copy(update={"engine": limits})
            specs += [EngineSpec(profile=profile, slowdown=group.slowdown)] * group.count
        return specs


class EngineSpec(Config):
    """One engine, resolved: overrides are part of the profile."""

    profile: Profile = Field(description="step times and limits")
    slowdown: float = Field(default=1.0, description="factor on step times")

    @property
    def limits(self) -> EngineLimits:
        """The engine's limits."""
        return self.profile.engine
