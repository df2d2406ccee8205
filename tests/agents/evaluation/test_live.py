"""Evaluations on engines that answer as vLLM does, and at known times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from servegym.agents.evaluation import Evaluation, EvaluationConfig, evaluate
from servegym.configuration import validate
from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.cluster.launcher import running_cluster
from servegym.errors import InputError

POLICIES = '''
from pathlib import Path
import numpy as np

class First:
    """The first engine for all; writes down when it begins."""
    def __init__(self, log): self.log = Path(log)
    def reset(self, seed): self.log.open("a").write(f"first {seed}\\n")
    def score(self, request, engines): return np.arange(len(engines), dtype=float)

class Raises(First):
    def reset(self, seed): self.log.open("a").write(f"raises {seed}\\n")
    def score(self, request, engines): raise ValueError("no")
'''


@pytest.fixture
def engines(fake_cluster: Callable[..., ClusterFile], tmp_path: Path) -> Iterator[list[str]]:
    with running_cluster(fake_cluster({"ttft_s": 0.02, "itl_s": 0.001}), tmp_path / "cluster") as cluster:
        yield [engine.url for engine in cluster.engines]


def config(folder: Path, urls: list[str], **changes: Any) -> EvaluationConfig:
    code = folder / "policies.py"
    code.write_text(POLICIES)
    log = {"log": str(folder / "order")}
    content = {
        "live": {"urls": urls, "max_tokens": 200},
        "workloads": [{"name": "fixed", "requests": 20}],
        "rates_rps": [100.0],
        "seeds": 2,
        "warmup_share": 0.0,
        "baseline": "first",
        "policies": {
            "first": {"engine": {"name": f"{code}:First", "params": log}},
            "raises": {"engine": {"name": f"{code}:Raises", "params": log}},
        },
    }
    return validate(EvaluationConfig, content | changes, "test")


def printed(evaluation: Evaluation) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in evaluation.tables():
        console.print(table)
    return console.export_text()


def test_policies_take_turns_on_the_same_requests(engines: list[str], tmp_path: Path) -> None:
    wanted = config(tmp_path, engines)
    found = evaluate(wanted, out=tmp_path / "out")
    # The first repetition begins with the first policy, the second with the other one.
    assert (tmp_path / "order").read_text().split("\n")[:4] == ["first 0", "raises 0", "raises 1", "first 1"]
    assert [(row["seed"], row["policy"]) for row in found.rows] == [
        (0, "first"),
        (0, "raises"),
        (1, "first"),
        (1, "raises"),
    ]
    first, raises = found.rows[:2]
    assert [engine["requests"] for engine in first["per_engine"]] == [20]
    assert sum(engine["requests"] for engine in raises["per_engine"]) == 20
    assert (first["fallbacks"], raises["fallbacks"]) == (0, 20)
    assert "raises: 40 decisions by a heuristic in its place." in printed(found)
    assert 0.02 < found.values("ttft_s", "first", "fixed", 100.0)[0] < 0.2
    # What is done is not measured again.
    assert evaluate(wanted, out=tmp_path / "out").rows == found.rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates_rps": [], "loads": [0.8]}, "rates_rps with live engines"),
        ({"policies": {"first": {"expert": "eplb"}}}, "the placement that they have, not eplb of first"),
        (
            {"policies": {"first": {"request": "spf_aging"}}},
            "policies.first.request: got spf_aging; allowed: fcfs on these engines",
        ),
        ({"policies": {"first": {"engine": "jsw_oracle"}}}, "policy engine=jsw_oracle: needs true output lengths"),
        ({"live": {"cluster": "nowhere"}}, "live: cluster: got nowhere; no such cluster"),
    ],
)
def test_what_live_engines_cannot_do(engines: list[str], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(config(tmp_path, engines, **changes))
