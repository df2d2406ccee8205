"""From a view to feature arrays: the only place that encodes what a learned policy sees.

Every feature has a fixed, documented scale, so that an observation means the same in training, in evaluation and on a
live cluster, and nothing is normalised per engine slot. One compiled function fills them everywhere.

Counts and token amounts enter as logarithms: in log space the product rules of the literature (LMetric: prefill work x
batch size) are linear, and the features stay of order one from an idle engine to an overloaded one. Relative features
compare an engine with the best one at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from servegym.baselines.interface import (
    E_AVAILABLE,
    E_DECODE_STEP_S,
    E_DISPATCHED_SINCE,
    E_FIRST_TOKEN_S,
    E_FRESH_TOKENS,
    E_HIT_TOKENS,
    E_INDEX_TOKENS,
    E_INFLIGHT,
    E_INFLIGHT_PROMPT_TOKENS,
    E_ITL_EWMA_S,
    E_KV_TOKENS,
    E_KV_USAGE,
    E_MAX_BATCHED_TOKENS,
    E_MAX_NUM_SEQS,
    E_MOE_PRESSURE,
    E_PREFILL_REQUESTS,
    E_PREFILL_TOKENS,
    E_PREFILL_TOKENS_PER_S,
    E_RUNNING,
    E_SESSION_HOME,
    E_TELEMETRY_AGE_S,
    E_TTFT_EWMA_S,
    E_UNCACHED_TOKENS,
    E_USER_HOME,
    E_WAITING,
    R_DEADLINE_S,
    R_LAST_ENGINE,
    R_NOW_S,
    R_PRIORITY,
    R_PROMPT_TOKENS,
    R_RECEIVED_TOKENS,
    R_TURN,
    EngineViews,
    FloatArray,
    RequestView,
)
from servegym.compilation import compiled

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Feature:
    """Name, meaning and range of one feature.

    Attributes:
        name: identity in bundles.
        meaning: formula and units.
        low: least value; rows of absent candidates are 0.
        high: largest value.
    """

    name: str
    meaning: str
    low: float = 0.0
    high: float = math.inf


ENGINE_FEATURES: tuple[Feature, ...] = (
    Feature(
        "log_prefill_work", "ln of uncached prefill tokens ahead of and in this request, in 1,000 tokens", low=-7.0
    ),
    Feature("log_batch", "ln(1 + requests in flight), minus ln 32", low=-4.0),
    Feature("log_prefill_queue", "ln(1 + outstanding prefill tokens / 1,000)"),
    Feature("log_prefill_requests", "ln(1 + requests without first token)"),
    Feature("log_waiting", "ln(1 + waiting requests), telemetry"),
    Feature("log_running", "ln(1 + running requests), telemetry, minus ln 32", low=-4.0),
    Feature("log_dispatched_since", "ln(1 + requests sent since the telemetry snapshot)"),
    Feature("kv_usage", "share of KV blocks in use, telemetry", high=1.0),
    Feature("telemetry_age", "ln(1 + age of the telemetry / 0.1 s)"),
    Feature("hit_share", "share of the prompt believed cached there", high=1.0),
    Feature("user_home", "1 at the engine that served this user last", high=1.0),
    Feature("session_home", "1 at the engine that served this session last", high=1.0),
    Feature("ttft", "ln(1 + moving average of TTFT / 0.1 s)"),
    Feature("itl", "ln(1 + moving average of ITL / 10 ms)"),
    Feature("batch_share", "requests in flight / max_num_seqs"),
    Feature("prompt_share", "prompt tokens in flight / KV capacity"),
    Feature("prefill_time", "ln(1 + prefill work / calibrated prefill rate / 0.1 s)"),
    Feature("decode_step", "ln of the calibrated decode step / 10 ms", low=-math.inf),
    Feature("relative_prefill_work", "log_prefill_work minus its minimum over available engines"),
    Feature("relative_batch", "log_batch minus its minimum over available engines"),
    Feature("relative_kv_usage", "kv_usage minus its minimum over available engines", high=1.0),
    Feature("prompt_above", "ln(prompt / mean prompt without first token there) x queueing, 0 if that is negative"),
    Feature("prompt_below", "ln(mean prompt without first token there / prompt) x queueing, 0 if that is negative"),
    Feature("prompt_work", "relative_prefill_work x ln(prompt / mean prompt in flight) x queueing", low=-math.inf),
    Feature("queue_work", "relative_prefill_work x queueing"),
    Feature("queue_batch", "relative_batch x queueing"),
    Feature("log_hit", "ln(1 + tokens believed cached there / 1,000)"),
    Feature("index_share", "tokens believed cached there, of all prompts / KV capacity"),
    Feature(
        "moe_pressure",
        "10 ln(load of the engine's EP ranks / mean of all ranks), telemetry, -10 to 10; 0 if unknown",
        low=-10.0,
        high=10.0,
    ),
    Feature("log_uncached_work", "ln of the tokens ahead and of this request believed not cached, in 1,000", low=-7.0),
    Feature("log_expected_ttft", "ln of the rest of the running prefill and all that follows, in 0.1 s", low=-math.inf),
    Feature("crowded_work", "10 relative_prefill_work x crowding"),
    Feature("crowded_batch", "relative_batch x crowding"),
    Feature("crowded_step", "decode_step x crowding", low=-math.inf),
    Feature(
        "resumed",
        "1 at the engine that took the last request, for one that lost its own after its first token",
        high=1.0,
    ),
)
"""Of an engine. New ones come last and none changes its meaning: bundles name those that they were trained with.

