"""The queue and the policy inside an engine, without an engine."""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from servegym.baselines.interface import FloatArray, QueueView
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.engine_bridge.vllm_plugin.policy import LivePolicy
from servegym.engine_bridge.vllm_plugin.protocol import read_policy, write_policy
from servegym.engine_bridge.vllm_plugin.queue import PolicyQueue, request_row
from servegym.errors import InputError


@dataclass(eq=False)
class Request:
    """What vLLM's requests look like to us."""

    name: int
    num_prompt_tokens: int
    arrival_time: float
    priority: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def sampling_params(self) -> SimpleNamespace:
        return SimpleNamespace(extra_args=self.extra or None)


CONTEXT = {
    "running": 3,
    "max_num_seqs": 8,
    "free_blocks": 90,
    "total_blocks": 100,
    "block_size": 16,
    "prefill_tokens_per_s": 10_000.0,
}


def drain(queue: PolicyQueue) -> list[int]:
    names = []
    while queue:
        head = queue.peek_request()
        assert queue.pop_request() is head
        names.append(head.name)
    return names


@pytest.mark.parametrize("spec", ["fcfs", "spf_aging", "sjf_age,theta_age_s=2", "priority", "edf", "hrrn"])
def test_the_order_is_the_policys(spec: str) -> None:
    policy, rng = create("request", spec), random.Random(1)
    for _ in range(30):
        count = rng.randrange(1, 40)
        requests = [Request(i, rng.randrange(1, 50) * 40, 100 + i * 0.1, rng.randrange(3)) for i in range(count)]
        queue = PolicyQueue()
        for request in requests:
            queue.add_request(request)
        queue.reorder(policy.score, CONTEXT | {"now_s": 110.0})
        rows = np.array([request_row(request, i) for i, request in enumerate(requests)])
        rows[:, 0] = 110.0 - rows[:, 9]
        expected = np.argsort(policy.score(QueueView(data=rows, now_s=110.0, **CONTEXT)), kind="stable")
        assert drain(queue) == expected.tolist()


def test_the_queue_behaves_as_a_list_would() -> None:
    """Random operations against a plain model: what vLLM puts back goes first, the rest by the last scores."""
    rng, clock = random.Random(5), 0
    for _ in range(50):
        queue, front, ordered, fresh = PolicyQueue(), [], [], []
        for _ in range(120):
            operation, clock = rng.randrange(7), clock + 1
            whole = front + ordered + fresh
            if operation <= 1 or not whole:
                fresh.append(Request(clock, rng.randrange(1, 30), float(clock)))
                queue.add_request(fresh[-1])
            elif operation == 2:
                head = queue.pop_request()
                assert head is whole[0]
                (front or ordered or fresh).pop(0)
            elif operation == 3:
                front.insert(0, Request(clock, 5, float(clock)))
                queue.prepend_request(front[0])
            elif operation == 4:
                skipped = [Request(clock * 1000 + i, 5, float(clock)) for i in range(rng.randrange(4))]
                queue.prepend_requests(skipped)
                front = skipped[::-1] + front
            elif operation == 5:
                gone = set(rng.sample(whole, min(len(whole), 2)))
                queue.remove_requests(gone)
                front, ordered, fresh = ([r for r in part if r not in gone] for part in (front, ordered, fresh))
            else:
                ordered = sorted(ordered + fresh, key=lambda r: (r.num_prompt_tokens, r.name))
                fresh = []
                queue.reorder(lambda view: view.prompt_tokens, CONTEXT | {"now_s": float(clock)})
            assert list(queue) == front + ordered + fresh
            assert len(queue) == len(front) + len(ordered) + len(fresh)
            assert bool(queue) == bool(front or ordered or fresh)


def test_a_row_reads_what_the_client_sent_along() -> None:
    extra = {"user": "ann", "session": 7, "turn": 2, "deadline_s": 1.5, "predicted_tokens": 80}
    row = request_row(Request(0, 50, 3.0, extra=extra), 4)
    view = QueueView(data=row[None], now_s=5.0, **CONTEXT)
    assert (view.session[0], view.turn[0], view.deadline_s[0], view.predicted_tokens[0]) == (7, 2, 1.5, 80)
    assert view.user[0] == request_row(Request(1, 9, 1.0, extra={"user": "ann"}), 0)[5] > 2**20
    bare = QueueView(data=request_row(SimpleNamespace(), 0)[None], now_s=5.0, **CONTEXT)
    assert bare.user[0] == -1
    assert np.isinf(bare.deadline_s[0])
    assert np.isnan(bare.output_tokens[0])


def view(count: int = 3) -> QueueView:
    rows = np.array([request_row(Request(i, 10 * (count - i), float(i)), i) for i in range(count)])
    return QueueView(data=rows, now_s=9.0, **CONTEXT)


def look(policy: LivePolicy) -> None:
    policy._look_at = 0.0
    policy.refresh()


def look_again(policy: LivePolicy) -> None:
    look(policy)
    if policy._loading is not None:
        policy._loading.join()
        look(policy)


