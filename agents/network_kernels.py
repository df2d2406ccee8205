"""The set network as two functions with gradients of their own: :func:`choice_logits`, :func:`state_summary`.

The matrices of these networks are so small that what torch does around their products takes longer than the products:
a pass over memory and a call for each addition, mask, maximum and their gradients. Here compiled loops do at once what
is between two products, and the gradients are written out, so that no graph of dozens of nodes is built and walked. For
tensors of float32 on the CPU; features and masks get no gradient.
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

MASKED_LOGIT = -1e8  # as in sb3-contrib: probability zero, yet finite

Array = npt.NDArray[np.float32]
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def choice_logits(
    items: Tensor,
    context: Tensor,
    mask: Tensor,
    encoder: tuple[Tensor, Tensor, Tensor],
    hidden: tuple[Tensor, Tensor],
    pooled: Tensor | None,
    head: Tensor,
    prior: Tensor,
) -> Tensor:
    """Return the logits of candidates, shape (batch, candidates); :data:`MASKED_LOGIT` where the mask is 0.

    Args:
        items: features of the candidates, shape (batch, candidates, features).
        context: features of what they share, shape (batch, context features).
        mask: 1.0 where a candidate may be chosen, else 0.0, shape (batch, candidates).
        encoder: E, shape (width, features), R, shape (width, context features), and b, shape (width,), of
            ``h_i = relu(E x_i + R g + b)``.
        hidden: S, shape (width, width), and c, shape (width,), of ``s_i = relu(S h_i + P p + c)``, where p is the mean
            and the maximum of h over the candidates that may be chosen.
        pooled: P, shape (width, 2 width); None leaves p out.
        head: w, shape (width,), of ``logit_i = w . s_i + v . x_i``.
        prior: v, shape (features,).
    """
    return _evaluate(_Choice, items, context, mask, *encoder, *hidden, pooled, head, prior)


def state_summary(
    items: Tensor,
    context: Tensor,
    mask: Tensor,
    encoder: tuple[Tensor, Tensor, Tensor],
    summary: tuple[Tensor, Tensor],
) -> Tensor:
    """Return ``relu(K [p, g] + k)``, which is what a critic knows of a state, shape (batch, width).

    Args:
        items: as for :func:`choice_logits`; so are the context, the mask, the encoder, and p and g.
        context: see there.
        mask: see there.
        encoder: see there.
        summary: K, shape (width, 2 width + context features), and k, shape (width,).
    """
    return _evaluate(_Summary, items, context, mask, *encoder, *summary)


def _evaluate(function: Any, *arguments: Tensor | None) -> Tensor:
    # Without a gradient: what torch does around the call takes as long as the call with the batches of a rollout.
    result: Tensor = function.apply(*arguments) if torch.is_grad_enabled() else function.forward(_Forgetful, *arguments)
    return result


class _Forgetful:
    """In place of a function's context, where nothing asks for a gradient."""

    @staticmethod
    def save_for_backward(*tensors: Tensor) -> None:
        pass


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, items: Tensor, context: Tensor, mask: Tensor, *weights: Any) -> Tensor:
        *encoder, hidden_weight, hidden_bias, pooled_weight, head, prior = weights
        items, hidden, pooled = _encode(items, context, mask, *encoder)
        second = (_rows(hidden) @ hidden_weight.t()).view_as(hidden)
        if pooled_weight is None:
            shared = hidden_bias.expand(len(items), -1).contiguous()
        else:
            shared = torch.addmm(hidden_bias, pooled.flatten(1), pooled_weight.t())
        logits = torch.mv(_rows(items), prior).view(mask.shape)
        _add_scores(*_arrays(second, shared, head, mask, logits))
        ctx.save_for_backward(items, context, mask, hidden, pooled, second, shared, hidden_weight, pooled_weight, head)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        items, context, mask, hidden, pooled, second, shared, hidden_weight, pooled_weight, head = ctx.saved_tensors
        d_logits = d_logits * mask
        d_second, d_shared, d_head = _like(second), _like(shared), _like(head)
        _score_gradient(*_arrays(second, shared, head, d_logits, d_second, d_shared, d_head))
        d_hidden = (_rows(d_second) @ hidden_weight).view_as(hidden)
        d_pooled = d_pooled_weight = None
        if pooled_weight is not None:
            d_pooled = (d_shared @ pooled_weight).view_as(pooled)
            d_pooled_weight = d_shared.t() @ pooled.flatten(1)
        return (
            None,
            None,
            None,
            *_encoder_gradient(items, context, mask, hidden, pooled, d_hidden, d_pooled),
            _rows(d_second).t() @ _rows(hidden),
            d_shared.sum(0),
            d_pooled_weight,
            d_head,
            torch.mv(_rows(items).t(), d_logits.flatten()),
        )


class _Summary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, items: Tensor, context: Tensor, mask: Tensor, *weights: Tensor) -> Tensor:
        *encoder, weight, bias = weights
        items, hidden, pooled = _encode(items, context, mask, *encoder)
        known = torch.cat([pooled.flatten(1), context], dim=1)
        latent = torch.addmm(bias, known, weight.t()).relu_()
        ctx.save_for_backward(items, context, mask, hidden, pooled, known, latent, weight)
        return latent

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_latent: Tensor) -> tuple[Tensor | None, ...]:
        items, context, mask, hidden, pooled, known, latent, weight = ctx.saved_tensors
        above = d_latent * (latent > 0)
        d_pooled = (above @ weight[:, : pooled[0].numel()]).view_as(pooled)
        encoder = _encoder_gradient(items, context, mask, hidden, pooled, None, d_pooled)
        return None, None, None, *encoder, above.t() @ known, above.sum(0)


