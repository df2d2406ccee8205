"""What a policy would have cost, from the log of another: the doubly robust estimate (Dudik et al., ICML 2011).

    V(pi) = mean_i [ sum_a pi(a | x_i) q(x_i, a)  +  pi(a_i | x_i) / mu_i (c_i - q(x_i, a_i)) ]

``q`` is a regression of the cost on what was seen, ``mu_i`` the logged probability of the choice. As those are known,
the estimate is unbiased whatever ``q`` is worth; a good ``q`` makes it less noisy.
"""

from __future__ import annotations

import numpy as np

from servegym.agents.offpolicy.transitions import Transitions
from servegym.agents.statistics import Interval, mean_interval
from servegym.baselines.interface import FloatArray

_RIDGE = 1e-2
_BLOCKS = 20


class CostModel:
    """Ridge regression of a decision's cost on features of the chosen engine and the request, and their squares.

    Args:
        transitions: to fit to; not those that an estimate is made on.
    """

    def __init__(self, transitions: Transitions) -> None:
        rows = self._rows(transitions)[np.arange(len(transitions)), transitions.action]
        self._mean, self._scale = rows.mean(axis=0), rows.std(axis=0) + 1e-6
        inputs = (rows - self._mean) / self._scale
        self._offset = float(transitions.cost.mean())
        gram = inputs.T @ inputs + _RIDGE * len(inputs) * np.eye(inputs.shape[1])
        self._weights = np.linalg.solve(gram, inputs.T @ (transitions.cost - self._offset))

    def __call__(self, transitions: Transitions) -> FloatArray:
        """Return the expected cost of each engine, shape (decisions, engines); 0 where none might be chosen."""
        inputs = (self._rows(transitions) - self._mean) / self._scale
        return np.where(transitions.mask, inputs @ self._weights + self._offset, 0.0)

    @staticmethod
    def _rows(transitions: Transitions) -> FloatArray:
        items = transitions.items.astype(np.float64)
        shared = np.repeat(transitions.context[:, None, :].astype(np.float64), items.shape[1], axis=1)
        rows = np.concatenate([items, shared], axis=-1)
        return np.concatenate([rows, rows**2], axis=-1)


def doubly_robust(transitions: Transitions, expected: FloatArray, chosen: FloatArray) -> FloatArray:
    """Return the terms whose mean is the estimate, shape (decisions,).

    Args:
        transitions: the log.
        expected: costs by a :class:`CostModel`, shape (decisions, engines).
        chosen: probabilities of the policy, same shape.
    """
    rows = np.arange(len(transitions))
    weights = chosen[rows, transitions.action] / transitions.propensity
    surprise = transitions.cost - expected[rows, transitions.action]
    return np.asarray((chosen * expected).sum(axis=1) + weights * surprise)


def cost_ratio(terms: FloatArray, others: FloatArray) -> Interval:
    """Return the ratio of two policies' costs, ``exp`` of their mean difference, with its 95 % interval.

    The interval is that of the means of consecutive blocks of the log: neighbours are not independent.

    Args:
        terms: of the one, from :func:`doubly_robust`; of the policy that wrote the log, the costs themselves.
        others: of the other one.
    """
    blocks = np.array_split(terms - others, min(_BLOCKS, len(terms)))
    interval = mean_interval([float(block.mean()) for block in blocks])
    return Interval(*(float(np.exp(end)) for end in (interval.value, interval.low, interval.high)))


def effective_decisions(transitions: Transitions, chosen: FloatArray) -> float:
    """Return the number of decisions that an estimate effectively rests on (Kish).

    Args:
        transitions: the log.
        chosen: probabilities of the policy, shape (decisions, engines).
    """
    weights = chosen[np.arange(len(transitions)), transitions.action] / transitions.propensity
    return float(weights.sum() ** 2 / max((weights**2).sum(), 1e-12))
