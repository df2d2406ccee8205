"""The kinds of decisions that a network makes: among what it chooses, and what it sees of that.

A decision has *candidates*, engines, waiting requests or settings of a placement, and a *context*, the request to be
dispatched, the queue and its engine, or the load of the experts. Features of both are functions of the rows that
policies of the level see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from servegym.baselines import interface
from servegym.baselines.features import (
    ENGINE_FEATURES,
    REQUEST_FEATURES,
    Feature,
    Float32Array,
    fill_dispatch_features,
)
from servegym.baselines.interface import E_AVAILABLE, FloatArray, IntArray
from servegym.baselines.placement_features import (
    PLACEMENT_CONTEXT,
    SETTING_FEATURES,
    fill_setting_features,
)
from servegym.baselines.queue_features import (
    QUEUE_CONTEXT_FEATURES,
    REQUEST_OWN_FEATURES,
    fill_admission_features,
)

Level = Literal["engine", "request", "expert"]


@dataclass(frozen=True, slots=True)
class Decisions:
    """One kind of decision.

    Attributes:
        layer: of the policies that make it.
        architecture: of their networks.
        pooled: whether a candidate's logit depends on the other ones.
        items: features of a candidate.
        context: features of what all candidates share.
        observation: keys of both in an environment's observation; of the first, the leading columns are ``items``.
        item_columns: names of the columns of a matrix of candidates.
        context_columns: names of the entries of a context's row.
        action: what a network's answer means.
        mask: what becomes of candidates that may not be chosen.
        fill: writes the features: (context row, matrix of candidates, item features, context features).
    """

    layer: Level
    architecture: Literal["set_scorer", "index_scorer"]
    pooled: bool
    items: tuple[Feature, ...]
    context: tuple[Feature, ...]
    observation: tuple[str, str]
    item_columns: tuple[str, ...]
    context_columns: tuple[str, ...]
    action: str
    mask: str
    fill: Callable[[FloatArray, FloatArray, Float32Array, Float32Array], None]

    @property
    def item_names(self) -> tuple[str, ...]:
        """Names of the features of a candidate."""
        return tuple(feature.name for feature in self.items)

    @property
    def context_names(self) -> tuple[str, ...]:
        """Names of the features of the context."""
        return tuple(feature.name for feature in self.context)

    def only(self, items: tuple[str, ...], context: tuple[str, ...]) -> Decisions:
        """Return the same decisions seen by some of the features alone, in the order given.

        Args:
            items: names among ``item_names``.
            context: names among ``context_names``.
        """
        if (items, context) == (self.item_names, self.context_names):
            return self
        item_at = np.array([self.item_names.index(name) for name in items], dtype=np.int64)
        context_at = np.array([self.context_names.index(name) for name in context], dtype=np.int64)
        return replace(
            self,
            items=tuple(self.items[at] for at in item_at),
            context=tuple(self.context[at] for at in context_at),
            fill=partial(_fill_some, self, item_at, context_at),
        )

    def features(self, context: FloatArray, items: FloatArray) -> tuple[Float32Array, Float32Array]:
        """Return the features of the candidates, shape (candidates, len(items)), and of the context, shape (len(context),).

        Args:
            context: row, shape (len(context_columns),).
            items: matrix, shape (candidates, len(item_columns)).
        """  # noqa: E501 - one sentence
        item_features = np.empty((len(items), len(self.items)), dtype=np.float32)
        context_features = np.empty(len(self.context), dtype=np.float32)
        self.fill(context, items, item_features, context_features)
        return item_features, context_features

    def eligible(self, items: FloatArray) -> npt.NDArray[np.bool_]:
        """Return which candidates may be chosen, shape (candidates,)."""
        return items[:, E_AVAILABLE] > 0.0 if self.layer == "engine" else np.ones(len(items), dtype=np.bool_)


def _fill_some(
    every: Decisions,
    item_at: IntArray,
    context_at: IntArray,
    context: FloatArray,
    items: FloatArray,
    item_features: Float32Array,
    context_features: Float32Array,
) -> None:
    all_items, all_context = every.features(context, items)
    np.take(all_items, item_at, axis=1, out=item_features)
    np.take(all_context, context_at, out=context_features)


def _columns(prefix: str, count: int) -> tuple[str, ...]:
    found = {index: name for name, index in vars(interface).items() if name.startswith(prefix)}
    assert sorted(found) == list(range(count))
    return tuple(found[index][len(prefix) :].lower() for index in range(count))


DISPATCH = Decisions(
    layer="engine",
    architecture="set_scorer",
    pooled=True,
    items=ENGINE_FEATURES,
    context=REQUEST_FEATURES,
    observation=("engines", "request"),
    item_columns=_columns("E_", interface.ENGINE_COLUMNS),
    context_columns=_columns("R_", interface.REQUEST_COLUMNS),
    action="score of an engine = -logit; the lowest score is chosen, equal engines take turns",
    mask="unavailable engines score infinity and are left out of the pooling",
    fill=fill_dispatch_features,
)
"""Which engine gets a request."""

ADMISSION = Decisions(
    layer="request",
    architecture="index_scorer",
    pooled=False,
    items=REQUEST_OWN_FEATURES,
    context=QUEUE_CONTEXT_FEATURES,
    observation=("requests", "context"),
    item_columns=_columns("Q_", interface.QUEUE_COLUMNS),
    context_columns=_columns("C_", interface.CONTEXT_COLUMNS),
    action="score of a request = -logit; the lowest score is admitted first, equal requests in order of arrival",
    mask="none: whoever waits may be admitted",
    fill=fill_admission_features,
)
"""Which waiting request is admitted next. A request's score depends on no other request, as an index does."""

PLACEMENT = Decisions(
    layer="expert",
    architecture="index_scorer",
    pooled=False,
    items=SETTING_FEATURES,
    context=PLACEMENT_CONTEXT,
    observation=("settings", "context"),
    item_columns=("setting",),
    context_columns=tuple(feature.name for feature in PLACEMENT_CONTEXT),
    action="logit of a setting of the placement rule `collocate` = ln of a factor on its default",
    mask="none: every setting has a value",
    fill=fill_setting_features,
)
"""Which settings the rule ``collocate`` places experts by; the candidates are the settings."""

DECISIONS: dict[Level, Decisions] = {"engine": DISPATCH, "request": ADMISSION, "expert": PLACEMENT}
