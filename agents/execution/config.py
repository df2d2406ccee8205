"""Configuration of where work runs."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from servegym.configuration import Config

_RAY_ADDRESS = re.compile(r"auto|[^\s/:]+:\d{1,5}")


class BackendConfig(Config):
    """Where the units of an evaluation, of tuning or of training run. The results do not depend on it."""

    name: Literal["local", "ray", "slurm"] = Field(
        default="local", description="local: processes of this machine; ray: a Ray cluster; slurm: Slurm jobs"
    )
    workers: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="units at a time; default: one per core of the machine or the cluster, 8 Slurm jobs"
    )
    address: str | None = Field(
        default=None,
        description=(
            "of a Ray cluster that this machine is part of: auto, or HOST:PORT; default: $RAY_ADDRESS, else a Ray of"
            " its own. With slurm: local, for processes in place of jobs"
        ),
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="of Slurm jobs, in submitit's words: timeout_min, mem_gb, slurm_partition, slurm_account, ...",
    )

    @model_validator(mode="after")
    def _fits_the_name(self) -> Self:
        if self.options and self.name != "slurm":
            raise ValueError("options only with slurm")
        if self.address is None:
            return self
        if self.name == "local":
            raise ValueError("an address only with ray or slurm")
        if self.name == "ray" and not _RAY_ADDRESS.fullmatch(self.address):
            raise ValueError(f"auto or HOST:PORT as the address of a Ray cluster, not {self.address}")
        if self.name == "slurm" and self.address != "local":
            raise ValueError(f"local, or none, as the address with slurm, not {self.address}")
        return self
