"""The engine kernel schedules exactly as vLLM's own scheduler, step by step."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from servegym.baselines.heuristic import token_budget
from servegym.baselines.policy_spec import PolicySpec
from servegym.configuration import validate
from servegym.engine_bridge.vllm_plugin.protocol import POLICY_VARIABLE, write_policy
from servegym.envs.simulator.schedule_trace import ScheduleSpec, schedule_trace

HERE = Path(__file__).parent
SPECS = 300
Traces = list[list[dict[str, Any]]]


def _specs(ahead: bool) -> list[dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("oracle_specs", HERE / "specs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [module.random_spec(seed) | {"async_scheduling": ahead} for seed in range(SPECS)]


def _traces(vllm_python: str, folder: Path, specs: list[dict[str, Any]], **environment: str) -> Traces:
    """What vLLM does with each spec, step by step."""
    path = folder / "specs.json"
    path.write_text(json.dumps(specs), encoding="utf-8")
    command = [vllm_python, str(HERE / "vllm_schedule.py"), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    traces: Traces = [[] for _ in specs]
    for line in run.stdout.splitlines():
        step = json.loads(line)
        traces[step.pop("spec")].append(step)
    return traces


@pytest.fixture(scope="module")
def truths(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """Of both modes: most of a run's time is the import of vLLM."""
    return _traces(vllm_python, tmp_path_factory.mktemp("oracle"), _specs(False) + _specs(True))


@pytest.fixture(params=[False, True], ids=["synchronous", "ahead"])
def truth(request: pytest.FixtureRequest, truths: Traces) -> tuple[list[dict[str, Any]], Traces]:
    return _specs(request.param), truths[SPECS:] if request.param else truths[:SPECS]


@pytest.mark.vllm
def test_no_step_differs_from_vllm(truth: tuple[list[dict[str, Any]], Traces]) -> None:
    differing = []
    for seed, (spec, expected) in enumerate(zip(*truth, strict=True)):
        actual = list(schedule_trace(validate(ScheduleSpec, spec, f"seed {seed}")))
        if actual != expected:
            step = next((i for i, pair in enumerate(zip(actual, expected, strict=False)) if pair[0] != pair[1]), -1)
            differing.append((seed, step, actual[step], expected[step]))
    assert not differing, f"{len(differing)} of {SPECS} specs differ; (seed, step, servegym, vLLM): {differing[0]}"


@pytest.mark.vllm
def test_the_specs_cover_what_is_hard(truth: tuple[list[dict[str, Any]], Traces]) -> None:
    specs, traces = truth
    assert sum(bool(step["preempted"]) for trace in traces for step in trace) > 500
    assert {(spec["policy"], spec["prefix_caching"]) for spec in specs} == {
        (policy, caching) for policy in ("fcfs", "priority") for caching in (False, True)
    }
    assert any(request["output_len"] == 1 for spec in specs for request in spec["requests"])
    assert any(
        len(request["prompt"]) > spec["max_num_batched_tokens"] for spec in specs for request in spec["requests"]
    )


@pytest.mark.vllm
def test_our_scheduler_gives_vllm_the_token_budget_of_the_policy(vllm_python: str, tmp_path: Path) -> None:
    """A share of the budget schedules what an engine with that budget does, in vLLM as in the simulator."""
    share, policy = 0.4, tmp_path / "policy.json"
    write_policy(policy, PolicySpec.parse(f"chunked,share={share}"))
    specs = [
        spec for ahead in (False, True) for spec in [spec for spec in _specs(ahead) if spec["policy"] == "fcfs"][:60]
    ]
    source = {POLICY_VARIABLE: str(policy), "PYTHONPATH": str(HERE.parents[1] / "src")}
    smaller = [0, 0]
    for spec, found in zip(specs, _traces(vllm_python, tmp_path, specs, **source), strict=True):
        if any(step["preempted"] for step in found):  # returns to the head of vLLM's queue, by arrival in ours
            continue
        budget = token_budget(share, spec["max_num_batched_tokens"], spec["max_num_seqs"])
        most = max(sum(step["scheduled"].values()) for step in found)
        smaller[spec["async_scheduling"]] += budget < spec["max_num_batched_tokens"] and most == budget
        assert found == list(schedule_trace(validate(ScheduleSpec, spec | {"max_num_batched_tokens": budget}, "spec")))
    assert min(smaller) > 5


@pytest.mark.vllm
def test_our_synchronous_scheduler_refuses_an_engine_that_schedules_ahead(vllm_python: str, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    write_policy(policy, PolicySpec.parse("fcfs"))
    script = (
        "import vllm_schedule as v; v.RecordingAsyncScheduler = v.RecordingScheduler; "
        f"v.make_scheduler({_specs(True)[0]!r}, v.make_model_config())"
    )
    path = os.pathsep.join((str(HERE), str(HERE.parents[1] / "src")))
    environment = os.environ | {POLICY_VARIABLE: str(policy), "PYTHONPATH": path}
    run = subprocess.run([vllm_python, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 1
    assert "got RecordingScheduler with --async-scheduling; allowed: PolicyAsyncScheduler" in run.stderr
