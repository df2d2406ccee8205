"""The weights that a search tunes: of one layer's network, as one row of numbers and back as a policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from servegym.agents.networks import Actor
from servegym.agents.priors import PRIORS
from servegym.agents.training.config import TrainConfig
from servegym.agents.training.export import actor_weights
from servegym.baselines.features import Float32Array
from servegym.baselines.interface import FloatArray
from servegym.engine_bridge.bundle import load_bundle
from servegym.engine_bridge.bundle_policy import LearnedPlacement
from servegym.engine_bridge.decisions import DECISIONS, Level
from servegym.engine_bridge.set_scorer import SetScorer, compiled_admission, compiled_dispatch
from servegym.errors import InputError

_LEAST_SHARE = 0.02


class Part:
    """The network of one layer, and the weights of it that are tuned.

    Args:
        config: of the run.
        layer: whose.

    Attributes:
        actor: the network, for bundles.
        vector: the tuned weights in one row; of the request level, behind them the logarithm of the share of the token
            budget over where it started, if that is tuned.
    """

    def __init__(self, config: TrainConfig, layer: Level) -> None:
        assert config.evolution is not None
        decisions = DECISIONS[layer]
        start = config.evolution.start_from.get(layer)
        self._share: float | None = None
        if start in PRIORS[layer]:
            self.actor = Actor(decisions, config.network.width)
            self.actor.start_from(start, config.network.prior_scale)
        elif start is not None:
            bundle = load_bundle(start)
            if bundle.manifest.layer != layer:
                raise InputError(
                    "config", f"evolution.start_from.{layer}", f"{start} is of the {bundle.manifest.layer} level"
                )
            self.actor = Actor(decisions, bundle.manifest.widths.hidden)
            self._load(dict(bundle.weights))
            self._share = bundle.manifest.budget_share
        else:
            own = layer == config.task.decisions.layer
            self.actor = Actor(decisions, config.network.width)
            self.actor.start_from(config.network.prior if own else "none", config.network.prior_scale)
        self.layer = layer
        self._first = actor_weights(self.actor)
        self._shapes = {
            name: array.shape
            for name, array in self._first.items()
            if config.evolution.tune == "network" or name == "prior.weight"
        }
        self.vector = np.concatenate([self._first[name].ravel() for name in self._shapes]).astype(np.float64)
        self._tunes_share = layer == "request" and config.evolution.budget_share is not None
        if self._tunes_share:
            self._share = config.evolution.budget_share
            self.vector = np.append(self.vector, 0.0)

    def budget_share(self, vector: FloatArray) -> float | None:
        """Return the share of an engine's token budget that a step may use."""
        if self._share is None or not self._tunes_share:
            return self._share
        return min(max(self._share * math.exp(vector[-1]), _LEAST_SHARE), 1.0)

    def policy(self, vector: FloatArray) -> Any:
        """Return the policy with these weights."""
        weights = self._weights(vector)
        if self.layer == "expert":
            return LearnedPlacement(SetScorer(weights))
        return Candidate(weights, self.layer, self.budget_share(vector))

    def settle(self, vector: FloatArray) -> Any:
        """Give the network these weights, and return the policy."""
        self._load(self._weights(vector))
        return self.policy(vector)

    def _weights(self, vector: FloatArray) -> dict[str, Float32Array]:
        found, at = dict(self._first), 0
        for name, shape in self._shapes.items():
            size = math.prod(shape)
            found[name] = vector[at : at + size].reshape(shape).astype(np.float32)
            at += size
        return found

    def _load(self, weights: Mapping[str, Float32Array]) -> None:
        with torch.no_grad():
            self.actor.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})


class Candidate:
    """A network as a policy that never leaves the kernel.

    Args:
        weights: of a :class:`~servegym.engine_bridge.set_scorer.SetScorer`.
        layer: engine or request.
        budget_share: of the request level.
    """

    def __init__(self, weights: dict[str, Float32Array], layer: str, budget_share: float | None = None) -> None:
        self.budget_share = budget_share
        self._params = SetScorer(weights).packed()
        self.compiled = compiled_dispatch if layer == "engine" else compiled_admission

    def compiled_params(self) -> FloatArray:
        """Return what ``compiled`` reads."""
        return self._params
