"""Users, priorities, deadlines, predictions and templates."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from servegym.envs.workloads.templates import Templates, assign_templates
from servegym.envs.workloads.users import Deadline, Prediction, Priorities, Users

COUNT = 100_000


def test_zipf_users() -> None:
    users = Users(count=4, zipf_exponent=1.0).sample(np.random.default_rng(0), COUNT)
    shares = np.bincount(users) / COUNT
    assert shares == pytest.approx(np.array([12, 6, 4, 3]) / 25, abs=0.01)


def test_priorities_by_share() -> None:
    drawn = Priorities(shares={0: 1, 5: 3}).sample(np.random.default_rng(0), COUNT)
    assert sorted(set(drawn.tolist())) == [0, 5]
    assert (drawn == 5).mean() == pytest.approx(0.75, abs=0.01)


def test_deadlines_grow_with_the_prompt() -> None:
    deadlines = Deadline(base_s=0.5, per_1k_prompt_tokens_s=0.2).of(np.array([1, 1000, 5000], dtype=np.int32))
    assert deadlines == pytest.approx([0.5002, 0.7, 1.5])


def test_predictions_have_the_right_median_and_spread() -> None:
    output = np.full(COUNT, 100, dtype=np.int32)
    predicted = Prediction(sigma=0.5).sample(output, np.random.default_rng(0))
    assert np.median(predicted) == pytest.approx(100, rel=0.01)
    assert np.log(predicted).std() == pytest.approx(0.5, rel=0.01)
    np.testing.assert_array_equal(Prediction(sigma=0).sample(output, np.random.default_rng(0)), output)


def families() -> tuple[Templates, ...]:
    return tuple(
        Templates.model_validate(item)
        for item in (
            {"share": 0.6, "count": 2, "zipf_exponent": 1, "tokens": {"kind": "uniform", "low": 10, "high": 99}},
            {"share": 0.3, "count": 1, "tokens": {"kind": "fixed", "value": 512}, "placement": "within_prompt"},
        )
    )


def test_template_shares_and_lengths() -> None:
    which, lengths = np.random.default_rng(0), np.random.default_rng(1)
    template, tokens, added = assign_templates(families(), which, lengths, COUNT)
    shares = np.bincount(template + 1) / COUNT
    assert shares == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.01)
    assert (tokens[template == -1] == 0).all()
    assert (tokens[template == 2] == 512).all()
    assert (added[template == 2] == 0).all()
    for one in (0, 1):
        assert len(set(tokens[template == one].tolist())) == 1
        assert (added[template == one] == tokens[template == one]).all()


def test_no_templates() -> None:
    template, tokens, added = assign_templates((), np.random.default_rng(0), np.random.default_rng(1), 10)
    assert (template == -1).all()
    assert not tokens.any()
    assert not added.any()


def test_bad_configs() -> None:
    with pytest.raises(ValidationError):
        Users(count=0)
    with pytest.raises(ValidationError):
        Priorities(shares={})
    with pytest.raises(ValidationError):
        Priorities(shares={0: -1.0})
    with pytest.raises(ValidationError):
        Deadline(base_s=0)
    with pytest.raises(ValidationError):
        Prediction(sigma=-0.1)
