"""servegym: a reinforcement-learning scheduling research platform for serving Mixture-of-Experts models with vLLM.

Importing the package registers its environments with Gymnasium, where that is installed, and loads nothing heavy.
"""

from __future__ import annotations

import contextlib

__version__ = "0.1.0"


ENVIRONMENTS = {
    "servegym/EngineDispatch-v0": "servegym.envs.engine_dispatch:EngineDispatchEnv",
    "servegym/RequestOrdering-v0": "servegym.envs.request_ordering:RequestOrderingEnv",
    "servegym/RequestTuning-v0": "servegym.envs.request_tuning:RequestTuningEnv",
    "servegym/ExpertPlacement-v0": "servegym.envs.expert_placement:ExpertPlacementEnv",
    "servegym/MultiLayer-v0": "servegym.envs.multi_layer:MultiLayerEnv",
}

# Environments that are stepped together by one call, for `gymnasium.make_vec`.
VECTOR_ENVIRONMENTS = {"servegym/EngineDispatch-v0": "servegym.envs.dispatch_lanes:EngineDispatchVectorEnv"}


def register_envs() -> None:
    """Register the environments; safe to call twice."""
    from gymnasium.envs.registration import register, registry

    for name, entry_point in ENVIRONMENTS.items():
        if name not in registry:
            register(id=name, entry_point=entry_point, vector_entry_point=VECTOR_ENVIRONMENTS.get(name))


# Inside an engine, where only policies run, Gymnasium may be absent.
with contextlib.suppress(ModuleNotFoundError):
    register_envs()
