"""The description of a trace: the file, its format, and the part of it that is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from servegym.configuration import Config
from servegym.envs.workloads.distributions import NonNegative, Positive, PositiveInt
from servegym.envs.workloads.traces.registry import FORMATS
from servegym.errors import nearest


class TraceConfig(Config):
    """A recorded trace, or a part of it.

    Requests are sorted by their time of arrival (rows of equal time stay in order), cut to the window, freed of those
    over ``max_tokens``, thinned, limited, shifted so that the first one left arrives at 0, and rescaled in time.
    """

    path: Path = Field(description="the file, or a folder of a format with several")
    format: str = Field(default="auto", description="a name of `FORMATS`, or auto: known by its columns")
    start_s: NonNegative = Field(default=0.0, description="start of the window, seconds after the first request")
    duration_s: Positive | None = Field(default=None, description="length of the window; default: to the end")
    max_tokens: PositiveInt | None = Field(
        default=None, description="leave out requests with more prompt + output tokens"
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="keep a random share of the sessions (of the requests where there are none)"
    )
    limit: PositiveInt | None = Field(default=None, description="keep the first requests")
    time_scale: Positive = Field(default=1.0, description="factor on arrival times: 0.5 doubles the rate")
    rate_rps: Positive | None = Field(default=None, description="rescale arrival times to this mean rate instead")
    closed_loop: bool = Field(
        default=False,
        description=(
            "a turn of a session arrives when the turn before has finished and the recorded time between their arrivals"
            " has passed, instead of at its recorded time"
        ),
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of thinning, jitter, and ServeGen's draws")
    jitter_s: NonNegative | None = Field(
        default=None, description="Mooncake: spread of arrivals within a tick of the clock; default: the tick"
    )
    prefix_block_tokens: PositiveInt = Field(
        default=16, description="native format: prompt tokens per id of prefix_blocks"
    )
    model: str | None = Field(default=None, description="ServeGen: which of the models in the file")

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        if name != "auto" and name not in FORMATS:
            raise ValueError(f"auto or a known format; {nearest(name, FORMATS)}")
        return name

    @model_validator(mode="after")
    def _one_scale(self) -> Self:
        if self.rate_rps is not None and self.time_scale != 1.0:
            raise ValueError("at most one of time_scale and rate_rps")
        return self
