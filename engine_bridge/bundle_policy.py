"""Loaded policy bundles as policies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from servegym.baselines.expert.collocate import Collocate
from servegym.baselines.features import Float32Array
from servegym.baselines.heuristic import TURN, turns
from servegym.baselines.interface import (
    E_AVAILABLE,
    EngineViews,
    ExpertLoad,
    FloatArray,
    Placement,
    QueueView,
    RequestView,
)
from servegym.baselines.placement_features import SETTINGS, placement_context
from servegym.engine_bridge.decisions import DECISIONS, PLACEMENT, Decisions
from servegym.engine_bridge.manifest import Manifest
from servegym.engine_bridge.set_scorer import SetScorer, compiled_admission, compiled_dispatch, widened


class BundlePolicy:
    """Decides by a learned network. Scores, ``score = -logit``, are a pure function of views; threads may share it.

    Args:
        scorer: the network.
        manifest: what the bundle says about itself.
        folder: where it was read from.
    """

    def __init__(self, scorer: SetScorer, manifest: Manifest, folder: Path) -> None:
        self.manifest = manifest
        self.folder = folder
        self._scorer = scorer
        self._decisions = manifest.decisions

    @property
    def weights(self) -> Mapping[str, Float32Array]:
        """The network's weights by name, as torch stores them; over all features, 0 for those that it does not see."""
        own, every = self._decisions, DECISIONS[self.manifest.layer]
        names = (own.item_names, own.context_names), (every.item_names, every.context_names)
        return self._scorer.weights if own is every else widened(self._scorer.weights, *names)

    def logits(self, context: FloatArray, items: FloatArray) -> Float32Array:
        """Return the logits of candidates, shape (candidates,).

        Args:
            context: row of ``R_*`` or ``C_*`` entries.
            items: matrix of ``E_*`` or ``Q_*`` columns.
        """
        decisions = self._decisions
        return self._scorer.logits(*decisions.features(context, items), decisions.eligible(items))

    def compiled_params(self) -> FloatArray:
        """Return the widths and weights as ``compiled`` reads them."""
        return SetScorer(self.weights).packed()


class EngineBundlePolicy(BundlePolicy):
    """Scores engines; equal ones take turns."""

    compiled = staticmethod(compiled_dispatch)

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return minus the logits, shape (engines,); infinity at engines that take no requests."""
        logits = self.logits(request.row(), engines.data)
        scores = TURN * turns(len(engines), request.last_engine + 1) - logits
        scores[engines.data[:, E_AVAILABLE] <= 0.0] = np.inf
        return scores


class RequestBundlePolicy(BundlePolicy):
    """Scores waiting requests, each by itself, and may set the token budget of a step."""

    compiled = staticmethod(compiled_admission)

    @property
    def budget_share(self) -> float | None:
        """Share of the engine's token budget that a step may use; None: all of it."""
        return self.manifest.budget_share

    def score(self, queue: QueueView) -> FloatArray:
        """Return minus the logits, shape (waiting,)."""
        return -self.logits(queue.context(), queue.data).astype(np.float64)


class LearnedPlacement(Collocate):
    """The rule ``collocate`` with settings that a network scales by the load at hand.

    Args:
        scorer: the network; with weights of 0, the rule with its defaults.
        decisions: ``PLACEMENT``, or with some of its features alone.
    """

    def __init__(self, scorer: SetScorer, decisions: Decisions = PLACEMENT) -> None:
        super().__init__()
        self._scorer, self._decisions = scorer, decisions
        self._items = np.arange(len(SETTINGS), dtype=np.float64)[:, None]

    def settings(self, load: ExpertLoad, before: FloatArray | None, current: Placement) -> dict[str, float]:
        """Return the default of each setting times exp(logit), within a factor of 1000."""
        context = placement_context(load, before, current)
        decisions = self._decisions
        logits = self._scorer.logits(*decisions.features(context, self._items), decisions.eligible(self._items))
        factors = np.exp(np.clip(logits.astype(np.float64), -_LARGEST, _LARGEST))
        values = self.params.model_dump()
        return {name: values[name] * float(factor) for name, factor in zip(SETTINGS, factors, strict=True)}


_LARGEST = float(np.log(1000.0))


class ExpertBundlePolicy(BundlePolicy):
    """Places experts. It remembers loads: one for each group of ranks."""

    needs_sources = LearnedPlacement.needs_sources
    needs_coactivation = LearnedPlacement.needs_coactivation

    def __init__(self, scorer: SetScorer, manifest: Manifest, folder: Path) -> None:
        super().__init__(scorer, manifest, folder)
        self._placement = LearnedPlacement(scorer, manifest.decisions)

    def reset(self, seed: int) -> None:
        """Forget the loads."""
        self._placement.reset(seed)

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the placement, or None if it stands or nothing was routed."""
        return self._placement.place(load, current)
