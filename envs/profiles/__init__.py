"""Profiles: how long a step of one model on one hardware takes, as YAML files and as tables for the simulator.

:mod:`.profile` has the format and :func:`load_profile`; :mod:`.kernel_tables` builds profiles from public kernel tables
and :mod:`.cpu_table` the one of the CPU engine.
"""

from servegym.envs.profiles.profile import (
    EngineLimits,
    ExpertShape,
    Profile,
    StepCost,
    StepTime,
    TokenCurve,
    load_profile,
)
from servegym.envs.profiles.rates import decode_step_s, prefill_tokens_per_s

__all__ = [
    "EngineLimits",
    "ExpertShape",
    "Profile",
    "StepCost",
    "StepTime",
    "TokenCurve",
    "decode_step_s",
    "load_profile",
    "prefill_tokens_per_s",
]
