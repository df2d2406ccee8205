"""Configuration of ``servegym tune``."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from servegym.agents.evaluation.config import EvaluationConfig
from servegym.agents.execution import BackendConfig
from servegym.agents.training.config import TrainConfig
from servegym.baselines.policy_spec import LAYERS
from servegym.configuration import Config, apply_overrides, find_config, load_mapping, merged, validate
from servegym.envs.simulation import Policies

Metric = Literal["ttft_s", "ttft_p99_s", "tpot_s", "e2e_s"]


class Range(Config):
    """Numbers from ``low`` to ``high``, both included."""

    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")
    log: bool = Field(default=False, description="uniform in the logarithm")
    integer: bool = Field(default=False, description="whole numbers only")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low < high, and low > 0 with log")
        if self.integer and (self.low % 1 or self.high % 1):
            raise ValueError("whole numbers with integer")
        return self

    @property
    def example(self) -> float:
        """One of the values."""
        return int(self.low) if self.integer else self.low


class Choice(Config):
    """One of several values."""

    choices: tuple[bool | int | float | str, ...] = Field(min_length=2, description="the values")

    @property
    def example(self) -> bool | int | float | str:
        """One of the values."""
        return self.choices[0]


class Contestant(Config):
    """What is tuned: policies with parameters, or a training run that makes one.

    The first trial of each contestant takes all values as they are.
    """

    policies: dict[str, Any] = Field(default_factory=dict, description="by layer, as in an evaluation")
    train: str | None = Field(default=None, description="a train config: a YAML file, or the name of a shipped one")
    settings: dict[str, Any] = Field(default_factory=dict, description="changes to that train config in all trials")
    space: dict[str, Range | Choice] = Field(
        min_length=1, description="what is searched: LAYER.PARAMETER of a policy, or a dotted key of the train config"
    )

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        if self.train is None and self.settings:
            raise ValueError("settings only with train")
        for key in self.space:
            layer, _, parameter = key.partition(".")
            if self.train is None and (layer not in LAYERS or not parameter or "." in parameter):
                raise ValueError(f"LAYER.PARAMETER in space, not {key!r}; layers: {', '.join(LAYERS)}")
        examples = {key: one.example for key, one in self.space.items()}
        for values in ({}, examples):
            if self.train is None:
                self.built(values)
            else:
                self.training(values)
        return self

    def built(self, values: dict[str, Any]) -> Policies:
        """Return the policies with these values.

        Raises:
            InputError: unknown policies or parameters.
        """
        plain = validate(Policies, self.policies, "policies")
        content = plain.model_dump(mode="json")
        for key, value in values.items():
            layer, _, parameter = key.partition(".")
            content[layer]["params"][parameter] = value
        return validate(Policies, content, "space")

    def training(self, values: dict[str, Any]) -> TrainConfig:
        """Return the train config with these values.

        Raises:
            InputError: an unknown config, or keys and values that it does not allow.
        """
        assert self.train is not None
        path = find_config(self.train, "train")
        content = apply_overrides(merged(load_mapping(path), self.settings), [])
        for key, value in values.items():
            content = merged(content, _nested(key, value))
        return validate(TrainConfig, content, str(path))


class TuneConfig(Config):
    """Input of ``servegym tune``."""

    name: str = Field(pattern=r"^[\w.-]+$", description="the folder is runs/tune/NAME")
    evaluation: str = Field(description="an evaluate config, whose cells trials are judged on")
    changes: dict[str, Any] = Field(default_factory=dict, description="to that config, by key; its seeds at least")
    objective: dict[Metric, float] = Field(
        default={"ttft_s": 1.0},
        description="weights of the metrics' mean log ratios to the evaluation's baseline, over cells and seeds",
    )
    limits: dict[Metric, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="the highest mean ratio to the baseline that a metric may have; what is beyond it counts ten times",
    )
    trials: Annotated[int, Field(ge=1)] = Field(default=30, description="of each contestant")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of the search")
    contestants: dict[str, Contestant] = Field(min_length=1, description="by label")
    backend: BackendConfig = Field(
        default=BackendConfig(), exclude=True, description="where cells and training runs of a trial run"
    )

    @model_validator(mode="after")
    def _seeds_are_apart(self) -> Self:
        mine, reported = self.judged(), self._evaluation({})
        if shared := set(mine.seed_list) & set(reported.seed_list):
            raise ValueError(f"changes.seeds other than those of {self.evaluation}, not {sorted(shared)}")
        if mine.live is not None:
            raise ValueError("an evaluation in the simulator")
        return self

    def judged(self) -> EvaluationConfig:
        """Return the evaluation that judges trials.

        Raises:
            InputError: unknown or wrong.
        """
        return self._evaluation(self.changes)

    def _evaluation(self, changes: dict[str, Any]) -> EvaluationConfig:
        path = find_config(self.evaluation, "evaluate")
        return validate(EvaluationConfig, merged(load_mapping(path), changes), str(path))

    def digest(self) -> str:
        """Hash of what trials depend on, their number and the other contestants apart."""
        kept = self.model_dump_json(exclude={"trials", "contestants"}) + self.judged().digest()
        return hashlib.sha256(kept.encode()).hexdigest()[:16]


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}
