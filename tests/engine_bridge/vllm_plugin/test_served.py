"""Counters of what users were served, beside those of the simulator."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from support import TOY

from servegym.baselines.interface import Q_USER_SERVED
from servegym.baselines.registry import create
from servegym.engine_bridge.vllm_plugin.queue import PolicyQueue, request_row
from servegym.engine_bridge.vllm_plugin.served import ServedCounters
from servegym.envs.simulator.cluster import SimulatedCluster
from servegym.envs.simulator.config import ClusterConfig
from servegym.envs.workloads.table import RequestTable

WEIGHTS = (1.0, 2.0)
CONTEXT = {"running": 1, "max_num_seqs": 1, "free_blocks": 90, "total_blocks": 100, "block_size": 16}
CONTEXT |= {"prefill_tokens_per_s": 1e4, "now_s": 9.0}


@dataclass(eq=False)
class Request:
    request_id: str
    user: int
    num_prompt_tokens: int
    output: int
    arrival_time: float = 0.0
    num_output_tokens: int = 0
    sampling_params: SimpleNamespace = field(init=False)

    def __post_init__(self) -> None:
        self.sampling_params = SimpleNamespace(extra_args={"user": self.user})

    def is_finished(self) -> bool:
        return self.num_output_tokens >= self.output


def serve(requests: list[Request]) -> list[str]:
    """An engine with one slot, whose first request comes before the others; returns the order of admission."""
    policy, queue = create("request", "vtc"), PolicyQueue()
    running: list[Request] = []
    admitted = []
    queue.add_request(requests[0])
    for step in range(10_000):
        queue.count_served(WEIGHTS, running)
        if len(queue) > 1:
            queue.reorder(policy.score, CONTEXT)
        if not running and queue:
            running.append(queue.pop_request())
            admitted.append(running[0].request_id)
        queue.count_served(WEIGHTS, running)
        if step == 0:
            for request in requests[1:]:
                queue.add_request(request)
        running[0].num_output_tokens += 1
        if running[0].is_finished():
            running.clear()
        if not running and not queue:
            return admitted
    raise AssertionError("the queue never empties")


@pytest.mark.parametrize("seed", range(8))
def test_the_order_is_that_of_the_simulator(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    count = 40
    users, prompts, outputs = rng.integers(0, 4, count), rng.integers(10, 200, count), rng.integers(1, 30, count)
    arrival = np.r_[0.0, np.arange(1, count) * 1e-7]
    table = RequestTable.build(arrival, prompts, outputs, user=users)
    profile = tmp_path / "toy.yaml"
    profile.write_text(yaml.safe_dump(TOY))
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 256}
    config = ClusterConfig.model_validate({"engines": 1, "profile": str(profile), "engine": limits})
    run = SimulatedCluster(config, table, create("request", "vtc"), create("engine", "round_robin"))
    run.run()
    expected = np.argsort(run.memory.requests["first_s"], kind="stable")
    requests = [Request(str(r), int(users[r]), int(prompts[r]), int(outputs[r]), arrival[r]) for r in range(count)]
    assert serve(requests) == [str(r) for r in expected]


def test_a_user_who_comes_back_has_no_credit() -> None:
    counters = ServedCounters(WEIGHTS, lambda request: float(request.user))
    busy, second, back = Request("a", 1, 100, 10), Request("b", 1, 100, 10), Request("c", 2, 100, 10)
    counters.update([busy])
    busy.num_output_tokens = 10
    counters.wait(second)
    counters.update([])
    counters.wait(back)
    rows = np.array([request_row(request, index) for index, request in enumerate((second, back))])
    counters.fill(rows)
    assert rows[:, Q_USER_SERVED].tolist() == [120.0, 120.0]


def test_what_was_taken_back_counts_no_longer() -> None:
    counters = ServedCounters(WEIGHTS, lambda request: float(request.user))
    rich, poor, third = Request("a", 1, 100, 10), Request("b", 2, 10, 10), Request("c", 3, 10, 10)
    counters.update([rich])
    counters.wait(poor)
    counters.gone(poor)
    counters.gone(poor)
    # Nobody waits: lifted to the user who was admitted last.
    counters.wait(third)
    rows = np.array([request_row(third, 0)])
    counters.fill(rows)
    assert rows[:, Q_USER_SERVED].tolist() == [100.0]
