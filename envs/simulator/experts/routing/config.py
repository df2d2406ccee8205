"""Choosing a source of routing in a config."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from servegym.configuration import Config
from servegym.envs.simulator.experts.routing.bank import RoutingBank
from servegym.envs.simulator.experts.routing.generator import PRESETS, GeneratorParams, generate_bank
from servegym.envs.simulator.experts.routing.power_law import power_law_bank
from servegym.envs.simulator.experts.routing.recorded import load_routing, relabelled
from servegym.errors import InputError, nearest

Count = Annotated[int, Field(ge=1)]

# Exponents as NVIDIA's aiconfigurator benchmarks them.
POWER_LAWS = {"uniform": 0.0, "power_law_1.01": 1.01, "power_law_1.2": 1.2}


class RoutingConfig(Config):
    """Where the routing of tokens comes from."""

    source: Literal["generated", "recorded", "power_law"] = Field(
        default="generated",
        description="generated: the latent-type generator; recorded: a file; power_law: loads of a power law",
    )
    preset: str = Field(
        default="deepseek-v2-lite",
        description=(
            f"generated: {', '.join(PRESETS)} (the last two extrapolated from the first); power_law:"
            f" {', '.join(POWER_LAWS)}"
        ),
    )
    params: GeneratorParams | None = Field(default=None, description="generated: in place of a preset")
    path: Path | None = Field(default=None, description="recorded: the .npz file")
    relabel: bool = Field(default=False, description="recorded: rename the experts of each layer at random")
    tasks: Count = Field(default=4, description="kinds of requests; a recorded file has its own")
    similarity: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="power_law: correlation of the popularity of experts between tasks"
    )
    tokens: Count = Field(default=8192, description="size of the bank; of a longer file whole sequences are taken")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of the model, not of a run")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is not None) != (self.source == "recorded"):
            raise ValueError("a path for source recorded, and for no other")
        presets = {"generated": list(PRESETS), "power_law": list(POWER_LAWS)}.get(self.source)
        if presets is not None and self.params is None and self.preset not in presets:
            raise ValueError(
                f"for source {self.source} a preset of: {', '.join(presets)}; {nearest(self.preset, presets)}"
            )
        if self.params is not None and self.source != "generated":
            raise ValueError("params only for source generated")
        if self.tokens < self.tasks:
            raise ValueError(f"at least one token for each of {self.tasks} tasks")
        return self


@lru_cache(maxsize=8)
def make_bank(config: RoutingConfig, layers: int, experts: int, top_k: int) -> RoutingBank:
    """Return the routing of a model, made once per process.

    Args:
        config: the source.
        layers: MoE layers of the model.
        experts: experts per layer.
        top_k: experts that a token chooses.

    Raises:
        InputError: a recorded file is not readable or of another shape.
    """
    if config.source == "recorded":
        assert config.path is not None
        return _recorded(config, config.path, layers, experts, top_k)
    if config.source == "power_law":
        return power_law_bank(
            layers,
            experts,
            top_k,
            exponent=POWER_LAWS[config.preset],
            tasks=config.tasks,
            similarity=config.similarity,
            tokens=config.tokens,
            seed=config.seed,
        )
    params = config.params or PRESETS[config.preset]
    return generate_bank(params, layers, experts, top_k, tasks=config.tasks, tokens=config.tokens, seed=config.seed)


def _recorded(config: RoutingConfig, path: Path, layers: int, experts: int, top_k: int) -> RoutingBank:
    bank = load_routing(path, max_tokens=config.tokens)
    if (bank.layers, bank.top_k) != (layers, top_k) or bank.experts > experts:
        raise InputError(
            str(path),
            "expert_ids",
            f"got {bank.layers} layers, {bank.experts} experts, top-k {bank.top_k}; allowed: those of the profile,"
            f" {layers} layers, {experts} experts, top-k {top_k}",
        )
    # The highest expert need not occur in a record.
    bank = RoutingBank(bank.expert_ids, bank.sequence_start, bank.task, bank.task_names, experts)
    return relabelled(bank, config.seed) if config.relabel else bank