*Crowding* says how full the fullest engine is, of more than 16 the fullest sixteenth: 0 where 70 % of its
``max_num_seqs`` decode, 1 from 90 % on. Then requests wait for a slot in the batch and no longer for prefill.
*Queueing* is ``D / (1 + D) x (1 - crowding)`` for ``D`` the mean seconds of outstanding prefill of an engine: sizes are
kept apart while it is prefill that waits.
"""

REQUEST_FEATURES: tuple[Feature, ...] = (
    Feature("log_prompt", "ln of the prompt length in 1,000 tokens", low=-7.0),
    Feature("urgency", "1 / (1 + deadline in s), 0 without one", high=1.0),
    Feature("priority", "tanh(priority / 10)", low=-1.0, high=1.0),
    Feature("follow_up", "1 for a later turn of a session", high=1.0),
    Feature("log_engines", "ln of the number of available engines"),
    Feature("mean_log_batch", "mean of log_batch over available engines", low=-4.0),
    Feature("mean_log_prefill_queue", "mean of log_prefill_queue over available engines"),
    Feature("mean_kv_usage", "mean of kv_usage over available engines", high=1.0),
)

ENGINE_FEATURE_NAMES = tuple(feature.name for feature in ENGINE_FEATURES)
REQUEST_FEATURE_NAMES = tuple(feature.name for feature in REQUEST_FEATURES)
_LARGEST_PRESSURE = math.e  # beyond it, a rank is as loaded as any; the inverse bounds idle ones
_LARGEST_SIZE = 2.0  # beyond it, a prompt is as large as any: the rarest ones must not outweigh all else
_CROWDED_FROM, _CROWDED_TO = 0.7, 0.9  # shares of max_num_seqs
_CROWD = 16  # engines of which one may be full: of more, one is by chance
_RELATIVE_TO = ((18, 0), (19, 1), (20, 7))  # relative feature -> the feature whose minimum it is relative to


@compiled
def _expected_ttft_s(request: FloatArray, engine: FloatArray, tokens: float) -> float:
    """Seconds until a request with so many uncached tokens would have its first token on an engine.

    What was sent before the engine's last first token is taken to be in the step that began with it, what was sent
    since in the one after. A step costs a decode step and a time for each token, which the calibrated rate of full
    steps gives.
    """
    step = engine[E_DECODE_STEP_S]
    token = 1.0 / engine[E_PREFILL_TOKENS_PER_S] - step / max(engine[E_MAX_BATCHED_TOKENS], 1.0)
    token = max(token, 0.1 / engine[E_PREFILL_TOKENS_PER_S])
    fresh = min(engine[E_FRESH_TOKENS], engine[E_UNCACHED_TOKENS])
    running = engine[E_UNCACHED_TOKENS] - fresh
    left = 0.0
    if running > 0.0:
        left = max(step + token * running - (request[R_NOW_S] - engine[E_FIRST_TOKEN_S]), 0.0)
    return left + step + token * (fresh + tokens)


@compiled
def _decoding_share(engine: FloatArray) -> float:
    return (engine[E_INFLIGHT] - engine[E_PREFILL_REQUESTS]) / engine[E_MAX_NUM_SEQS]


@compiled
def _nth_decoding_share(engines: FloatArray, n: int) -> float:
    """Return the n-th largest share over the available engines."""
    shares = np.zeros(engines.shape[0])
    for i in range(engines.shape[0]):
        if engines[i, E_AVAILABLE] > 0.0:
            shares[i] = _decoding_share(engines[i])
    shares.sort()
    return float(shares[engines.shape[0] - n])


@compiled
def fill_dispatch_features(
    request: FloatArray, engines: FloatArray, engine_features: Float32Array, request_features: Float32Array
) -> None:
    """Fill the features of one dispatch decision; rows of unavailable engines are zero.

    Args:
        request: row of ``R_*`` entries, shape (REQUEST_COLUMNS,).
        engines: matrix of ``E_*`` columns, shape (engines, ENGINE_COLUMNS).
        engine_features: output, shape (at least engines, len(ENGINE_FEATURES)); rows beyond are set to zero.
        request_features: output, shape (len(REQUEST_FEATURES),).
    """
    prompt = request[R_PROMPT_TOKENS]
    engine_features[:, :] = 0.0
    count, sum_batch, sum_queue, sum_kv = 0, 0.0, 0.0, 0.0
    sum_delay, sum_prompts, sum_inflight, fullest = 0.0, prompt, 1.0, 0.0
    for i in range(engines.shape[0]):
        engine = engines[i]
        if engine[E_AVAILABLE] <= 0.0:
            continue
        out = engine_features[i]
        hit = min(engine[E_HIT_TOKENS], prompt - 1.0)
        work = engine[E_PREFILL_TOKENS] + prompt - hit
        out[0] = math.log(work * 1e-3)
        out[1] = math.log1p(engine[E_INFLIGHT]) - math.log(32.0)
        out[2] = math.log1p(engine[E_PREFILL_TOKENS] * 1e-3)
        out[3] = math.log1p(engine[E_PREFILL_REQUESTS])
        out[4] = math.log1p(engine[E_WAITING])
        out[5] = math.log1p(engine[E_RUNNING]) - math.log(32.0)
        out[6] = math.log1p(engine[E_DISPATCHED_SINCE])
        out[7] = engine[E_KV_USAGE]
        out[8] = math.log1p(engine[E_TELEMETRY_AGE_S] * 10.0)
        out[9] = hit / prompt
        out[10] = engine[E_USER_HOME]
        out[11] = engine[E_SESSION_HOME]
        out[12] = math.log1p(engine[E_TTFT_EWMA_S] * 10.0)
        out[13] = math.log1p(engine[E_ITL_EWMA_S] * 100.0)
        out[14] = engine[E_INFLIGHT] / engine[E_MAX_NUM_SEQS]
        out[15] = engine[E_INFLIGHT_PROMPT_TOKENS] / engine[E_KV_TOKENS]
        out[16] = math.log1p(work / engine[E_PREFILL_TOKENS_PER_S] * 10.0)
        out[17] = math.log(engine[E_DECODE_STEP_S] * 100.0)
        if engine[E_PREFILL_REQUESTS] > 0.0:
            size = math.log(prompt * engine[E_PREFILL_REQUESTS] / max(engine[E_PREFILL_TOKENS], 1.0))
            out[21] = max(size, 0.0)
            out[22] = max(-size, 0.0)
        out[26] = math.log1p(hit * 1e-3)
        out[27] = engine[E_INDEX_TOKENS] / engine[E_KV_TOKENS]
        pressure = min(max(engine[E_MOE_PRESSURE], 1.0 / _LARGEST_PRESSURE), _LARGEST_PRESSURE)
        out[28] = 10.0 * math.log(pressure)
        out[29] = math.log((engine[E_UNCACHED_TOKENS] + prompt - hit) * 1e-3)
        out[30] = math.log(10.0 * _expected_ttft_s(request, engine, prompt - hit))
        fullest = max(fullest, _decoding_share(engine))
        sum_delay += engine[E_PREFILL_TOKENS] / engine[E_PREFILL_TOKENS_PER_S]
        sum_prompts += engine[E_INFLIGHT_PROMPT_TOKENS]
        sum_inflight += engine[E_INFLIGHT]
        count += 1
        sum_batch += out[1]
        sum_queue += out[2]
        sum_kv += out[7]
    for relative, base in _RELATIVE_TO:
        lowest = np.inf
        for i in range(engines.shape[0]):
            if engines[i, E_AVAILABLE] > 0.0:
                lowest = min(lowest, engine_features[i, base])
        for i in range(engines.shape[0]):
            if engines[i, E_AVAILABLE] > 0.0:
                engine_features[i, relative] = engine_features[i, base] - lowest
    present = max(count, 1)
    if count > _CROWD:
        fullest = _nth_decoding_share(engines, (count + _CROWD - 1) // _CROWD)
    crowding = min(max((fullest - _CROWDED_FROM) / (_CROWDED_TO - _CROWDED_FROM), 0.0), 1.0)
    queueing = sum_delay / (present + sum_delay) * (1.0 - crowding)
    size = min(max(math.log(prompt * sum_inflight / sum_prompts), -_LARGEST_SIZE), _LARGEST_SIZE)
    for i in range(engines.shape[0]):
        out = engine_features[i]
        out[21] *= queueing
        out[22] *= queueing
        out[23] = out[18] * size * queueing
        out[24] = out[18] * queueing
        out[25] = out[19] * queueing
        out[31] = 10.0 * out[18] * crowding
        out[32] = out[19] * crowding
        out[33] = out[17] * crowding
    last = int(request[R_LAST_ENGINE])
    if request[R_RECEIVED_TOKENS] > 0.0 and 0 <= last < engines.shape[0] and engines[last, E_AVAILABLE] > 0.0:
        engine_features[last, 34] = 1.0
    request_features[0] = math.log(prompt * 1e-3)
    request_features[1] = 1.0 / (1.0 + request[R_DEADLINE_S])
    request_features[2] = math.tanh(request[R_PRIORITY] * 0.1)
    request_features[3] = 1.0 if request[R_TURN] > 0 else 0.0
    request_features[4] = math.log(present)
    request_features[5] = sum_batch / present
    request_features[6] = sum_queue / present
    request_features[7] = sum_kv / present


def dispatch_features(request: RequestView, engines: EngineViews) -> tuple[Float32Array, Float32Array]:
    """Return the features of one dispatch decision.

    Returns:
        engine features, shape (engines, len(ENGINE_FEATURES)), and request features, shape (len(REQUEST_FEATURES),).
    """
    engine_features = np.empty((len(engines), len(ENGINE_FEATURES)), dtype=np.float32)
    request_features = np.empty(len(REQUEST_FEATURES), dtype=np.float32)
    fill_dispatch_features(request.row(), engines.data, engine_features, request_features)
    return engine_features, request_features