def test_a_new_file_is_taken_up_and_a_bad_one_is_not(tmp_path: Path) -> None:
    path, state = tmp_path / "policy.json", tmp_path / "state.json"
    assert write_policy(path, PolicySpec(name="spf_aging")) == 1
    policy = LivePolicy(path, state)
    assert json.loads(state.read_text())["tier"] == "policy"
    assert policy.scores(view()).tolist() == create("request", "spf_aging").score(view()).tolist()
    assert write_policy(path, PolicySpec(name="fcfs")) == 2
    look_again(policy)
    assert policy.scores(view()).tolist() == [0.0, 1.0, 2.0]
    path.write_text('{"version": 3, "policy": {"name": "nonsense"}}')
    os.utime(path, ns=(1, 1))
    look_again(policy)
    assert policy.version == 2
    assert policy.scores(view()).tolist() == [0.0, 1.0, 2.0]
    said = json.loads(state.read_text())
    assert (said["tier"], said["version"]) == ("policy", 2)
    assert "nonsense" in said["reason"]
    write_policy(path, PolicySpec(name="sjf_oracle"))
    look_again(policy)
    assert "needs true output lengths" in json.loads(state.read_text())["reason"]


def test_what_is_read_from_files_is_read_beside_the_engines_steps(tmp_path: Path) -> None:
    """Code that takes its time to load: the policy before it decides meanwhile, and the state tells which one did."""
    path, state = tmp_path / "policy.json", tmp_path / "state.json"
    write_policy(path, PolicySpec(name="fcfs"))
    policy = LivePolicy(path, state)
    module = tmp_path / "slow.py"
    module.write_text(
        "import time\nimport numpy as np\ntime.sleep(0.3)\n"
        "class Last:\n    def score(self, queue): return -np.arange(len(queue), dtype=float)\n"
    )
    write_policy(path, PolicySpec(name=f"{module}:Last"))
    began = time.monotonic()
    look(policy)
    assert time.monotonic() - began < 0.2
    assert policy.scores(view()).tolist() == [0.0, 1.0, 2.0]
    while json.loads(state.read_text())["version"] != 2:
        assert time.monotonic() - began < 20
        look(policy)
    assert policy.scores(view()).tolist() == [0.0, -1.0, -2.0]


def test_a_policy_may_take_a_share_of_the_token_budget_and_no_nonsense(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    write_policy(path, PolicySpec.parse("chunked,inner=spf_aging,share=0.25"))
    policy = LivePolicy(path, None)
    assert policy.budget_share == 0.25
    write_policy(path, PolicySpec(name="fcfs"))
    look_again(policy)
    assert policy.budget_share is None
    module = tmp_path / "mine.py"
    module.write_text("class Mine:\n    budget_share = 'half'\n    def score(self, queue): return queue.arrival_s\n")
    write_policy(path, PolicySpec(name=f"{module}:Mine"))
    look_again(policy)
    assert policy.budget_share is None
    assert policy.failures == 1


@pytest.mark.parametrize("fault", ["raise", "shape", "nan"])
def test_a_failing_policy_leaves_the_order_of_arrival(tmp_path: Path, fault: str) -> None:
    module = tmp_path / "mine.py"
    module.write_text(
        "import numpy as np\n"
        "class Mine:\n"
        "    def score(self, queue):\n"
        f"        if {fault!r} == 'raise': raise KeyError('oops')\n"
        f"        return np.zeros(1) if {fault!r} == 'shape' else np.full(len(queue), np.nan)\n"
    )
    write_policy(tmp_path / "policy.json", PolicySpec(name=f"{module}:Mine"))
    policy = LivePolicy(tmp_path / "policy.json", tmp_path / "state.json")
    queue = PolicyQueue()
    for i in range(4):
        queue.add_request(Request(i, 40 - i, float(i)))
    queue.reorder(policy.scores, CONTEXT | {"now_s": 9.0})
    assert policy.failures == 1
    assert drain(queue) == [0, 1, 2, 3]
    look_again(policy)
    assert json.loads((tmp_path / "state.json").read_text())["failures"] == 1


def test_without_a_file_vllms_order_stands(tmp_path: Path) -> None:
    policy = LivePolicy(tmp_path / "policy.json", tmp_path / "state.json")
    assert policy.scores(view()) is None
    assert json.loads((tmp_path / "state.json").read_text())["tier"] == "stock"
    with pytest.raises(InputError, match="no policy file"):
        read_policy(tmp_path / "policy.json")


def test_ordering_a_thousand_requests_takes_well_under_a_step() -> None:
    policy, queue, rng = create("request", "spf_aging"), PolicyQueue(), np.random.default_rng(0)
    for i in range(1000):
        queue.add_request(Request(i, int(rng.integers(1, 3000)), float(i)))
    times = []

    def scores(queue_view: QueueView) -> FloatArray:
        return policy.score(queue_view)

    for step in range(20):
        start = time.perf_counter()
        queue.reorder(scores, CONTEXT | {"now_s": 2000.0 + step})
        times.append(time.perf_counter() - start)
    assert min(times[1:]) < 2e-3
