"""From the trained torch network to what a bundle holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from servegym.agents.networks import Actor
from servegym.baselines.features import Float32Array


def actor_weights(actor: Actor) -> dict[str, Float32Array]:
    """Return copies of the weights by name."""
    return {name: tensor.detach().numpy().copy() for name, tensor in actor.state_dict().items()}


def torch_logits(
    actor: Actor,
) -> Callable[[Float32Array, Float32Array, npt.NDArray[np.bool_]], Float32Array]:
    """Return the network as a function of one decision: (item features, context features, eligible) -> logits."""

    def logits(items: Float32Array, context: Float32Array, eligible: npt.NDArray[np.bool_]) -> Float32Array:
        with torch.no_grad():
            inputs = (
                torch.from_numpy(np.asarray(array, dtype=np.float32))[None] for array in (items, context, eligible)
            )
            answer: Float32Array = actor(*inputs)[0].numpy()
        return answer

    return logits
