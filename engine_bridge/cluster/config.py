"""The cluster file: which engines, where, with which settings."""

from __future__ import annotations

from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from servegym.baselines.policy_spec import PolicySpec
from servegym.configuration import Config

Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]

TINY_MOE = "tiny-moe"
"""Stands for a small MoE model of random weights, which is written where it is needed."""


class ClusterFile(Config):
    """Engines to start, or engines that run already.

    Args of vLLM pass through as they are: tensor, data and expert parallel sizes, memory, quantisation.
    """

    name: str = Field(pattern=r"^[\w.-]+$", description="names the folder of state and logs")
    model: str = Field(default=TINY_MOE, description=f"folder or hub name; {TINY_MOE}: random weights, for a CPU")
    served_model_name: str | None = Field(default=None, description="name in requests; default: the model's")
    engines: Count = Field(default=2, description="engines to start")
    host: str = Field(default="127.0.0.1", description="address that engines listen on")
    ports: tuple[Port, ...] = Field(default=(), description="one per engine; default: free ones")
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="of vLLM, without dashes: true and false are flags, lists repeat, mappings become JSON",
    )
    environment: dict[str, str] = Field(default_factory=dict, description="environment variables of the engines")
    cores: tuple[str, ...] = Field(default=(), description="CPU cores per engine, as VLLM_CPU_OMP_THREADS_BIND")
    gpus: tuple[str, ...] = Field(default=(), description="GPUs per engine, as CUDA_VISIBLE_DEVICES")
    request_policy: PolicySpec | None = Field(
        default=None,
        description="order of the waiting queues, by our scheduler class in the engines; none: vLLM's own",
    )
    experts: bool = Field(
        default=False, description="count routed experts and move them, by our extension of the engines' workers"
    )
    expert_policy: PolicySpec | None = Field(
        default=None, description="in place of EPLB's policy, on GPUs with enable-eplb among the arguments"
    )
    prefill_tokens_per_s: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="measured prefill rate of an engine, for policies that estimate time"
    )
    python: str | None = Field(
        default=None,
        description="interpreter of the environment with vLLM; default: $SERVEGYM_VLLM_PYTHON, else this one",
    )
    ready_timeout_s: Annotated[float, Field(gt=0)] = Field(default=300.0, description="until the first completion")
    attach: tuple[str, ...] = Field(default=(), description="URLs of engines that run already; nothing is started")
    discover: str | None = Field(
        default=None,
        description="URL of a host name whose addresses are the engines, a headless Service say; for deploy alone",
    )
    most_engines: Count = Field(default=16, description="that discover may find")

    @field_validator("discover")
    @classmethod
    def _is_plain_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if urlsplit(url).scheme != "http":
            raise ValueError(f"a URL like http://engines:8000, got {url!r}")
        return cls._are_urls((url,))[0]

    @field_validator("attach")
    @classmethod
    def _are_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if (
                parts.scheme not in ("http", "https")
                or not parts.hostname
                or parts.port is None
                or parts.path.strip("/")
            ):
                raise ValueError(f"URLs like http://127.0.0.1:8000, got {url!r}")
        return tuple(url.rstrip("/") for url in urls)

    @model_validator(mode="after")
    def _one_per_engine(self) -> Self:
        if self.attach and self.discover is not None:
            raise ValueError("attach or discover, not both")
        if self.attach or self.discover is not None:
            return self
        for name in ("ports", "cores", "gpus"):
            values = getattr(self, name)
            if values and len(values) != self.engines:
                raise ValueError(f"as many {name} as engines ({self.engines}), got {len(values)}")
        if len(set(self.ports)) < len(self.ports):
            raise ValueError("ports that differ")
        if self.experts and self.host not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError("experts: true on loopback only: whoever reaches the engine could call into it")
        return self
