"""``policy.json``: what a policy bundle says about itself."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from servegym.baselines import interface
from servegym.baselines.interface import ENGINE_COLUMNS, REQUEST_COLUMNS, FloatArray
from servegym.configuration import Config

MANIFEST = "policy.json"
WEIGHTS = "policy.safetensors"
CARD = "README.md"

GOLDEN_PAIRS = 16

Size = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

ENGINE_COLUMN_NAMES = tuple(
    name[2:].lower()
    for name, _ in sorted(
        ((name, index) for name, index in vars(interface).items() if name.startswith("E_")), key=lambda item: item[1]
    )
)
REQUEST_COLUMN_NAMES = tuple(
    name[2:].lower()
    for name, _ in sorted(
        ((name, index) for name, index in vars(interface).items() if name.startswith("R_")), key=lambda item: item[1]
    )
)
assert len(ENGINE_COLUMN_NAMES) == ENGINE_COLUMNS
assert len(REQUEST_COLUMN_NAMES) == REQUEST_COLUMNS


class Widths(Config):
    """Sizes that fix the shape of every weight; none depends on the number of engines."""

    engine_features: Size
    request_features: Size
    hidden: Size


class Provenance(Config):
    """Where the weights come from."""

    run: str = Field(description="name of the training run")
    config_sha256: Sha256 = Field(description="of the training config, all values resolved")
    seed: int
    steps: Annotated[int, Field(ge=0)] = Field(description="decisions trained on")
    environment: str
    evaluation: dict[str, float] = Field(
        default_factory=dict, description="means over the held-out seeds of the evaluation that chose these weights"
    )


class GoldenPair(Config):
    """A decision and the logits that torch gave: a runtime that cannot reproduce it must not serve.

    The decision is written as what the router sees, column by column, so that a changed feature shows as well as a
    changed runtime.
    """

    request: dict[str, float]
    engines: dict[str, tuple[float, ...]]
    logits: tuple[float | None, ...] = Field(description="null at engines that take no requests")

    def views(self) -> tuple[FloatArray, FloatArray]:
        """Return the ``R_*`` row and the ``E_*`` matrix; columns that the pair lacks are zero."""
        row = np.array([self.request.get(name, 0.0) for name in REQUEST_COLUMN_NAMES])
        zeros = (0.0,) * len(self.logits)
        matrix = np.array([self.engines.get(name, zeros) for name in ENGINE_COLUMN_NAMES]).T
        return row, np.ascontiguousarray(matrix)


class Manifest(Config):
    """Contents of ``policy.json``, in order."""

    schema_version: Literal[1]
    layer: Literal["engine"]
    architecture: Literal["set_scorer"] = Field(description="the formula of servegym.agents.networks")
    widths: Widths
    engine_features: tuple[str, ...] = Field(description="names in order, servegym.baselines.features")
    request_features: tuple[str, ...]
    action: Literal["score of an engine = -logit; the lowest score is chosen, equal engines take turns"]
    mask: Literal["unavailable engines score infinity and are left out of the pooling"]
    normalisation: None = Field(description="none: the features have fixed scales")
    training: Provenance
    packages: dict[str, str] = Field(description="versions that the policy was trained with")
    weights_sha256: Sha256 = Field(description="of policy.safetensors")
    golden: Annotated[tuple[GoldenPair, ...], Field(min_length=GOLDEN_PAIRS, max_length=GOLDEN_PAIRS)]
