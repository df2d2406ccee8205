"""The description of a workload, and where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from servegym.configuration import Config, find_config, load_config
from servegym.envs.workloads.arrivals import Arrivals
from servegym.envs.workloads.distributions import Distribution
from servegym.envs.workloads.sessions import Sessions
from servegym.envs.workloads.templates import Templates
from servegym.envs.workloads.tenants import Tenant
from servegym.envs.workloads.traces import TraceConfig
from servegym.envs.workloads.users import Deadline, Prediction, Priorities, Users

# What a trace replaces, or tenants; the first three are required without either.
_GENERATED = ("arrivals", "prompt_tokens", "output_tokens", "sessions", "templates")
_PROMISES = ("users", "priorities", "deadline", "prediction")


class WorkloadConfig(Config):
    """Traffic by its statistics, a trace, or tenants with a workload each.

    The mean rate is not part of it: it is given when requests are drawn.
    """

    name: str = Field(description="of the workload")
    description: str = Field(description="what it is, in one line")
    source: str = Field(description="where the numbers come from")
    arrivals: Arrivals | None = Field(default=None, description="of requests, or of sessions")
    prompt_tokens: Distribution | None = Field(default=None, description="prompt of a request, or of a first turn")
    output_tokens: Distribution | None = Field(default=None, description="tokens of an output")
    max_tokens: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="prompt + output of a request, at most, however long a context the engines allow"
    )
    sessions: Sessions | None = Field(
        default=None, description="conversations of several turns; default: single requests"
    )
    templates: tuple[Templates, ...] = Field(default=(), description="prefixes that requests share")
    users: Users | None = Field(default=None, description="who sends the requests; default: nobody in particular")
    priorities: Priorities | None = Field(default=None, description="priorities of requests; default: all 0")
    deadline: Deadline | None = Field(default=None, description="by when the first token is due; default: never")
    prediction: Prediction | None = Field(
        default=None, description="predicted output lengths, which policies may see; default: none"
    )
    trace: TraceConfig | None = Field(
        default=None, description="recorded requests instead of generated ones; users, deadlines ... replace its own"
    )

    tenants: tuple[Tenant, ...] = Field(default=(), description="workloads that are served together, in place of one")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        required = [name for name in _GENERATED[:3] if getattr(self, name) is None]
        if self.trace is None and not self.tenants and required:
            raise ValueError(f"{' and '.join(required)} for a generated workload, a trace, or tenants")
        unused = [name for name in _GENERATED if getattr(self, name)]
        if self.trace is not None and unused:
            raise ValueError(f"no {' and no '.join(unused)} beside a trace")
        unused += [name for name in (*_PROMISES, "max_tokens", "trace") if getattr(self, name) is not None]
        if self.tenants and unused:
            raise ValueError(f"no {' and no '.join(unused)} beside tenants, which have their own")
        if sum(family.share for family in self.templates) > 1 + 1e-9:
            raise ValueError("shares of templates that add up to at most 1")
        return self


def load_workload(reference: str | Path) -> WorkloadConfig:
    """Load a workload by the name of a shipped one, or from a YAML file; a trace's path is relative to that file.

    Raises:
        InputError: unknown name, or a field that is missing or wrong.
    """
    config = load_config(WorkloadConfig, reference, "workloads")
    if config.trace is None or config.trace.path.is_absolute():
        return config
    path = find_config(reference, "workloads").parent / config.trace.path
    return config.model_copy(update={"trace": config.trace.model_copy(update={"path": path})})
