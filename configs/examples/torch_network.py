"""A torch network: it predicts the TTFT on each engine, and the shortest wins.

servegym evaluate quick --policy mine=configs/examples/torch_network.py:PredictedTtft
servegym deploy configs/examples/torch_network.py:PredictedTtft --cluster local

Its weights lie beside this file; ``python configs/examples/train_torch_network.py`` makes them anew.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model

from servegym.baselines.interface import EngineViews, FloatArray, RequestView

WEIGHTS = Path(__file__).with_suffix(".safetensors")


class PredictedTtft(torch.nn.Sequential):
    """Any module will do that has a ``score``; this one takes its weights from a file."""

    def __init__(self, weights: str = str(WEIGHTS)) -> None:
        super().__init__(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        if weights:
            load_model(self, weights)

    @torch.no_grad()
    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return the predicted logarithm of TTFT per engine; the lowest wins."""
        return np.asarray(self(torch.from_numpy(features(request, engines))).squeeze(-1), dtype=float)


def features(request: RequestView, engines: EngineViews) -> np.ndarray:
    """Return what the network sees of each engine, shape (engines, 4)."""
    new_tokens = request.prompt_tokens - engines.hit_tokens
    seen = (engines.prefill_tokens, engines.inflight, engines.kv_usage * 100, new_tokens)
    return np.log1p(np.column_stack(seen)).astype(np.float32)
