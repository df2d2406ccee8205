"""A loaded policy bundle as an engine policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from servegym.baselines.features import Float32Array, fill_dispatch_features
from servegym.baselines.heuristic import TURN, turns
from servegym.baselines.interface import E_AVAILABLE, EngineViews, FloatArray, RequestView
from servegym.engine_bridge.manifest import Manifest
from servegym.engine_bridge.set_scorer import SetScorer, compiled_scores


class BundlePolicy:
    """Scores engines by a learned network: ``score = -logit``; equal engines take turns.

    A pure function of its views; threads may share it.

    Args:
        scorer: the network.
        manifest: what the bundle says about itself.
        folder: where it was read from.
    """

    compiled = staticmethod(compiled_scores)

    def __init__(self, scorer: SetScorer, manifest: Manifest, folder: Path) -> None:
        self.manifest = manifest
        self.folder = folder
        self._scorer = scorer

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return minus the logits, shape (engines,); infinity at engines that take no requests."""
        logits = self.logits(request.row(), engines.data)
        scores = TURN * turns(len(engines), request.last_engine + 1) - logits
        scores[engines.data[:, E_AVAILABLE] <= 0.0] = np.inf
        return scores

    def logits(self, request: FloatArray, engines: FloatArray) -> Float32Array:
        """Return the logits for a row of ``R_*`` and a matrix of ``E_*`` entries, shape (engines,)."""
        widths = self.manifest.widths
        engine_features = np.empty((len(engines), widths.engine_features), dtype=np.float32)
        request_features = np.empty(widths.request_features, dtype=np.float32)
        fill_dispatch_features(request, engines, engine_features, request_features)
        return self._scorer.logits(engine_features, request_features, engines[:, E_AVAILABLE] > 0.0)

    def compiled_params(self) -> FloatArray:
        """Return the widths and weights as ``compiled`` reads them."""
        return self._scorer.packed()
