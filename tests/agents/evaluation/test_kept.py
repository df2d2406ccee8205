"""The user's policies in the folder of an evaluation: moved, changed and trained anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from servegym.agents.evaluation import EvaluationConfig, evaluate
from servegym.agents.evaluation.folder import load_evaluation
from servegym.agents.evaluation.run import run_cell
from servegym.configuration import validate
from servegym.engine_bridge.shipped import shipped_bundles
from servegym.errors import InputError

MINE = """
class Mine:
    def score(self, request, engines):
        return engines.prefill_tokens + {weight} * engines.kv_usage
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE.format(weight=100), encoding="utf-8")
    shutil.copytree(shipped_bundles()["servegym/dispatch"], "learned")
    return tmp_path


def _config() -> EvaluationConfig:
    content = {
        "cluster": {"engines": 2},
        "workloads": [{"name": "fixed", "requests": 40}],
        "loads": [0.9],
        "seeds": 1,
        "baseline": "rr",
        "policies": {
            "rr": {"engine": "round_robin"},
            "my/own": {"engine": "mine.py:Mine"},
            "learned": {"engine": "learned"},
        },
    }
    return validate(EvaluationConfig, content, "test")


def test_a_report_finds_policies_that_were_moved_or_changed(here: Path) -> None:
    result = evaluate(_config(), processes=1, out=here / "run", progress=False)
    # In place, the policies keep the names that they were evaluated by.
    assert load_evaluation(here / "run")[0].config == result.config
    Path("mine.py").write_text(MINE.format(weight=-1e9), encoding="utf-8")
    Path("learned").rename("elsewhere")
    changed, _ = load_evaluation(here / "run")
    assert run_cell(changed.config, (0, 0.9, 0)) == result.rows
    Path("mine.py").unlink()
    Path("run").rename("moved")
    moved, _ = load_evaluation(here / "moved")
    assert run_cell(moved.config, (0, 0.9, 0)) == result.rows
    assert moved.config.policies["my/own"].engine.name == str(here / "moved/policies/my%2Fown.engine/mine.py:Mine")


OTHER = "has results of an earlier version of {}; allowed:"


def test_results_of_two_versions_of_a_policy_are_not_mixed(here: Path) -> None:
    evaluate(_config(), processes=1, out=here / "run", progress=False)
    evaluate(_config(), processes=1, out=here / "run", progress=False)
    Path("mine.py").write_text(MINE.format(weight=7), encoding="utf-8")
    with pytest.raises(InputError, match="policies.my/own: " + OTHER.format("mine.py:Mine")):
        evaluate(_config(), processes=1, out=here / "run", progress=False)
    Path("mine.py").write_text(MINE.format(weight=100), encoding="utf-8")
    with (here / "learned" / "policy.json").open("a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(InputError, match="policies.learned: " + OTHER.format("learned")):
        evaluate(_config(), processes=1, out=here / "run", progress=False)
