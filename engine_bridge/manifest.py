"""``policy.json``: what a policy bundle says about itself."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from servegym.baselines.interface import FloatArray
from servegym.configuration import Config
from servegym.engine_bridge.decisions import DECISIONS, Decisions

MANIFEST = "policy.json"
WEIGHTS = "policy.safetensors"
CARD = "README.md"

GOLDEN_PAIRS = 16

Size = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Widths(Config):
    """Sizes that fix the shape of every weight; none depends on the number of candidates."""

    item_features: Size = Field(description="features of a candidate")
    context_features: Size = Field(description="features that the candidates share")
    hidden: Size = Field(description="units of each hidden layer")


class Provenance(Config):
    """Where the weights come from."""

    run: str = Field(description="name of the training run")
    config_sha256: Sha256 = Field(description="of the training config, all values resolved")
    seed: int = Field(description="of the training run")
    steps: Annotated[int, Field(ge=0)] = Field(description="decisions trained on")
    environment: str = Field(description="id of the environment that it was trained in")
    evaluation: dict[str, float] = Field(
        default_factory=dict, description="means over the held-out seeds of the evaluation that chose these weights"
    )


class GoldenPair(Config):
    """A decision and the logits that torch gave: a runtime that cannot reproduce it must not serve.

    The decision is written as what a policy sees, column by column, so that a changed feature shows as well as a
    changed runtime.
    """

    context: dict[str, float] = Field(description="values of what the candidates share, by column")
    items: dict[str, tuple[float, ...]] = Field(description="values of the candidates, by column")
    logits: tuple[float | None, ...] = Field(description="null at candidates that may not be chosen")

    def views(self, decisions: Decisions) -> tuple[FloatArray, FloatArray]:
        """Return the row of the context and the matrix of the candidates; columns that the pair lacks are zero."""
        row = np.array([self.context.get(name, 0.0) for name in decisions.context_columns])
        zeros = (0.0,) * len(self.logits)
        matrix = np.array([self.items.get(name, zeros) for name in decisions.item_columns]).T
        return row, np.ascontiguousarray(matrix)


class Manifest(Config):
    """Contents of ``policy.json``, in order."""

    schema_version: Literal[2] = Field(description="of this file")
    layer: Literal["engine", "request", "expert"] = Field(description="whose decisions the policy makes")
    architecture: Literal["set_scorer", "index_scorer"] = Field(description="a formula of servegym.agents.networks")
    widths: Widths = Field(description="sizes of the network")
    item_features: tuple[str, ...] = Field(
        description="of a candidate, in the order of the weights, among those of servegym.engine_bridge.decisions"
    )
    context_features: tuple[str, ...] = Field(description="of what the candidates share")
    action: str = Field(description="what an answer means")
    mask: str = Field(description="what becomes of candidates that may not be chosen")
    budget_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="of an engine's token budget, that a request policy lets a step use; null: all of it"
    )
    normalisation: None = Field(description="none: the features have fixed scales")
    training: Provenance = Field(description="where the weights come from")
    packages: dict[str, str] = Field(description="versions that the policy was trained with")
    weights_sha256: Sha256 = Field(description="of policy.safetensors")
    golden: Annotated[tuple[GoldenPair, ...], Field(min_length=GOLDEN_PAIRS, max_length=GOLDEN_PAIRS)] = Field(
        description="decisions with the right answers, checked before the policy serves"
    )

    @cached_property
    def decisions(self) -> Decisions:
        """The kind of decisions that the policy makes, with the features that it was trained with."""
        return DECISIONS[self.layer].only(self.item_features, self.context_features)
