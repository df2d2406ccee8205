"""What the gateway reads of a request, and the parts that decide about it, without a network."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.baselines.interface import (
    E_INFLIGHT,
    E_ITL_EWMA_S,
    E_PREFILL_TOKENS,
    E_TTFT_EWMA_S,
    Q_ARRIVAL_S,
    Q_DEADLINE_S,
    Q_OUTPUT_TOKENS,
    Q_PREDICTED_TOKENS,
    Q_PROMPT_TOKENS,
    Q_USER_SERVED,
    Q_WAIT_S,
    QUEUE_COLUMNS,
    QueueView,
)
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.engine_bridge.gateway.admin import Admin
from servegym.engine_bridge.gateway.arms import Arms
from servegym.engine_bridge.gateway.config import DeployConfig
from servegym.engine_bridge.gateway.core import Gateway
from servegym.engine_bridge.gateway.decision_log import DecisionLog
from servegym.engine_bridge.gateway.incoming import BadRequestError, ParsedRequest, parse
from servegym.engine_bridge.gateway.messages import Decision, IncomingRequest, Outcome, Progress
from servegym.engine_bridge.gateway.metrics import GatewayMetrics
from servegym.engine_bridge.gateway.static_key import StaticKey
from servegym.engine_bridge.router.health import Health
from servegym.engine_bridge.router.table import EngineLimits, EngineTable
from servegym.errors import InputError


def incoming(
    content: Any, request_id: str = "r", subset: tuple[str, ...] | None = None, **headers: str
) -> IncomingRequest:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return IncomingRequest(request_id, "/v1/completions", named, body, 0.0, subset)


def read(content: Any, **headers: str) -> ParsedRequest:
    return parse(incoming(content, **headers), 4, 8, chars_per_token=2.0, block_chars=8)


def test_tokens_are_counted_and_text_is_estimated() -> None:
    assert read({"prompt": [1, 2, 3]}).prompt_tokens == 3
    assert read({"prompt": [[1, 2], [3]]}).prompt_tokens == 3
    assert read({"prompt": "12345678"}).prompt_tokens == 4
    assert read({"messages": [{"role": "user", "content": "x" * 100}]}).prompt_tokens >= 50


@pytest.mark.parametrize("content", [b"{", [], {"model": "m"}, {"prompt": 5}, {"prompt": []}])
def test_what_no_engine_could_serve_is_refused(content: Any) -> None:
    with pytest.raises(BadRequestError):
        read(content)


def test_prompts_of_one_beginning_share_blocks() -> None:
    one, two = read({"prompt": list(range(20))}), read({"prompt": [*range(10), 0, 0, 0]})
    assert len(one.blocks) == 5
    assert [a == b for a, b in zip(one.blocks, two.blocks, strict=False)] == [True, True, False]
    talk = [{"role": "user", "content": "a" * 40}]
    longer = [*talk, {"role": "assistant", "content": "b" * 40}]
    first, second = read({"messages": talk}).blocks, read({"messages": longer}).blocks
    assert first[:-1] == second[: len(first) - 1]
    assert read({"prompt": "a" * 40, "model": "x"}).blocks != read({"prompt": "a" * 40, "model": "y"}).blocks


def test_headers_and_body_say_who_asks_and_how_urgently() -> None:
    parsed = read({"prompt": "a", "user": "ann", "priority": 3}, x_session_id="s", x_slo_ttft_ms="250")
    assert parsed.user == read({"prompt": "b", "user": "ann"}).user != -1
    assert parsed.session == read({"prompt": "b"}, x_session_id="s").session != -1
    assert (parsed.priority, parsed.deadline_s) == (3, 0.25)
    # Higher is more important there, smaller is earlier here.
    assert read({"prompt": "a"}, x_llm_d_inference_objective="2").priority == -2
    extra = read({"prompt": "a", "vllm_xargs": {"user": 7, "session": 9, "turn": 2, "predicted_tokens": 30}})
    assert (extra.user, extra.session, extra.turn, extra.predicted_tokens) == (7, 9, 2, 30)
    nobody = read({"prompt": "a", "priority": "high"})
    assert (nobody.user, nobody.session, nobody.turn, nobody.priority) == (-1, -1, None, 0)


@pytest.mark.parametrize("name", ["fcfs", "priority", "spf_aging", "edf", "llf"])
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_static_keys_order_as_the_policy_does(name: str, data: st.DataObject) -> None:
    policy = create("request", name)
    key = StaticKey(policy, name, 1e4)
    rows = data.draw(
        st.lists(
            st.tuples(st.integers(0, 100_000), st.integers(1, 30_000)),
            min_size=2,
            max_size=20,
            unique_by=lambda r: r[0],
        )
    )
    arrival = np.array([row[0] for row in rows]) * 1e-3
    prompt = np.array([row[1] for row in rows])
    now = arrival.max() + data.draw(st.floats(0.0, 1000.0))
    queue = np.zeros((len(rows), QUEUE_COLUMNS))
    queue[:, Q_ARRIVAL_S], queue[:, Q_WAIT_S], queue[:, Q_PROMPT_TOKENS] = arrival, now - arrival, prompt
    queue[:, Q_DEADLINE_S] = np.inf
    queue[:, [Q_OUTPUT_TOKENS, Q_PREDICTED_TOKENS, Q_USER_SERVED]] = np.nan
    scores = policy.score(QueueView(queue, now, 3, 8, 100, 200, 16, 1e4))
    keys = np.array([key.key(at, int(tokens)) for at, tokens in zip(arrival, prompt, strict=True)])
    ordered = np.argsort(scores, kind="stable")
    # Equal within the resolution of a key, or in order.
    assert (np.diff(keys[ordered]) >= -1).all()


@pytest.mark.parametrize("name", ["vtc", "mlfq", "sjf_age", "hrrn", "ewsjf", "sjf_oracle"])
def test_policies_whose_order_changes_have_no_static_key(name: str) -> None:
    with pytest.raises(InputError, match="no static key"):
        StaticKey(create("request", name), name, 1e4)


def test_a_priority_sets_no_token_budget() -> None:
    with pytest.raises(InputError, match="chunked: sets a token budget, which no priority can"):
        StaticKey(create("request", "chunked"), "chunked", 1e4)


def test_engines_are_ejected_and_readmitted() -> None:
    table = EngineTable([EngineLimits()] * 2)
    changes: list[int] = []
    health = Health(table, changes.append)
    for now in (0.0, 1.0):
        health.probed(0, False, now)
    assert (health.available(0), health.describe(0), changes) == (False, "ejected", [0])
    for now in (2.0, 3.0, 4.0):
        health.served(1, False, now)
    assert health.available(1)  # the last one
    health.probed(0, True, 3.0)
    assert not health.available(0)  # too early
    health.probed(0, True, 6.1)
    assert health.available(0)
    health.served(1, False, 7.0)
    assert not health.available(1)
    health.probed(1, True, 13.0)
    assert health.available(1)
    for now in (13.0, 13.1, 13.2):
        health.served(1, False, now)
    health.probed(1, True, 20.0)
    assert not health.available(1)  # twice as long the second time
    assert [health.ejections(engine) for engine in (0, 1)] == [1, 2]
    health.served(1, True, 30.0)
    assert health.ejections(1) == 2
    health.drain(0, True)
    assert health.describe(0) == "draining"


def gateway(**fields: Any) -> Gateway:
    config = DeployConfig.model_validate({"policy": "least_requests"} | fields)
    arms = Arms(config.policy, config.baseline, config.mode, config.percent, 1.0)
    return Gateway(config, ("a:1", "b:1", "c:1"), arms, DecisionLog(None, 64), GatewayMetrics())


def decide(one: Gateway, *requests: IncomingRequest) -> list[Decision]:
    async def main() -> list[Decision]:
        return [await one.decide(request) for request in requests]

    return asyncio.run(main())


def test_a_subset_limits_the_choice() -> None:
    one = gateway()
    body = {"prompt": [1]}
    inside, outside = decide(one, incoming(body, "1", ("c:1", "d:1")), incoming(body, "2", ("d:1",)))
    assert inside.endpoints == ("c:1",)
    assert outside.status == 503


def test_the_engine_that_served_is_credited() -> None:
    one = gateway()
    (decision,) = decide(one, incoming({"prompt": [1] * 50}))
    assert decision.endpoints == ("a:1", "b:1", "c:1")
    one.progressed(Progress("r", "b:1", 0.1))
    assert one.table.data[:, E_INFLIGHT].tolist() == [0, 1, 0]
    assert one.table.data[:, E_PREFILL_TOKENS].tolist() == [0, 0, 0]
    one.finished(Outcome("r", "b:1", 200, True, attempts=2, ttft_s=0.1, total_s=1.0, output_tokens=10))
    one.finished(Outcome("r", "b:1", 200, True))  # told twice
    one.finished(Outcome("unknown", "b:1", 200, True))
    assert not one.table.data[:, E_INFLIGHT].any()
    assert one.in_flight == 0


def test_a_request_that_reached_the_picker_late_has_no_first_token_in_the_future() -> None:
    """The data plane counts from before; the mean ITL would be negative, and features of it NaN."""
    one = gateway()
    decide(one, replace(incoming({"prompt": [1] * 50}), received_s=time.monotonic()))
    one.progressed(Progress("r", "a:1", 5.0))
    one.finished(Outcome("r", "a:1", 200, True, ttft_s=5.0, total_s=5.1, output_tokens=10))
    assert 0 <= one.table.data[0, E_TTFT_EWMA_S] < 5
    assert one.table.data[0, E_ITL_EWMA_S] >= 0


def test_what_the_data_plane_sent_on_by_itself_is_counted() -> None:
    one = gateway()
    for path, endpoint in (("/v1/completions?a=b", "b:1"), ("/v1/models", "b:1"), ("/v1/completions", None)):
        one.finished(Outcome(path, endpoint, 200, True, path=path))
    page = one.metrics.page().decode()
    assert 'servegym_undecided_requests_total{engine="b:1"} 1.0' in page
    assert page.count("servegym_undecided_requests_total{") == 1


def test_draws_are_logged_with_their_probability() -> None:
    one = gateway(epsilon=0.5, policy="round_robin")
    records = []
    one._log.write = records.append  # type: ignore[method-assign]
    decisions = decide(one, *(incoming({"prompt": [1]}, str(i)) for i in range(600)))
    for i in range(600):
        one.finished(Outcome(str(i), None, 200, True))
    assert {decision.status for decision in decisions} == {200}
    assert {round(record.propensity, 9) for record in records} == {round(0.5 + 0.5 / 3, 9), round(0.5 / 3, 9)}
    drawn = np.mean([record.propensity < 0.5 for record in records])
    assert drawn == pytest.approx(1 / 3, abs=0.08)
    # Each choice is weighted by its inverse propensity: every engine counts the same.
    weights = np.zeros(3)
    for record in records:
        weights[record.chosen] += 1 / record.propensity
    assert weights / weights.sum() == pytest.approx(np.full(3, 1 / 3), abs=0.1)


def test_requests_whose_end_nobody_tells_are_forgotten() -> None:
    one = gateway()
    decide(one, incoming({"prompt": [1]}))
    one.forget(older_than_s=math.inf)
    assert one.in_flight == 1
    one.forget(older_than_s=-1.0)
    assert one.in_flight == 0
    assert not one.table.data[:, E_INFLIGHT].any()


def test_lengths_of_text_are_learned_from_usage() -> None:
    one = gateway(chars_per_token=4)
    prompt = {"prompt": "a" * 1000}
    decide(one, *(incoming(prompt, str(i)) for i in range(300)))
    for i in range(300):
        one.finished(Outcome(str(i), "a:1", 200, True, prompt_tokens=500, output_tokens=1))
    before = one.table.data[0, E_PREFILL_TOKENS]
    decide(one, incoming(prompt, "last", ("a:1",)))
    assert one.table.data[0, E_PREFILL_TOKENS] - before == pytest.approx(500, abs=5)


def test_a_bundle_is_swapped_in_only_if_it_loads() -> None:
    one = gateway()
    with pytest.raises(InputError, match="no such policy bundle"):
        one.arms.prepare(PolicySpec(name="runs/nowhere"), one.arms.recent())
    assert one.arms.policy.version == 1


def test_a_policy_that_warms_up_is_let_in_and_a_slow_one_is_not(tmp_path: Path) -> None:
    code = (
        "import time\n\nclass Warm:\n    cold = True\n    def score(self, request, engines):\n"
        "        time.sleep(1.2 if self.cold else 0)\n        self.cold = STAYS\n        return engines.inflight\n"
    )
    one = gateway()
    (tmp_path / "warm.py").write_text(code.replace("STAYS", "False"))
    arm = one.arms.prepare(PolicySpec(name=f"{tmp_path}/warm.py:Warm"), one.arms.recent())
    assert not arm.policy.fallbacks
    (tmp_path / "slow.py").write_text(code.replace("STAYS", "True"))
    with pytest.raises(InputError, match=r"fails on recorded requests \(late\)"):
        one.arms.prepare(PolicySpec(name=f"{tmp_path}/slow.py:Warm"), one.arms.recent())


def test_the_status_tells_traffic_failures_and_their_causes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = tmp_path / "mine.py"
    policy.write_text("class Mine:\n    def score(self, request, engines):\n        return [][request.index]\n")
    one = gateway(policy=f"{policy}:Mine")
    decide(one, *(incoming({"prompt": [1]}, str(k)) for k in range(4)), incoming(b"{", "bad"))
    one.finished(Outcome("0", "a:1", 200, True, ttft_s=0.25, total_s=1.0))
    one.finished(Outcome("1", "b:1", 0, False))
    status = Admin(one, {}).status()
    line = f"{policy}:3: IndexError: list index out of range, in score"
    assert (status["fallbacks"], status["causes"]) == ({"IndexError": 4}, {"IndexError": line})
    assert caplog.text.count(line) == 1  # said once, not for each request
    assert status["recent"]["total"]["ttft_s"] == {"p50": 0.25, "p90": 0.25, "p99": 0.25}
    assert set(status["recent"]["unserved_per_s"]) == {"failed", "refused"}
    assert [engine["ttft_s"] is None for engine in status["engines"]] == [False, True, True]
    assert all(engine["requests_per_s"] > 0 for engine in status["engines"])


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    one = gateway(mode="shadow", policy="lmetric")
    decide(one, incoming({"prompt": [1]}))
    one.finished(Outcome("r", "b:1", 200, True, attempts=2, ttft_s=0.1, total_s=1.0, output_tokens=9))
    one.metrics.fallback("lmetric", "late")
    decide(one, incoming(b"{"))
    page = one.metrics.page().decode()
    shown = {line.split("{")[0].split(" ")[0] for line in page.splitlines() if not line.startswith("#")}
    dashboard = json.loads((Path(str(files("servegym"))) / "configs" / "grafana" / "gateway.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"servegym_\w+", target["expr"])
    }
    assert len(asked) > 12
    assert asked <= shown
