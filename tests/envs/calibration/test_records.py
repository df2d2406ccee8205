"""Step records: what the scheduler writes, and what a calibration reads from them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from servegym.engine_bridge.vllm_plugin.steps import StepRecorder, steps_file
from servegym.envs.calibration.records import WINDOW, Step, StepRecords, durations, each_step, samples_of
from servegym.errors import EngineError

LIMITS = {"block_size": 16}


def output(new: dict[str, int], cached: dict[str, int], tokens: dict[str, int]) -> Any:
    """A SchedulerOutput: tokens computed before, of new and of known requests, and scheduled tokens."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=done) for name, done in new.items()],
        scheduled_cached_reqs=SimpleNamespace(req_ids=list(cached), num_computed_tokens=list(cached.values())),
        num_scheduled_tokens=tokens,
    )


REQUESTS = {"a": SimpleNamespace(num_prompt_tokens=100), "b": SimpleNamespace(num_prompt_tokens=10)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return steps_file(tmp_path / "engine-0.shim.json")


def test_steps_go_from_the_scheduler_to_the_samples(path: Path) -> None:
    recorder = StepRecorder(path)
    with StepRecords(path) as records:
        records.wait(lambda: recorder.refresh(lambda: LIMITS | {"prefill_tokens_per_s": 9000.0}))
        assert records.limits == LIMITS
        assert records.prefill_tokens_per_s == 9000.0
        # A chunk of 20 after 32 cached tokens beside a decoding request, then two decode steps, the last one.
        steps = [
            (1.0, 1.010, output({"a": 32}, {"b": 14}, {"a": 20, "b": 1}), True),
            (1.02, 1.025, output({}, {"b": 15}, {"b": 1}), True),
            (1.03, 1.035, output({}, {"b": 16}, {"b": 1}), True),
            (1.05, 1.055, output({}, {"b": 17}, {"b": 1}), False),
        ]
        for start, end, step, busy in steps:
            recorder.scheduled(start, step, REQUESTS)
            recorder.updated(step, end, busy)
        mixed, decode = samples_of(records.read(), "p", 0)
        assert (mixed.sequences, mixed.prefill_tokens, mixed.prior_tokens, mixed.decodes) == (2, 20, 32, 1)
        assert mixed.prefill_pairs == 20 * (32 + 21 / 2)
        assert mixed.context_tokens == 15
        assert mixed.us == pytest.approx(20_000)
        assert (decode.sequences, decode.decodes, decode.context_tokens) == (1, 1, 16.5)
        assert decode.us == pytest.approx(15_000)
        assert records.read() == []
    assert not path.exists()


def test_two_that_record_one_engine_are_told(path: Path) -> None:
    with StepRecords(path) as records:
        path.unlink()
        with pytest.raises(EngineError, match="another calibration or validation"):
            records.read()


def test_stragglers_are_no_usual_steps() -> None:
    starts = np.cumsum([0.0, *[0.01] * 9, 0.5, 0.01])
    steps = [Step(start, start + 0.005, True, 1, 0, 0, 0.0, 1, 50) for start in starts]
    (decode,) = samples_of(steps, "p", 0)
    assert decode.us == pytest.approx(10_000)


def test_traffic_counts_in_whole_windows() -> None:
    steps = [Step(0.01 * i, 0.01 * i + 0.005, i != 20, 2, 0, 0, 0.0, 2, 80) for i in range(2 * WINDOW + 8)]
    samples = each_step(steps, "traffic", 1)
    assert [sample.window for sample in samples] == [0] * WINDOW + [1] * WINDOW
    assert {sample.kind for sample in samples} == {"traffic"}
    # The step after which the engine had nothing to do lasted nobody knows how long.
    assert len(list(durations(steps))) == len(steps) - 2


def test_it_stops_when_the_file_is_gone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servegym.engine_bridge.vllm_plugin.steps._LOOK_S", 0.0)
    recorder = StepRecorder(path)
    assert not recorder.refresh(lambda: LIMITS)
    path.touch()
    assert recorder.refresh(lambda: LIMITS)
    path.unlink()
    assert not recorder.refresh(lambda: LIMITS)
    assert not path.exists()


def test_steps_scheduled_ahead_are_matched_to_their_results(path: Path) -> None:
    path.touch()
    recorder = StepRecorder(path)
    recorder.refresh(lambda: LIMITS)
    first, second = (output({}, {"b": 14 + i}, {"b": 1}) for i in range(2))
    recorder.scheduled(1.0, first, REQUESTS)
    recorder.scheduled(1.1, second, REQUESTS)
    recorder.updated(first, 1.2, True)
    recorder.updated(second, 1.3, False)
    lines = path.read_text().splitlines()[1:]
    assert [line.split()[:3] for line in lines] == [
        ["1.0000000", "1.2000000", "1"],
        ["1.2000000", "1.3000000", "0"],  # it began when the first one ended
    ]


def test_a_failure_ends_the_recording_and_nothing_else(path: Path) -> None:
    path.touch()
    recorder = StepRecorder(path)
    recorder.refresh(lambda: LIMITS)
    recorder.scheduled(1.0, SimpleNamespace(), REQUESTS)
    assert not recorder.recording
    recorder.updated(None, 1.0, True)
