"""Two figures that sum a profile up, as policies see them in ``EngineViews``."""

from __future__ import annotations

from functools import lru_cache

from servegym.envs.profiles.profile import Profile


@lru_cache(maxsize=64)
def prefill_tokens_per_s(profile: Profile) -> float:
    """Return the prefill rate, tokens/s: one chunk from an empty context that fills the token budget of a step."""
    budget = profile.engine.max_num_batched_tokens
    return budget / profile.compile(budget).step_s([(0, budget)], [])


@lru_cache(maxsize=64)
def decode_step_s(profile: Profile, sequences: int = 1, context: int = 1) -> float:
    """Return the duration of a decode step, seconds.

    Args:
        profile: the profile.
        sequences: decoding sequences, one token each.
        context: context length of each of them, tokens.
    """
    return profile.compile(sequences).step_s([], [context] * sequences)
