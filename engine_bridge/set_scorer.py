"""The dispatch network without torch: numpy for a live router, plain loops for the simulator's kernel.

The formula stands in :mod:`servegym.agents.networks`, where the network is trained; the weights keep their names and
shapes from there. Both forms here compute the same scores as torch to about 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from servegym.baselines.features import Float32Array, fill_dispatch_features
from servegym.baselines.heuristic import TURN
from servegym.baselines.interface import E_AVAILABLE, R_LAST_ENGINE, FloatArray

# Engines, request, width; the packed weights follow.
_HEADER = 3


def weight_shapes(engine_features: int, request_features: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each weight, as torch stores them: (outputs, inputs)."""
    return {
        "encoder.engine.weight": (width, engine_features),
        "encoder.engine.bias": (width,),
        "encoder.request.weight": (width, request_features),
        "item.weight": (width, width),
        "item.bias": (width,),
        "pooled.weight": (width, 2 * width),
        "head.weight": (1, width),
        "prior.weight": (1, engine_features),
    }


class SetScorer:
    """Logits of the engines by a dozen numpy calls. Holds no state between calls, so that threads may share it.

    Args:
        weights: float32 arrays with the names and shapes of :func:`weight_shapes`.
    """

    def __init__(self, weights: Mapping[str, Float32Array]) -> None:
        self.weights = dict(weights)
        transposed = {name: np.ascontiguousarray(array.T, dtype=np.float32) for name, array in weights.items()}
        self._engine = transposed["encoder.engine.weight"]
        self._engine_bias = transposed["encoder.engine.bias"]
        self._request = transposed["encoder.request.weight"]
        self._item = transposed["item.weight"]
        self._item_bias = transposed["item.bias"]
        self._pooled = transposed["pooled.weight"]
        self._head = transposed["head.weight"][:, 0]
        self._prior = transposed["prior.weight"][:, 0]

    def logits(self, engines: Float32Array, request: Float32Array, available: npt.NDArray[np.bool_]) -> Float32Array:
        """Return the logits, shape (engines,); those of unavailable engines mean nothing.

        Args:
            engines: engine features, shape (engines, len(ENGINE_FEATURES)).
            request: request features, shape (len(REQUEST_FEATURES),).
            available: which engines take requests, shape (engines,).
        """
        hidden = engines @ self._engine
        hidden += request @ self._request + self._engine_bias
        np.maximum(hidden, 0.0, out=hidden)
        count = int(np.count_nonzero(available))
        if count < len(available):
            hidden[~available] = 0.0
        mean = np.add.reduce(hidden, axis=0) / np.float32(max(count, 1))
        # 0 is below every embedding, which come out of a relu
        pooled = np.concatenate((mean, np.maximum.reduce(hidden, axis=0, initial=0.0)))
        scored = hidden @ self._item
        scored += pooled @ self._pooled + self._item_bias
        np.maximum(scored, 0.0, out=scored)
        logits: Float32Array = scored @ self._head + engines @ self._prior
        return logits

    def packed(self) -> FloatArray:
        """Return the widths and weights in one row, as :func:`compiled_scores` reads them."""
        width, engine_features = self.weights["encoder.engine.weight"].shape
        sizes = np.array([engine_features, self.weights["encoder.request.weight"].shape[1], width])
        names = weight_shapes(*(int(size) for size in sizes))
        return np.concatenate([sizes, *(self.weights[name].T.ravel() for name in names)]).astype(np.float64)


def compiled_scores(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
    """Fill ``out`` with the scores, lower is better: the form that the simulator compiles.

    Args:
        request: row of ``R_*`` entries, shape (REQUEST_COLUMNS,).
        engines: matrix of ``E_*`` columns, shape (engines, ENGINE_COLUMNS).
        params: result of :meth:`SetScorer.packed`.
        out: output, shape (engines,); infinity at engines that take no requests.
    """
    count = engines.shape[0]
    inputs, context, width = int(params[0]), int(params[1]), int(params[2])
    features = np.empty((count, inputs), dtype=np.float32)
    request_features = np.empty(context, dtype=np.float32)
    fill_dispatch_features(request, engines, features, request_features)

    engine_at = _HEADER
    bias_at = engine_at + inputs * width
    request_at = bias_at + width
    item_at = request_at + context * width
    item_bias_at = item_at + width * width
    pooled_at = item_bias_at + width
    head_at = pooled_at + 2 * width * width
    prior_at = head_at + width

    shared = params[bias_at:request_at].copy()
    _add_product(request_features, params, request_at, shared)
    hidden = np.zeros((count, width))
    pooled = np.zeros(2 * width)
    present = 0
    for i in range(count):
        if engines[i, E_AVAILABLE] > 0.0:
            present += 1
            hidden[i] = shared
            _add_product(features[i], params, engine_at, hidden[i])
            for j in range(width):
                hidden[i, j] = max(hidden[i, j], 0.0)
                pooled[j] += hidden[i, j]
                pooled[width + j] = max(pooled[width + j], hidden[i, j])
    pooled[:width] /= max(present, 1)

    shared[:] = params[item_bias_at:pooled_at]
    _add_product(pooled, params, pooled_at, shared)
    scored = np.empty(width)
    logit = np.empty(1)
    first = int(request[R_LAST_ENGINE]) + 1
    for i in range(count):
        if engines[i, E_AVAILABLE] > 0.0:
            scored[:] = shared
            _add_product(hidden[i], params, item_at, scored)
            logit[0] = 0.0
            _add_product(np.maximum(scored, 0.0), params, head_at, logit)
            _add_product(features[i], params, prior_at, logit)
            out[i] = TURN * ((i - first) % count) - logit[0]
        else:
            out[i] = np.inf


@njit(cache=True)
def _add_product(vector: npt.NDArray[Any], params: FloatArray, at: int, out: FloatArray) -> None:
    """Add ``vector @ matrix`` to ``out``, where the matrix stands row by row from ``params[at]`` on."""
    width = len(out)
    for k in range(len(vector)):
        for j in range(width):  # outputs innermost: the compiler makes vector instructions of it
            out[j] += vector[k] * params[at + k * width + j]