def _encode(
    items: Tensor, context: Tensor, mask: Tensor, item_weight: Tensor, context_weight: Tensor, item_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the items, contiguous; h, shape (batch, candidates, width); its mean and maximum, (batch, 2, width)."""
    items = items.contiguous()
    hidden = (_rows(items) @ item_weight.t()).view(*items.shape[:2], -1)
    # The bias goes to the context, which has fewer rows than there are candidates.
    shared = torch.addmm(item_bias, context, context_weight.t())
    pooled = hidden.new_empty((len(hidden), 2, hidden.shape[-1]))
    _embed_and_pool(*_arrays(hidden, shared, mask, pooled))
    return items, hidden, pooled


def _encoder_gradient(
    items: Tensor,
    context: Tensor,
    mask: Tensor,
    hidden: Tensor,
    pooled: Tensor,
    d_hidden: Tensor | None,
    d_pooled: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of E, R and b."""
    d_pooled = torch.zeros_like(pooled) if d_pooled is None else d_pooled
    d_embedded = _like(hidden) if d_hidden is None else d_hidden
    d_shared = hidden.new_empty((len(hidden), hidden.shape[-1]))
    _embed_and_pool_gradient(d_hidden is not None, *_arrays(mask, hidden, pooled, d_pooled, d_embedded, d_shared))
    # This way round MKL takes two thirds of the time that the product of the transposed ones takes.
    return (_rows(items).t() @ _rows(d_embedded)).t(), d_shared.t() @ context, d_shared.sum(0)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)  # contiguous, whatever the other one is


def _arrays(*tensors: Tensor) -> list[Array]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _jit(function: FunctionT) -> FunctionT:
    # Additions may change their order, so that loops become vector instructions; infinities and NaN stay what they are.
    fastmath = {"reassoc", "contract", "nsz"}
    return compiled(function, fastmath=fastmath, error_model="numpy", boundscheck=False)


@_jit
def _embed_and_pool(hidden: Any, shared: Any, mask: Any, pooled: Any) -> None:
    """Make ``hidden`` the embeddings in place; the loops are apart and the maximum changes rows to be vectorised."""
    batch, count, width = hidden.shape
    mean = np.empty(width, dtype=np.float32)
    largest, higher = np.empty(width, dtype=np.float32), np.empty(width, dtype=np.float32)
    for b in range(batch):
        mean[:] = np.float32(0.0)
        largest[:] = np.float32(0.0)  # embeddings are never negative
        present = np.float32(0.0)
        for i in range(count):
            shown = mask[b, i]
            present += shown
            for j in range(width):
                hidden[b, i, j] = max(hidden[b, i, j] + shared[b, j], np.float32(0.0)) * shown
            for j in range(width):
                mean[j] += hidden[b, i, j]
            for j in range(width):
                higher[j] = max(largest[j], hidden[b, i, j])
            largest, higher = higher, largest
        share = np.float32(1.0) / max(present, np.float32(1.0))
        for j in range(width):
            pooled[b, 0, j] = mean[j] * share
        for j in range(width):
            pooled[b, 1, j] = largest[j]


@_jit
def _embed_and_pool_gradient(
    has_own: bool, mask: Any, hidden: Any, pooled: Any, d_pooled: Any, d_embedded: Any, d_shared: Any
) -> None:
    """Make ``d_embedded`` the gradient before the rectifier; if ``has_own``, it holds that of the embeddings."""
    batch, count, width = hidden.shape
    of_largest = np.empty(width, dtype=np.float32)
    for b in range(batch):
        d_shared[b, :] = np.float32(0.0)
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
                slope += d_embedded[b, i, j] if has_own else np.float32(0.0)
                slope += of_largest[j] if hidden[b, i, j] == pooled[b, 1, j] else np.float32(0.0)
                slope = slope if hidden[b, i, j] > 0.0 else np.float32(0.0)
                d_embedded[b, i, j] = slope
                d_shared[b, j] += slope


@_jit
def _add_scores(candidates: Any, shared: Any, weights: Any, mask: Any, logits: Any) -> None:
    batch, count, width = candidates.shape
    for b in range(batch):
        for i in range(count):
            total = np.float32(0.0)
            for j in range(width):
                total += max(candidates[b, i, j] + shared[b, j], np.float32(0.0)) * weights[j]
            logits[b, i] = logits[b, i] + total if mask[b, i] > 0.0 else np.float32(MASKED_LOGIT)


@_jit
def _score_gradient(
    candidates: Any, shared: Any, weights: Any, d_logits: Any, d_candidates: Any, d_shared: Any, d_weights: Any
) -> None:
    batch, count, width = candidates.shape
    d_weights[:] = np.float32(0.0)
    for b in range(batch):
        d_shared[b, :] = np.float32(0.0)
        for i in range(count):
            above = d_logits[b, i]
            for j in range(width):
                value = candidates[b, i, j] + shared[b, j]
                slope = above * weights[j] if value > 0.0 else np.float32(0.0)
                d_candidates[b, i, j] = slope
                d_shared[b, j] += slope
                d_weights[j] += above * max(value, np.float32(0.0))
