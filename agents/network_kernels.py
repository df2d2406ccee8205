"""Parts of the set network as single passes over its arrays, with their gradients, compiled.

The matrices of these networks are so small that what torch does around their products, a pass over memory and a call
for each addition, mask, maximum and their gradients, takes longer than the products. These two functions do what is
between two products at once: :func:`embed_and_pool`, :func:`score`. For tensors of float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from servegym.compilation import compiled

Array = npt.NDArray[np.float32]
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def embed_and_pool(candidates: Tensor, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Add the context to each candidate, rectify, and pool over the candidates that may be chosen.

    Args:
        candidates: shape (batch, candidates, width).
        context: shape (batch, width).
        mask: 1.0 where a candidate may be chosen, else 0.0, shape (batch, candidates).

    Returns:
        The embeddings ``relu(candidates + context) * mask``, shape (batch, candidates, width), and their mean and
        maximum, shape (batch, 2, width); zeros where there is no candidate.
    """
    hidden, pooled = _EmbedAndPool.apply(candidates, context, mask)  # type: ignore[no-untyped-call]
    return hidden, pooled


def score(candidates: Tensor, context: Tensor, weights: Tensor) -> Tensor:
    """Return ``relu(candidates + context) @ weights``, shape (batch, candidates).

    Args:
        candidates: shape (batch, candidates, width).
        context: shape (batch, width).
        weights: shape (width,).
    """
    scores: Tensor = _Score.apply(candidates, context, weights)  # type: ignore[no-untyped-call]
    return scores


class _EmbedAndPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, candidates: Tensor, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = _like(candidates)
        pooled = candidates.new_empty((len(candidates), 2, candidates.shape[-1]))
        _embed_and_pool(*_arrays(candidates, context, mask, hidden, pooled))
        ctx.save_for_backward(mask, hidden, pooled)
        ctx.set_materialize_grads(False)
        return hidden, pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor | None, d_pooled: Tensor | None) -> tuple[Tensor, Tensor, None]:
        mask, hidden, pooled = ctx.saved_tensors
        if d_hidden is None:  # the critic uses the pooled vector alone
            d_hidden = hidden.new_empty((0, 0, 0))
        if d_pooled is None:
            d_pooled = torch.zeros_like(pooled)
        d_candidates, d_context = _like(hidden), hidden.new_empty((len(hidden), hidden.shape[-1]))
        _embed_and_pool_gradient(*_arrays(mask, hidden, pooled, d_hidden, d_pooled, d_candidates, d_context))
        return d_candidates, d_context, None


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, candidates: Tensor, context: Tensor, weights: Tensor) -> Tensor:
        scores = candidates.new_empty(candidates.shape[:2])
        _score(*_arrays(candidates, context, weights, scores))
        ctx.save_for_backward(candidates, context, weights)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        candidates, context, weights = ctx.saved_tensors
        gradients = _like(candidates), _like(context), _like(weights)
        _score_gradient(*_arrays(candidates, context, weights, d_scores, *gradients))
        return gradients


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)  # contiguous, whatever the other one is


def _arrays(*tensors: Tensor) -> list[Array]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _jit(function: FunctionT) -> FunctionT:
    # Additions may change their order, so that loops become vector instructions; infinities and NaN stay what they are.
    fastmath = {"reassoc", "contract", "nsz"}
    return compiled(function, fastmath=fastmath, error_model="numpy", boundscheck=False)


@_jit
def _embed_and_pool(candidates: Any, context: Any, mask: Any, hidden: Any, pooled: Any) -> None:
    batch, count, width = candidates.shape
    for b in range(batch):
        mean, largest = pooled[b, 0], pooled[b, 1]
        mean[:] = np.float32(0.0)
        largest[:] = np.float32(0.0)  # embeddings are never negative
        present = np.float32(0.0)
        for i in range(count):
            if mask[b, i] == 0.0:
                hidden[b, i, :] = np.float32(0.0)
                continue
            present += np.float32(1.0)
            for j in range(width):
                value = max(candidates[b, i, j] + context[b, j], np.float32(0.0))
                hidden[b, i, j] = value
                mean[j] += value
                largest[j] = max(largest[j], value)
        share = np.float32(1.0) / max(present, np.float32(1.0))
        for j in range(width):
            mean[j] *= share


@_jit
def _embed_and_pool_gradient(
    mask: Any, hidden: Any, pooled: Any, d_hidden: Any, d_pooled: Any, d_candidates: Any, d_context: Any
) -> None:
    batch, count, width = hidden.shape
    of_largest = np.empty(width, dtype=np.float32)
    hidden_used = d_hidden.size > 0
    for b in range(batch):
        d_context[b, :] = np.float32(0.0)
        of_largest[:] = np.float32(0.0)
        present = np.float32(0.0)
        for i in range(count):
            present += mask[b, i]
            for j in range(width):
                of_largest[j] += np.float32(hidden[b, i, j] == pooled[b, 1, j])
        share = np.float32(1.0) / max(present, np.float32(1.0))
        for j in range(width):
            of_largest[j] = d_pooled[b, 1, j] / of_largest[j]  # equal candidates share it
        for i in range(count):
            for j in range(width):
                slope = d_pooled[b, 0, j] * share
                slope += d_hidden[b, i, j] if hidden_used else np.float32(0.0)
                slope += of_largest[j] if hidden[b, i, j] == pooled[b, 1, j] else np.float32(0.0)
                slope = slope if hidden[b, i, j] > 0.0 else np.float32(0.0)
                d_candidates[b, i, j] = slope
                d_context[b, j] += slope


@_jit
def _score(candidates: Any, context: Any, weights: Any, scores: Any) -> None:
    batch, count, width = candidates.shape
    for b in range(batch):
        for i in range(count):
            total = np.float32(0.0)
            for j in range(width):
                total += max(candidates[b, i, j] + context[b, j], np.float32(0.0)) * weights[j]
            scores[b, i] = total


@_jit
def _score_gradient(
    candidates: Any, context: Any, weights: Any, d_scores: Any, d_candidates: Any, d_context: Any, d_weights: Any
) -> None:
    batch, count, width = candidates.shape
    d_weights[:] = np.float32(0.0)
    for b in range(batch):
        d_context[b, :] = np.float32(0.0)
        for i in range(count):
            above = d_scores[b, i]
            for j in range(width):
                value = candidates[b, i, j] + context[b, j]
                slope = above * weights[j] if value > 0.0 else np.float32(0.0)
                d_candidates[b, i, j] = slope
                d_context[b, j] += slope
                d_weights[j] += above * max(value, np.float32(0.0))
