"""Multi-turn sessions: conversations and agents, whose prompts repeat all that went before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from servegym.configuration import Config
from servegym.envs.workloads.distributions import MOST_TOKENS, Distribution, Float, Int32

Flags = npt.NDArray[np.bool_]
Whole = npt.NDArray[np.integer[Any]]


class Sessions(Config):
    """How sessions go on. The prompt of a turn is the previous prompt + the previous output + ``append_tokens``.

    A turn that no longer fits the context length ends the session, or the agent compacts the conversation: its prompt
    starts again from the template and a summary of ``compact_tokens``.
    """

    turns: Distribution = Field(description="turns per session, rounded to whole numbers of at least 1")
    think_s: Distribution = Field(description="seconds between the end of a turn and the next one: a person, or a tool")
    append_tokens: Distribution = Field(description="new prompt tokens of a follow-up turn")
    compact_tokens: Distribution | None = Field(
        default=None, description="summary that a full conversation is replaced by; without it the session ends"
    )


@dataclass(frozen=True, slots=True)
class Turns:
    """Planned turns of sessions, all turns of a session in a row. Shape (turns,) each.

    Attributes:
        session: number of the session, not decreasing.
        turn: 0 for the first turn of a session.
        new_tokens: tokens of the prompt of a first turn, and new tokens of a later one.
        output_tokens: length of the output.
        think_s: seconds between the end of the previous turn and this one.
        template_tokens: length of the session's shared template, the beginning of every prompt.
        compact_tokens: length of the summary if this turn compacts the conversation; -1 where sessions end instead.
    """

    session: Int32
    turn: Int32
    new_tokens: Int32
    output_tokens: Int32
    think_s: Float
    template_tokens: Int32
    compact_tokens: Int32


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns with their full prompts. Shape (turns,) each.

    Attributes:
        prompt_tokens: whole prompt, history included.
        output_tokens: length of the output.
        kept: whether the turn takes place.
        fresh: whether the prompt does not repeat the turn before: a first turn, or one after a compaction.
    """

    prompt_tokens: Int32
    output_tokens: Int32
    kept: Flags
    fresh: Flags


def fit(prompt_tokens: Whole, output_tokens: Int32, max_tokens: int) -> tuple[Whole, Whole]:
    """Shorten requests to ``max_tokens`` tokens in all; the longer of prompt and output gives way.

    >>> [part.tolist() for part in fit(np.array([90, 30, 80]), np.array([20, 90, 70]), 100)]
    [[80, 30, 50], [20, 70, 50]]
    """
    smaller = np.minimum(np.minimum(prompt_tokens, output_tokens), max(max_tokens // 2, 1))
    larger = np.minimum(np.maximum(prompt_tokens, output_tokens), max_tokens - smaller)
    prompt_is_larger = prompt_tokens > output_tokens
    return np.where(prompt_is_larger, larger, smaller), np.where(prompt_is_larger, smaller, larger)


def converse(turns: Turns, max_tokens: int | None = None) -> Conversation:
    """Let the history of each session grow, turn by turn.

    Args:
        turns: the plan.
        max_tokens: prompt + output of a request, at most; a first turn is shortened to it by :func:`fit`.
    """
    limit = MOST_TOKENS if max_tokens is None else max_tokens
    total = len(turns.session)
    prompt, output = turns.new_tokens.copy(), turns.output_tokens.copy()
    fresh = turns.turn == 0
    end = np.full(int(turns.session[-1]) + 1, total)
    rows = np.flatnonzero(fresh)
    prompt[rows], output[rows] = fit(prompt[rows], output[rows], limit)
    while len(rows := _next_turns(rows, turns.turn)):
        # int64, since a history may outgrow int32 before it is cut.
        grown = prompt[rows - 1].astype(np.int64) + output[rows - 1] + turns.new_tokens[rows]
        full = grown + output[rows] > limit
        prompt[rows[~full]] = grown[~full]
        ended = full & (turns.compact_tokens[rows] < 0)
        end[turns.session[rows[ended]]] = rows[ended]
        compacted = rows[full & ~ended]
        restart = turns.template_tokens[compacted].astype(np.int64) + turns.compact_tokens[compacted]
        prompt[compacted], output[compacted] = fit(restart + turns.new_tokens[compacted], output[compacted], limit)
        fresh[compacted] = True
        rows = rows[~ended]
    kept = np.arange(total) < end[turns.session]
    return Conversation(prompt_tokens=prompt, output_tokens=output, kept=kept, fresh=fresh)


def _next_turns(rows: npt.NDArray[np.intp], turn: Int32) -> npt.NDArray[np.intp]:
    """Rows of the turns that follow those of ``rows`` in their sessions."""
    following = rows[rows < len(turn) - 1] + 1
    return following[turn[following] > 0]
