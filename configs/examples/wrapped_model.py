"""A wrapper around somebody's model: a regressor of TTFT with scikit-learn's ``predict``, or a plain function.

servegym evaluate quick --policy mine=configs/examples/wrapped_model.py:LowestPrediction
servegym deploy configs/examples/wrapped_model.py:LowestPrediction,model=their_package:regressor --cluster local

``model`` names an object as ``module:object`` or ``file.py:object``; the module may lie in the present directory.
"""

import numpy as np

from servegym.baselines.interface import EngineViews, FloatArray, RequestView
from servegym.baselines.user_code import load_class


def linear_ttft(table: FloatArray) -> FloatArray:
    """Stand in for somebody's model: least squares on random dispatch. Seconds, shape (n,), from shape (n, 2)."""
    seconds: FloatArray = table @ np.array([2.9e-5, 1.2e-4])
    return seconds


class LowestPrediction:
    """Asks a model for one prediction per engine; the lowest wins."""

    def __init__(self, model: str | None = None) -> None:
        found = load_class(model, "model") if model else linear_ttft
        self.predict = getattr(found, "predict", found)

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return one prediction per engine."""
        tokens = engines.prefill_tokens + request.prompt_tokens - engines.hit_tokens
        return np.asarray(self.predict(np.column_stack([tokens, engines.inflight])), dtype=float)
