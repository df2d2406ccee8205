"""What a calibration sends to an engine."""

from __future__ import annotations

import pytest

from servegym.envs.calibration.design import TRAFFIC_OUTPUTS, Point, design
from servegym.envs.profiles.profile import EngineLimits


def limits(**changed: int) -> EngineLimits:
    known = {"block_size": 16, "num_blocks": 4096, "max_num_seqs": 16, "max_num_batched_tokens": 2048}
    return EngineLimits.model_validate(known | {"max_model_len": 8192} | changed)


def traffic(engine: EngineLimits) -> list[Point]:
    return [point for point in design(engine, traffic=True) if point.streams]


def test_traffic_has_prompts_that_need_several_steps() -> None:
    assert [point.chunk for point in traffic(limits())] == [4096, 4096, 3212]
    assert {point.streams for point in traffic(limits(max_num_seqs=8))} == {2, 6}


@pytest.mark.parametrize("changed", [{"num_blocks": 257}, {"max_model_len": 300}, {"max_num_batched_tokens": 64}])
def test_traffic_fits_into_the_engine(changed: dict[str, int]) -> None:
    engine = limits(**changed)
    for point in traffic(engine):
        assert point.chunk + TRAFFIC_OUTPUTS[1] <= engine.max_model_len
        assert point.streams * (point.chunk + TRAFFIC_OUTPUTS[1]) <= engine.num_blocks * engine.block_size


def test_no_traffic_without_records() -> None:
    assert not any(point.streams for point in design(limits()))
