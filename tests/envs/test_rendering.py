"""Pictures and text of environments."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from servegym.errors import InputError

ENVIRONMENTS = ("EngineDispatch", "RequestOrdering", "RequestTuning", "ExpertPlacement", "MultiLayer")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_environment_draws_and_writes(name: str) -> None:
    config: dict[str, Any] = {"episode_requests": 60}
    if name == "ExpertPlacement":
        config["episode_requests"] = 1500
    picture = gymnasium.make(f"servegym/{name}-v0", config=config, render_mode="rgb_array", disable_env_checker=True)
    picture.reset(seed=0)
    image: Any = picture.render()
    assert image.shape == (540, 960, 3)
    assert image.dtype == np.uint8
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10
    text = gymnasium.make(f"servegym/{name}-v0", config=config, render_mode="ansi", disable_env_checker=True)
    text.reset(seed=0)
    written: Any = text.render()
    assert "engine 0: running" in written
    assert ("experts: load of ranks" in written) == (name in ("ExpertPlacement", "MultiLayer"))


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_another_mode_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}-v0: render_mode: got 'svg'; allowed: ansi, rgb_array"):
        gymnasium.make(f"servegym/{name}-v0", render_mode="svg", disable_env_checker=True)
