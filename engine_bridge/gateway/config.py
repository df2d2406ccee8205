"""Settings of a deployment."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.prefix_index import PrefixIndexConfig
from servegym.configuration import Config
from servegym.engine_bridge.router.table import EngineLimits

Mode = Literal["shadow", "canary", "full"]
Positive = Annotated[float, Field(gt=0)]
Percent = Annotated[float, Field(gt=0, le=100)]

DESTINATION = "x-gateway-destination-endpoint"
"""Header and metadata key of the Endpoint Picker protocol."""
PRIORITY = "x-vllm-priority"
"""Header by which vLLM 0.32 takes a priority; smaller runs first."""


class AdmissionLimits(Config):
    """What is turned away with 429 rather than queued."""

    in_flight: int = Field(default=4096, ge=1, description="requests in flight, all engines together")
    in_flight_per_engine: int = Field(default=1024, ge=1, description="requests in flight at one engine")
    low_priority_share: float = Field(
        default=0.8, gt=0, le=1, description="of in_flight, for requests with a priority above 0 (less urgent)"
    )
    body_mib: int = Field(default=16, ge=1, le=1024, description="largest request body, MiB; beyond it 413")
    retry_after_s: float = Field(default=1.0, gt=0, description="what a client is told that is turned away")


class Tls(Config):
    """A certificate and its key, PEM files."""

    certificate: Path = Field(description="certificate chain, PEM")
    key: Path = Field(description="private key, PEM")


class DeployConfig(Config):
    """A gateway before the engines of a cluster."""

    name: str = Field(default="default", pattern=r"^[\w.-]+$", description="names the folder of state and logs")
    policy: PolicySpec = Field(default=PolicySpec(name="lmetric"), description="engine policy, or a bundle")
    request_policy: PolicySpec | None = Field(
        default=None, description="order of the engines' waiting queues; by our scheduler in them, else by a static key"
    )
    mode: Mode = Field(default="full", description="shadow: decide and log; canary: a share of requests; full: all")
    percent: Percent = Field(default=5.0, description="of sessions that a canary serves")
    baseline: PolicySpec = Field(
        default=PolicySpec(name="least_requests"), description="engine policy that acts where the policy does not"
    )
    epsilon: float = Field(
        default=0.0, ge=0, le=1, description="share of decisions drawn at random, with known propensity, for learning"
    )
    seed: int = Field(default=0, ge=0, description="of all draws")
    listen: str = Field(default="127.0.0.1:8000", description="address of the OpenAI-compatible endpoint")
    picker: str = Field(default="127.0.0.1:0", description="address of the Endpoint Picker (gRPC); port 0: any")
    admin: str = Field(default="127.0.0.1:0", description="address of metrics and status; port 0: any")
    metrics: str | None = Field(
        default=None, description="address of a page with metrics and health alone, for others to read; it may be open"
    )
    open_to_all: bool = Field(default=False, description="allow listen beyond loopback without api_key_file")
    api_key_file: Path | None = Field(default=None, description="keys of clients, one a line (Authorization: Bearer)")
    tls: Tls | None = Field(default=None, description="for listen")
    picker_tls: Tls | None = Field(default=None, description="for picker, where a gateway asks for it")
    deadline_ms: Positive = Field(default=200.0, description="for a decision; then a heuristic decides")
    idle_timeout_s: Positive = Field(
        default=300.0, description="without a byte of an answer until a request is cut, as on an engine that hangs"
    )
    drain_s: float = Field(default=60.0, ge=0, description="for running streams, when the deployment ends")
    progress_ms: Positive = Field(default=200.0, description="between two looks at running requests' first tokens")
    telemetry_period_s: Positive = Field(default=0.25, description="between two readings of an engine's metrics")
    token_counts: bool = Field(
        default=True, description="read usage from streams, in Envoy (sse_to_metadata, which Envoy calls unfinished)"
    )
    limits: AdmissionLimits = Field(default_factory=AdmissionLimits, description="what is turned away")
    engine: EngineLimits = Field(default_factory=EngineLimits, description="constants of an engine that policies read")
    prefix: PrefixIndexConfig = Field(
        default_factory=PrefixIndexConfig, description="index of the prompts that each engine has seen"
    )
    chars_per_token: Positive = Field(default=4.0, description="of text, until usage has told better")
    log: Path | None = Field(default=None, description="decision log, .jsonl; default: decisions.jsonl in the folder")
    log_observations: bool = Field(default=False, description="with what the policy saw, for learning from the log")

    @field_validator("listen", "picker", "admin", "metrics")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        host, _, port = value.rpartition(":")
        try:
            ipaddress.ip_address(host.strip("[]"))
            number = int(port)
        except ValueError:
            raise ValueError("an IP address and a port, like 127.0.0.1:8000") from None
        if not 0 <= number <= 65535:
            raise ValueError("a port from 0 to 65535")
        return value

    @model_validator(mode="after")
    def _is_safe(self) -> Self:
        if not _loopback(self.listen) and self.api_key_file is None and not self.open_to_all:
            raise ValueError(f"listen on loopback, an api_key_file, or open_to_all: true; got listen {self.listen}")
        if not _loopback(self.admin):
            raise ValueError(f"admin on loopback; got {self.admin}")
        return self


def split_address(address: str) -> tuple[str, int]:
    """Return host and port.

    >>> split_address("[::1]:80")
    ('::1', 80)
    """
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _loopback(address: str) -> bool:
    return ipaddress.ip_address(split_address(address)[0]).is_loopback
