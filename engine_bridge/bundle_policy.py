"""Loaded policy bundles as policies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from servegym.baselines.features import Float32Array
from servegym.baselines.heuristic import TURN, turns
from servegym.baselines.interface import E_AVAILABLE, EngineViews, FloatArray, QueueView, RequestView
from servegym.engine_bridge.manifest import Manifest
from servegym.engine_bridge.set_scorer import SetScorer, compiled_admission, compiled_dispatch


class BundlePolicy:
    """Scores by a learned network: ``score = -logit``. A pure function of its views; threads may share it.

    Args:
        scorer: the network.
        manifest: what the bundle says about itself.
        folder: where it was read from.
    """

    def __init__(self, scorer: SetScorer, manifest: Manifest, folder: Path) -> None:
        self.manifest = manifest
        self.folder = folder
        self._scorer = scorer

    @property
    def weights(self) -> Mapping[str, Float32Array]:
        """The network's weights by name, as torch stores them."""
        return self._scorer.weights

    def logits(self, context: FloatArray, items: FloatArray) -> Float32Array:
        """Return the logits of candidates, shape (candidates,).

        Args:
            context: row of ``R_*`` or ``C_*`` entries.
            items: matrix of ``E_*`` or ``Q_*`` columns.
        """
        decisions = self.manifest.decisions
        return self._scorer.logits(*decisions.features(context, items), decisions.eligible(items))

    def compiled_params(self) -> FloatArray:
        """Return the widths and weights as ``compiled`` reads them."""
        return self._scorer.packed()


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
    """Scores waiting requests, each by itself."""

    compiled = staticmethod(compiled_admission)

    def score(self, queue: QueueView) -> FloatArray:
        """Return minus the logits, shape (waiting,)."""
        return -self.logits(queue.context(), queue.data).astype(np.float64)
