"""The engine kernel schedules exactly as vLLM's own scheduler, step by step."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from servegym.configuration import validate
from servegym.envs.simulator.schedule_trace import ScheduleSpec, schedule_trace

HERE = Path(__file__).parent
SPECS = 300


def _specs() -> list[dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("oracle_specs", HERE / "specs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [module.random_spec(seed) for seed in range(SPECS)]


@pytest.fixture(scope="module")
def truth(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("oracle") / "specs.json"
    path.write_text(json.dumps(_specs()), encoding="utf-8")
    run = subprocess.run(
        [vllm_python, str(HERE / "vllm_schedule.py"), str(path)], capture_output=True, text=True, check=True
    )
    traces: list[list[dict[str, Any]]] = [[] for _ in range(SPECS)]
    for line in run.stdout.splitlines():
        step = json.loads(line)
        traces[step.pop("spec")].append(step)
    return traces


@pytest.mark.vllm
def test_no_step_differs_from_vllm(truth: list[list[dict[str, Any]]]) -> None:
    differing = []
    for seed, (spec, expected) in enumerate(zip(_specs(), truth, strict=True)):
        actual = list(schedule_trace(validate(ScheduleSpec, spec, f"seed {seed}")))
        if actual != expected:
            step = next((i for i, pair in enumerate(zip(actual, expected, strict=False)) if pair[0] != pair[1]), -1)
            differing.append((seed, step, actual[step], expected[step]))
    assert not differing, f"{len(differing)} of {SPECS} specs differ; (seed, step, servegym, vLLM): {differing[0]}"


@pytest.mark.vllm
def test_the_specs_cover_what_is_hard(truth: list[list[dict[str, Any]]]) -> None:
    specs = _specs()
    assert sum(bool(step["preempted"]) for trace in truth for step in trace) > 500
    assert {(spec["policy"], spec["prefix_caching"]) for spec in specs} == {
        (policy, caching) for policy in ("fcfs", "priority") for caching in (False, True)
    }
    assert any(request["output_len"] == 1 for spec in specs for request in spec["requests"])
    assert any(
        len(request["prompt"]) > spec["max_num_batched_tokens"] for spec in specs for request in spec["requests"]
    )
