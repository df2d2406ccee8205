"""From a waiting queue to feature arrays: what a learned request policy sees.

Scales are fixed, as in :mod:`servegym.baselines.features`: amounts enter as logarithms, and relative features compare a
request with the others that are shown.
"""

from __future__ import annotations

import math

from servegym.baselines.features import Feature, Float32Array
from servegym.baselines.interface import (
    C_BLOCK_SIZE,
    C_FREE_BLOCKS,
    C_MAX_NUM_SEQS,
    C_PREFILL_TOKENS_PER_S,
    C_RUNNING,
    C_TOTAL_BLOCKS,
    C_WAITING,
    C_WAITING_TOKENS,
    Q_COMPUTED_TOKENS,
    Q_DEADLINE_S,
    Q_PREDICTED_TOKENS,
    Q_PREEMPTIONS,
    Q_PRIORITY,
    Q_PROMPT_TOKENS,
    Q_TURN,
    Q_WAIT_S,
    FloatArray,
)
from servegym.compilation import compiled

REQUEST_OWN_FEATURES: tuple[Feature, ...] = (
    Feature("log_prefill", "ln of the tokens to be computed, in 1,000 tokens", low=-7.0),
    Feature("log_wait", "ln(1 + wait / 0.1 s)"),
    Feature("prefill_time", "ln(1 + prefill at the calibrated rate / 0.1 s)"),
    Feature("kv_share", "KV blocks that it needs over free ones, at most 4", high=4.0),
    Feature("urgency", "1 / (1 + time to the deadline in s), 1 beyond it, 0 without one", high=1.0),
    Feature("priority", "tanh(priority / 10)", low=-1.0, high=1.0),
    Feature("follow_up", "1 for a later turn of a session", high=1.0),
    Feature("preempted", "1 if it was preempted", high=1.0),
    Feature("log_predicted", "ln(1 + predicted output tokens / 100); 0 without a prediction"),
)
"""What depends on a waiting request and its engine, not on the other requests."""
QUEUE_FEATURES: tuple[Feature, ...] = (
    *REQUEST_OWN_FEATURES,
    Feature("relative_prefill", "log_prefill minus its minimum over the requests shown"),
    Feature("relative_wait", "its maximum over the requests shown minus log_wait"),
)
QUEUE_CONTEXT_FEATURES: tuple[Feature, ...] = (
    Feature("log_waiting", "ln(1 + waiting requests)"),
    Feature("batch_share", "running requests / max_num_seqs"),
    Feature("kv_usage", "share of KV blocks in use", high=1.0),
    Feature("log_queue", "ln(1 + waiting prefill tokens / 1,000)"),
    Feature("queue_time", "ln(1 + their prefill at the calibrated rate / 0.1 s)"),
)
_RELATIVE_PREFILL, _RELATIVE_WAIT = 9, 10


@compiled
def fill_queue_features(
    queue: FloatArray, context: FloatArray, features: Float32Array, context_features: Float32Array
) -> None:
    """Fill the features of the first requests of a queue; rows beyond them are zero.

    Args:
        queue: rows of ``Q_*`` entries of the requests shown, shape (shown, QUEUE_COLUMNS).
        context: row of ``C_*`` entries, shape (CONTEXT_COLUMNS,).
        features: output, shape (at least shown, len(QUEUE_FEATURES)).
        context_features: output, shape (len(QUEUE_CONTEXT_FEATURES),).
    """
    features[:, :] = 0.0
    fill_admission_features(context, queue, features, context_features)
    shortest, longest_wait = math.inf, 0.0
    for i in range(queue.shape[0]):
        shortest = min(shortest, features[i, 0])
        longest_wait = max(longest_wait, features[i, 1])
    for i in range(queue.shape[0]):
        features[i, _RELATIVE_PREFILL] = features[i, 0] - shortest
        features[i, _RELATIVE_WAIT] = longest_wait - features[i, 1]


@compiled
def fill_admission_features(
    context: FloatArray, queue: FloatArray, features: Float32Array, context_features: Float32Array
) -> None:
    """Fill the features that do not depend on which requests are shown.

    Args:
        context: row of ``C_*`` entries, shape (CONTEXT_COLUMNS,).
        queue: rows of ``Q_*`` entries, shape (waiting, QUEUE_COLUMNS).
        features: output, shape (at least waiting, at least len(REQUEST_OWN_FEATURES)).
        context_features: output, shape (len(QUEUE_CONTEXT_FEATURES),).
    """
    for i in range(queue.shape[0]):
        fill_request_features(queue[i], context, features[i])
    fill_queue_context(context, context_features)


@compiled
def fill_request_features(request: FloatArray, context: FloatArray, out: Float32Array) -> None:
    """Fill the features of one waiting request that do not depend on the others.

    Args:
        request: row of ``Q_*`` entries, shape (QUEUE_COLUMNS,).
        context: row of ``C_*`` entries, shape (CONTEXT_COLUMNS,).
        out: output, shape (at least len(REQUEST_OWN_FEATURES),).
    """
    tokens = max(request[Q_PROMPT_TOKENS] - request[Q_COMPUTED_TOKENS], 1.0)
    wait = max(request[Q_WAIT_S], 0.0)
    out[0] = math.log(tokens * 1e-3)
    out[1] = math.log1p(wait * 10.0)
    out[2] = math.log1p(tokens / context[C_PREFILL_TOKENS_PER_S] * 10.0)
    out[3] = min(math.ceil(request[Q_PROMPT_TOKENS] / context[C_BLOCK_SIZE]) / max(context[C_FREE_BLOCKS], 1.0), 4.0)
    out[4] = 1.0 / (1.0 + max(request[Q_DEADLINE_S] - wait, 0.0))
    out[5] = math.tanh(request[Q_PRIORITY] * 0.1)
    out[6] = 1.0 if request[Q_TURN] > 0 else 0.0
    out[7] = 1.0 if request[Q_PREEMPTIONS] > 0 else 0.0
    predicted = request[Q_PREDICTED_TOKENS]
    out[8] = 0.0 if math.isnan(predicted) else math.log1p(predicted * 0.01)


@compiled
def fill_queue_context(context: FloatArray, out: Float32Array) -> None:
    """Fill the features of a queue and its engine.

    Args:
        context: row of ``C_*`` entries, shape (CONTEXT_COLUMNS,).
        out: output, shape (len(QUEUE_CONTEXT_FEATURES),).
    """
    out[0] = math.log1p(context[C_WAITING])
    out[1] = context[C_RUNNING] / context[C_MAX_NUM_SEQS]
    out[2] = 1.0 - context[C_FREE_BLOCKS] / context[C_TOTAL_BLOCKS]
    out[3] = math.log1p(context[C_WAITING_TOKENS] * 1e-3)
    out[4] = math.log1p(context[C_WAITING_TOKENS] / context[C_PREFILL_TOKENS_PER_S] * 10.0)
