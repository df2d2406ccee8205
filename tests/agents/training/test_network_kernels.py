"""The network's functions against the same in plain torch, with the gradients; its distribution, too."""

from __future__ import annotations

import pytest
import torch
from sb3_contrib.common.maskable.distributions import MaskableCategorical
from torch import Tensor

from servegym.agents.network_kernels import MASKED_LOGIT, choice_logits, state_summary
from servegym.agents.networks import UncheckedCategorical

BATCH, WIDTH, FEATURES, SHARED = 40, 6, 5, 3


def plain_encode(items: Tensor, context: Tensor, mask: Tensor, encoder: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    own, shared, bias = encoder
    hidden = torch.relu(items @ own.T + (context @ shared.T + bias).unsqueeze(-2)) * mask.unsqueeze(-1)
    mean = hidden.sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1.0)
    return hidden, torch.cat([mean, hidden.amax(-2)], dim=-1)


def plain_logits(
    items: Tensor,
    context: Tensor,
    mask: Tensor,
    encoder: tuple[Tensor, ...],
    hidden: tuple[Tensor, ...],
    pooled: Tensor | None,
    head: Tensor,
    prior: Tensor,
) -> Tensor:
    embedded, summary = plain_encode(items, context, mask, encoder)
    shared = hidden[1] if pooled is None else (summary @ pooled.T + hidden[1]).unsqueeze(-2)
    logits = torch.relu(embedded @ hidden[0].T + shared) @ head + items @ prior
    return torch.where(mask > 0, logits, MASKED_LOGIT)


def plain_summary(
    items: Tensor, context: Tensor, mask: Tensor, encoder: tuple[Tensor, ...], summary: tuple[Tensor, ...]
) -> Tensor:
    _, pooled = plain_encode(items, context, mask, encoder)
    return torch.relu(torch.cat([pooled, context], dim=-1) @ summary[0].T + summary[1])


def drawn_states(count: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    items = torch.randn(BATCH, count, FEATURES)
    items[: BATCH // 2, 1] = items[: BATCH // 2, 0]  # equal candidates share the gradient of the maximum
    mask = (torch.rand(BATCH, count) < 0.7).float()
    mask[0] = 0.0
    return items, torch.randn(BATCH, SHARED), mask


def weights(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def drawn_encoder() -> tuple[Tensor, Tensor, Tensor]:
    return weights(WIDTH, FEATURES), weights(WIDTH, SHARED), weights(WIDTH)


def assert_equal_with_gradients(found: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(found, expected)
    above = torch.randn(found.shape)
    pairs = [torch.autograd.grad(answer, inputs, above) for answer in (found, expected)]
    for one, other in zip(*pairs, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("pools", [True, False])
def test_logits_are_those_of_plain_torch(count: int, pools: bool) -> None:
    states, encoder = drawn_states(count), drawn_encoder()
    hidden, head, prior = (weights(WIDTH, WIDTH), weights(WIDTH)), weights(WIDTH), weights(FEATURES)
    pooled = weights(WIDTH, 2 * WIDTH) if pools else None
    given = (*states, encoder, hidden, pooled, head, prior)
    found, expected = (function(*given) for function in (choice_logits, plain_logits))
    inputs = [*encoder, *hidden, head, prior] + ([] if pooled is None else [pooled])
    assert_equal_with_gradients(found, expected, *inputs)
    with torch.no_grad():
        assert torch.equal(choice_logits(*given), found)


@pytest.mark.parametrize("count", [2, 5])
def test_a_summary_is_that_of_plain_torch(count: int) -> None:
    states, encoder = drawn_states(count), drawn_encoder()
    summary = weights(WIDTH, 2 * WIDTH + SHARED), weights(WIDTH)
    found, expected = (function(*states, encoder, summary) for function in (state_summary, plain_summary))
    assert_equal_with_gradients(found, expected, *encoder, *summary)
    with torch.no_grad():
        assert torch.equal(state_summary(*states, encoder, summary), found)


def test_features_may_be_a_part_of_what_is_observed() -> None:
    (items, context, mask), encoder = drawn_states(3), drawn_encoder()
    summary = weights(WIDTH, 2 * WIDTH + SHARED), weights(WIDTH)
    wide = torch.cat([items, torch.randn(BATCH, 3, 2)], dim=-1)
    part = wide[..., :FEATURES]
    assert not part.is_contiguous()
    found, expected = (state_summary(features, context, mask, encoder, summary) for features in (part, items))
    assert torch.equal(found, expected)


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
