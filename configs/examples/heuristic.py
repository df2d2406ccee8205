"""A heuristic: the engine where the prompt would be prefilled first, a full KV cache counted against it.

servegym evaluate quick --policy mine=configs/examples/heuristic.py:SoonestPrefill
servegym deploy configs/examples/heuristic.py:SoonestPrefill,kv_weight=2 --cluster local
"""

from servegym.baselines.interface import EngineViews, FloatArray, RequestView


class SoonestPrefill:
    """Scores an engine by the seconds until it has prefilled all that waits there, and this prompt."""

    def __init__(self, kv_weight: float = 1.0) -> None:
        self.kv_weight = kv_weight

    def score(self, request: RequestView, engines: EngineViews) -> FloatArray:
        """Return one score per engine; the lowest wins."""
        tokens = engines.prefill_tokens + request.prompt_tokens - engines.hit_tokens
        return tokens / engines.prefill_tokens_per_s * (1 + self.kv_weight * engines.kv_usage)
