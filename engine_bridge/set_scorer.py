"""The networks without torch: numpy for a live router or scheduler, plain loops for the simulator's kernel.

The formulas stand in :mod:`servegym.agents.networks`, where the networks are trained; the weights keep their names and
shapes from there. All forms here compute the same scores as torch to about 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from servegym.baselines.features import Float32Array, fill_dispatch_features
from servegym.baselines.heuristic import TURN
from servegym.baselines.interface import E_AVAILABLE, R_LAST_ENGINE, FloatArray
from servegym.baselines.queue_features import fill_queue_context, fill_request_features
from servegym.compilation import compiled

Names = tuple[str, ...]

# Features of an item and of the context, width; the packed weights follow.
_HEADER = 3


def weight_shapes(items: int, context: int, width: int, pooled: bool) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each weight, as torch stores them: (outputs, inputs).

    Args:
        items: features of a candidate.
        context: features of what the candidates share.
        width: hidden units.
        pooled: whether a candidate's logit depends on the other ones.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.item.weight": (width, items),
        "encoder.item.bias": (width,),
        "encoder.context.weight": (width, context),
        "hidden.weight": (width, width),
        "hidden.bias": (width,),
        "pooled.weight": (width, 2 * width),
        "head.weight": (1, width),
        "prior.weight": (1, items),
    }
    if not pooled:
        del shapes["pooled.weight"]
    return shapes


def widened(
    weights: Mapping[str, Float32Array], own: tuple[Names, Names], known: tuple[Names, Names]
) -> dict[str, Float32Array]:
    """Return the weights of the same network over more features, those of the others 0.

    Args:
        weights: as of :func:`weight_shapes`.
        own: names of the features of a candidate and of the context that the network sees.
        known: names of those that it is to see; ``own`` among them.
    """
    found = dict(weights)
    for name, kind in (("encoder.item.weight", 0), ("prior.weight", 0), ("encoder.context.weight", 1)):
        wide = np.zeros((len(weights[name]), len(known[kind])), dtype=np.float32)
        wide[:, [known[kind].index(feature) for feature in own[kind]]] = weights[name]
        found[name] = wide
    return found


class SetScorer:
    """Logits of a decision's candidates by a dozen numpy calls. Holds no state between calls: threads may share it.

    Args:
        weights: float32 arrays with the names and shapes of :func:`weight_shapes`.
    """

    def __init__(self, weights: Mapping[str, Float32Array]) -> None:
        self.weights = dict(weights)
        transposed = {name: np.ascontiguousarray(array.T, dtype=np.float32) for name, array in weights.items()}
        self._item = transposed["encoder.item.weight"]
        self._item_bias = transposed["encoder.item.bias"]
        self._context = transposed["encoder.context.weight"]
        self._hidden = transposed["hidden.weight"]
        self._hidden_bias = transposed["hidden.bias"]
        self._pooled = transposed.get("pooled.weight")
        self._head = transposed["head.weight"][:, 0]
        self._prior = transposed["prior.weight"][:, 0]

    def logits(self, items: Float32Array, context: Float32Array, eligible: npt.NDArray[np.bool_]) -> Float32Array:
        """Return the logits, shape (candidates,); those of candidates that may not be chosen mean nothing.

        Args:
            items: features of the candidates, shape (candidates, features).
            context: features of what they share, shape (features,).
            eligible: which may be chosen, shape (candidates,).
        """
        hidden = items @ self._item
        hidden += context @ self._context + self._item_bias
        np.maximum(hidden, 0.0, out=hidden)
        shared = self._hidden_bias
        if self._pooled is not None:
            count = int(np.count_nonzero(eligible))
            if count < len(eligible):
                hidden[~eligible] = 0.0
            mean = np.add.reduce(hidden, axis=0) / np.float32(max(count, 1))
            # 0 is below every embedding, which come out of a relu
            pooled = np.concatenate((mean, np.maximum.reduce(hidden, axis=0, initial=0.0)))
            shared = pooled @ self._pooled + shared
        scored = hidden @ self._hidden
        scored += shared
        np.maximum(scored, 0.0, out=scored)
        logits: Float32Array = scored @ self._head + items @ self._prior
        return logits

    def packed(self) -> FloatArray:
        """Return the widths and weights in one row, as the compiled forms read them."""
        width, items = self.weights["encoder.item.weight"].shape
        context = self.weights["encoder.context.weight"].shape[1]
        names = weight_shapes(items, context, width, self._pooled is not None)
        sizes = np.array([items, context, width])
        return np.concatenate([sizes, *(self.weights[name].T.ravel() for name in names)]).astype(np.float64)


def compiled_dispatch(request: FloatArray, engines: FloatArray, params: FloatArray, out: FloatArray) -> None:
    """Fill ``out`` with the scores of engines, lower is better: the form that the simulator compiles.

    Args:
        request: row of ``R_*`` entries, shape (REQUEST_COLUMNS,).
        engines: matrix of ``E_*`` columns, shape (engines, ENGINE_COLUMNS).
        params: result of :meth:`SetScorer.packed`, of a network over all ``ENGINE_FEATURES``.
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

    first = int(request[R_LAST_ENGINE]) + 1
    for i in range(count):
        if engines[i, E_AVAILABLE] > 0.0:
            out[i] = TURN * ((i - first) % count)
            for k in range(inputs):
                out[i] -= features[i, k] * params[prior_at + k]
        else:
            out[i] = np.inf
    linear = True
    for j in range(width):
        linear = linear and params[head_at + j] == 0.0
    if linear:
        return

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
    for i in range(count):
        if engines[i, E_AVAILABLE] > 0.0:
            scored[:] = shared
            _add_product(hidden[i], params, item_at, scored)
            for j in range(width):
                out[i] -= max(scored[j], 0.0) * params[head_at + j]


def compiled_admission(request: FloatArray, context: FloatArray, params: FloatArray) -> float:
    """Return the score of a waiting request, lower is better: the form that the simulator compiles.

    Args:
        request: row of ``Q_*`` entries, shape (QUEUE_COLUMNS,).
        context: row of ``C_*`` entries, shape (CONTEXT_COLUMNS,).
        params: result of :meth:`SetScorer.packed`, of a network over all ``REQUEST_OWN_FEATURES``.
    """
    inputs, shared, width = int(params[0]), int(params[1]), int(params[2])
    features = np.empty(inputs, dtype=np.float32)
    context_features = np.empty(shared, dtype=np.float32)
    fill_request_features(request, context, features)
    fill_queue_context(context, context_features)

    item_at = _HEADER
    bias_at = item_at + inputs * width
    context_at = bias_at + width
    hidden_at = context_at + shared * width
    hidden_bias_at = hidden_at + width * width
    head_at = hidden_bias_at + width
    prior_at = head_at + width

    hidden = params[bias_at:context_at].copy()
    _add_product(context_features, params, context_at, hidden)
    _add_product(features, params, item_at, hidden)
    scored = params[hidden_bias_at:head_at].copy()
    _add_product(np.maximum(hidden, 0.0), params, hidden_at, scored)
    logit = np.zeros(1)
    _add_product(np.maximum(scored, 0.0), params, head_at, logit)
    _add_product(features, params, prior_at, logit)
    return -float(logit[0])


@compiled
def _add_product(vector: npt.NDArray[Any], params: FloatArray, at: int, out: FloatArray) -> None:
    """Add ``vector @ matrix`` to ``out``, where the matrix stands row by row from ``params[at]`` on."""
    width = len(out)
    for k in range(len(vector)):
        for j in range(width):  # outputs innermost: the compiler makes vector instructions of it
            out[j] += vector[k] * params[at + k * width + j]
