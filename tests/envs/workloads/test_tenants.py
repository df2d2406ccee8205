"""Several workloads on one cluster."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from servegym.configuration import validate
from servegym.envs.workloads import generate, load_workload
from servegym.envs.workloads.workload import WorkloadConfig
from servegym.errors import InputError


def _config(**changes: Any) -> WorkloadConfig:
    content: dict[str, Any] = {
        "name": "both",
        "description": "",
        "source": "",
        "tenants": [
            {"workload": "chat-sessions", "share": 3, "priority": 1},
            {"workload": "fixed", "share": 1, "deadline": {"base_s": 2.0}},
            {"workload": "chat-sessions", "share": 1, "priority": 2},
        ],
    }
    return validate(WorkloadConfig, content | changes, "test")


def test_each_tenant_has_its_share_its_priority_and_its_deadlines() -> None:
    table = generate(_config(), rate_rps=10.0, requests=5000, seed=3)
    table.check()
    assert len(table) == 5000
    shares = [float((table.priority == number).mean()) for number in (0, 1, 2)]
    assert shares == pytest.approx([0.2, 0.6, 0.2])
    np.testing.assert_array_equal(np.isfinite(table.deadline_s), table.priority == 0)
    assert table.arrival_s.max() == pytest.approx(500.0, rel=0.1)


def test_tenants_share_neither_sessions_nor_prefixes_nor_users() -> None:
    table = generate(_config(), rate_rps=10.0, requests=5000, seed=3)
    for column in ("session", "stream", "template", "user"):
        values = getattr(table, column)
        first, second = (set(values[(table.priority == number) & (values >= 0)].tolist()) for number in (1, 2))
        assert first
        assert second
        assert not first & second
    follows = table.parent >= 0
    assert follows.any()
    np.testing.assert_array_equal(table.session[follows], table.session[table.parent[follows]])
    np.testing.assert_array_equal(table.turn[follows], table.turn[table.parent[follows]] + 1)


def test_a_tenant_alone_is_its_workload() -> None:
    alone = generate(_config(tenants=[{"workload": "chat-sessions", "share": 7}]), rate_rps=5.0, requests=400, seed=2)
    seed = int(np.random.SeedSequence([2, 0]).generate_state(1)[0])
    plain = generate(load_workload("chat-sessions"), rate_rps=5.0, requests=400, seed=seed)
    for column in ("arrival_s", "prompt_tokens", "output_tokens", "parent", "stream", "template", "user"):
        np.testing.assert_array_equal(getattr(alone, column), getattr(plain, column), column)


def test_what_tenants_have_themselves_is_refused_beside_them() -> None:
    with pytest.raises(InputError, match="no users beside tenants, which have their own"):
        _config(users={"count": 3})
