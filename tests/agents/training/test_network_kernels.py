"""The network's compiled passes against the same in plain torch, with the gradients; its distribution, too."""

from __future__ import annotations

import pytest
import torch
from sb3_contrib.common.maskable.distributions import MaskableCategorical
from torch import Tensor

from servegym.agents.network_kernels import embed_and_pool, score
from servegym.agents.networks import UncheckedCategorical


def plain_embed_and_pool(candidates: Tensor, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    hidden = torch.relu(candidates + context.unsqueeze(-2)) * mask.unsqueeze(-1)
    mean = hidden.sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1.0)
    return hidden, torch.stack([mean, hidden.amax(-2)], dim=1)


def drawn(batch: int, count: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    candidates = torch.randn(batch, count, width)
    candidates[: batch // 2, 1] = candidates[: batch // 2, 0]  # equal candidates share the gradient of the maximum
    mask = (torch.rand(batch, count) < 0.7).float()
    mask[0] = 0.0
    return candidates.requires_grad_(), torch.randn(batch, width, requires_grad=True), mask


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=["both", "embeddings", "pooled"])
def test_embedding_and_pooling_are_those_of_plain_torch(count: int, used: tuple[int, ...]) -> None:
    candidates, context, mask = drawn(40, count, 6)
    above = [torch.randn(40, count, 6), torch.randn(40, 2, 6)]
    answers = [function(candidates, context, mask) for function in (embed_and_pool, plain_embed_and_pool)]
    for found, expected in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad([answer[k] for k in used], (candidates, context), [above[k] for k in used])
        for answer in answers
    ]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_scores_are_those_of_plain_torch() -> None:
    candidates, context, _ = drawn(40, 5, 6)
    weights, above = torch.randn(6, requires_grad=True), torch.randn(40, 5)
    answers = [score(candidates, context, weights), torch.relu(candidates + context.unsqueeze(-2)) @ weights]
    torch.testing.assert_close(*answers)
    gradients = [torch.autograd.grad(answer, (candidates, context, weights), above) for answer in answers]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_distribution_is_that_of_sb3_contrib_and_draws_the_same_actions() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(500, 4), torch.rand(500, 4) < 0.7
    masks[:, 2] = True
    expected, found = MaskableCategorical(logits=logits, masks=masks), UncheckedCategorical(logits)
    assert (found.probs > 0).all()
    found.apply_masking(masks.numpy())
    torch.manual_seed(1)
    actions = expected.sample()
    torch.manual_seed(1)
    assert torch.equal(found.sample(), actions)
    torch.testing.assert_close(found.log_prob(actions), expected.log_prob(actions))
    torch.testing.assert_close(found.entropy(), expected.entropy())
    assert (found.probs[~masks] == 0).all()
