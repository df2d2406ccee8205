"""The dispatch network without torch: numpy for a live router, plain loops for the simulator's kernel.

The formula stands in :mod:`servegym.agents.networks`, where the network is trained; the weights keep their names and
shapes from there. Both forms here compute the same scores as torch to about 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

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

    # Loops run over the outputs innermost, which the compiler turns into vector instructions.
    shared = params[bias_at:request_at].copy()
    for k in range(context):
        for j in range(width):
            shared[j] += request_features[k] * params[request_at + k * width + j]
    hidden = np.zeros((count, width))
    pooled = np.zeros(2 * width)
    present = 0
    for i in range(count):
        if engines[i, E_AVAILABLE] <= 0.0:
            continue
        present += 1
        row = hidden[i]
        for j in range(width):
            row[j] = shared[j]
        for k in range(inputs):
            for j in range(width):
                row[j] += features[i, k] * params[engine_at + k * width + j]
        for j in range(width):
            row[j] = max(row[j], 0.0)
            pooled[j] += row[j]
            pooled[width + j] = max(pooled[width + j], row[j])
    for j in range(width):
        pooled[j] /= max(present, 1)

    shared[:] = params[item_bias_at:pooled_at]
    for k in range(2 * width):
        for j in range(width):
            shared[j] += pooled[k] * params[pooled_at + k * width + j]
    scored = np.empty(width)
    first = int(request[R_LAST_ENGINE]) + 1
    for i in range(count):
        if engines[i, E_AVAILABLE] <= 0.0:
            out[i] = np.inf
            continue
        scored[:] = shared
        for k in range(width):
            for j in range(width):
                scored[j] += hidden[i, k] * params[item_at + k * width + j]
        logit = 0.0
        for j in range(width):
            logit += max(scored[j], 0.0) * params[head_at + j]
        for k in range(inputs):
            logit += features[i, k] * params[prior_at + k]
        out[i] = TURN * ((i - first) % count) - logit
