"""Which live engines, and how requests are sent to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from servegym.baselines.policy_spec import PolicySpec
from servegym.configuration import Config
from servegym.engine_bridge.cluster.engine import served_models
from servegym.engine_bridge.cluster.launcher import LiveCluster, find_cluster
from servegym.engine_bridge.cluster.priorities import heeds_priorities
from servegym.engine_bridge.router.table import EngineLimits
from servegym.envs.requests import WorkloadChoice
from servegym.envs.workloads.generation import LengthScale, generate
from servegym.envs.workloads.table import RequestTable
from servegym.errors import InputError


@dataclass(frozen=True, slots=True)
class Target:
    """Engines that answer.

    Attributes:
        urls: their servers.
        model: its name in requests.
        cluster: the cluster that they are, if they were found by its name.
    """

    urls: tuple[str, ...]
    model: str
    cluster: LiveCluster | None = None

    def require_priorities(self, order: PolicySpec) -> None:
        """Make sure that the engines heed the priorities of requests.

        Args:
            order: request policy for engines that our scheduler runs in.

        Raises:
            InputError: an engine ignores them.
        """
        if self.cluster is not None and self.cluster.ordered:
            self.cluster.follow(order)
            return
        for url in self.urls:
            if heeds_priorities(url, self.model) is False:
                raise InputError(
                    "live",
                    "cluster",
                    f"got {url}, which ignores priorities; allowed: engines with scheduling-policy: priority, or with a"
                    " request_policy in their cluster file",
                )


class LiveOptions(Config):
    """Live engines as a target of requests."""

    cluster: str | None = Field(default=None, description="a cluster that runs, by its name or folder; or urls")
    urls: tuple[str, ...] = Field(default=(), description="servers; or a cluster by its name")
    model: str | None = Field(default=None, description="name in requests; default: the first that the server has")
    prompt_scale: Annotated[float, Field(gt=0)] = Field(default=1.0, description="factor on prompt lengths")
    output_scale: Annotated[float, Field(gt=0)] = Field(default=1.0, description="factor on output lengths")
    max_tokens: Annotated[int, Field(ge=2)] = Field(default=4000, description="prompt + output, at most")
    vocabulary: Annotated[int, Field(ge=2)] = Field(default=256, description="prompts have token ids below this")
    timeout_s: Annotated[float, Field(gt=0)] = Field(default=600.0, description="of one request")
    limits: EngineLimits = Field(default=EngineLimits(), description="of the engines, for engine policies")
    telemetry_period_s: Annotated[float, Field(gt=0)] = Field(
        default=0.25, description="between two readings of an engine's metrics, for engine policies"
    )
    replacement_s: Annotated[float, Field(gt=0)] = Field(
        default=5.0, description="between two opportunities to place experts anew"
    )

    def target(self) -> Target:
        """Return the engines.

        Raises:
            InputError: none are named, the cluster does not run, or nobody answers.
        """
        if self.cluster is not None:
            for folder in (Path(self.cluster), Path("runs") / "clusters" / self.cluster):
                found = find_cluster(folder)
                if found is not None:
                    return Target(tuple(engine.url for engine in found.engines), self.model or found.model, found)
            raise InputError(
                "live", "cluster", f"got {self.cluster}; no such cluster; start one: servegym cluster up {self.cluster}"
            )
        if not self.urls:
            raise InputError("live", "urls", "missing; allowed: --url, --cluster, or urls or a cluster in the config")
        return Target(self.urls, self.model or served_models(self.urls[0])[0])

    def table(self, choice: WorkloadChoice, seed: int, requests: int | None = None) -> RequestTable:
        """Draw the requests of a workload or a trace, with lengths that the engines take.

        Raises:
            InputError: a bad workload or trace.
        """
        return generate(
            choice.resolve(),
            rate_rps=choice.rate_rps,
            requests=requests or choice.requests or (200 if choice.trace is None else None),
            seed=seed,
            max_tokens=self.max_tokens,
            scale=LengthScale(self.prompt_scale, self.output_scale),
        )
