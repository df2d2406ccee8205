"""Prompt templates that requests share: system prompts, tool descriptions, few-shot examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from servegym.configuration import Config
from servegym.envs.workloads.distributions import (
    Distribution,
    Int32,
    NonNegative,
    PositiveInt,
    choose,
    sample_whole,
    zipf_weights,
)


class Templates(Config):
    """A family of templates; a session has one of them, or none, for all its turns."""

    count: PositiveInt = Field(description="distinct templates")
    tokens: Distribution = Field(description="length of each template, drawn once")
    share: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="share of sessions with one of these")
    zipf_exponent: NonNegative = Field(default=1.0, description="popularity: template k has the share (k + 1) ** -this")
    placement: Literal["before_prompt", "within_prompt"] = Field(
        default="before_prompt", description="on top of prompt_tokens, or the first of them"
    )


def assign_templates(
    families: Sequence[Templates], which: np.random.Generator, lengths: np.random.Generator, count: int
) -> tuple[Int32, Int32, Int32]:
    """Give each of ``count`` sessions a template.

    Args:
        families: template families; their shares add up to at most 1.
        which: generator of the choices.
        lengths: generator of the lengths of the templates.
        count: number of sessions.

    Returns:
        Template ids (-1 for none), tokens of the template, and how many of them come on top of the prompt. Shape
        (count,) each.
    """
    sizes, weights, added = [np.zeros(1, dtype=np.int32)], [np.zeros(1)], [np.zeros(1, dtype=np.int32)]
    for family in families:
        tokens = sample_whole(family.tokens, lengths, family.count)
        sizes.append(tokens)
        weights.append(family.share * zipf_weights(family.count, family.zipf_exponent))
        added.append(tokens if family.placement == "before_prompt" else np.zeros_like(tokens))
    probabilities = np.concatenate(weights)
    probabilities[0] = max(0.0, 1.0 - probabilities.sum())
    chosen = choose(probabilities, which, count)
    return (chosen - 1).astype(np.int32), np.concatenate(sizes)[chosen], np.concatenate(added)[chosen]
