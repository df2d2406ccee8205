"""Executors: the same results from all of them, lost workers, bad input, other code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import execution_units
import pytest
import yaml
from support import TOY

from servegym.agents.evaluation import EvaluationConfig, evaluate
from servegym.agents.execution import BackendConfig, open_executor
from servegym.agents.execution.origin import Origin
from servegym.agents.runs import RunFolder
from servegym.agents.training.config import TrainConfig
from servegym.agents.training.seeds import train_seeds
from servegym.agents.training.trainer import train
from servegym.agents.tuning.config import TuneConfig
from servegym.agents.tuning.tune import tune
from servegym.configuration import validate
from servegym.errors import InputError, WorkerError

EVERYWHERE = pytest.mark.parametrize("backend", ["local", "ray", "slurm"], indirect=True)
ELSEWHERE = pytest.mark.parametrize("backend", ["ray", "slurm"], indirect=True)
RAY = pytest.mark.parametrize("backend", ["ray"], indirect=True)

LETHAL = """
import os, signal
from pathlib import Path

class Lethal:
    def reset(self, seed):
        here = Path(__file__).parent
        if str(os.getpid()) != (here / "driver").read_text():
            try:
                (here / "armed").rename(here / "fired")
            except FileNotFoundError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    def score(self, request, engines):
        return engines.prefill_tokens
"""
TRAINING: dict[str, Any] = {
    "name": "tiny",
    "total_steps": 200,
    "evolution": {"episodes": 1, "population": 4},
    "network": {"width": 1},
    "env": {"cluster": {"engines": 2}, "episode_requests": 20, "reference": "lmetric"},
    "evaluation": {"episodes": 1},
}


def _evaluation(folder: Path) -> dict[str, Any]:
    (folder / "profile.yaml").write_text(yaml.safe_dump(TOY), encoding="utf-8")
    (folder / "lethal.py").write_text(LETHAL, encoding="utf-8")
    (folder / "driver").write_text(str(os.getpid()), encoding="utf-8")
    return {
        "cluster": {"engines": 2, "profile": "profile.yaml"},
        "workloads": [{"name": "azure-conv", "requests": 50}],
        "seeds": 6,
        "baseline": "rr",
        "policies": {"rr": {"engine": "round_robin"}, "mine": {"engine": "lethal.py:Lethal"}},
    }


@pytest.mark.parametrize("backend", ["local", "slurm"], indirect=True)
def test_cells_of_a_killed_worker_run_again_and_the_result_is_the_same(backend: BackendConfig, tmp_path: Path) -> None:
    config = validate(EvaluationConfig, _evaluation(tmp_path), "test")
    alone = evaluate(config, processes=1, progress=False)
    (tmp_path / "armed").touch()
    elsewhere = config.model_copy(update={"backend": backend})
    assert json.dumps(evaluate(elsewhere, progress=False).as_json()) == json.dumps(alone.as_json())
    assert (tmp_path / "fired").exists()


@EVERYWHERE
def test_a_lost_unit_runs_again_and_the_finished_ones_do_not(backend: BackendConfig, tmp_path: Path) -> None:
    units = list(range(6))
    with open_executor(backend, probe=False) as executor:
        found = dict(executor.run(execution_units.doubled_once_lost, str(tmp_path), units))
    assert found == {unit: {"twice": 2 * unit, "share": unit / 3} for unit in units}
    attempts = [len((tmp_path / f"attempts-{unit}").read_text().split()) for unit in units]
    assert attempts[2] == 2
    # Of processes of this machine it is not known which unit the lost one had: all that were not finished run again.
    assert sum(attempts) == 7 or backend.name == "local"


def test_what_kills_every_worker_is_given_up() -> None:
    with (
        open_executor(BackendConfig(workers=2), probe=False) as executor,
        pytest.raises(WorkerError, match="4 times in a row"),
    ):
        list(executor.run(execution_units.always_lost, None, [0, 1]))


@EVERYWHERE
def test_bad_input_that_a_worker_finds_comes_back_as_it_is(backend: BackendConfig) -> None:
    with open_executor(backend, probe=False) as executor, pytest.raises(InputError) as caught:
        list(executor.run(execution_units.refused, None, [7, 7]))
    assert str(caught.value) == "some.yaml: a.b: got 7; allowed: nothing"


@ELSEWHERE
def test_a_worker_with_other_code_is_refused(backend: BackendConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Origin.here()
    monkeypatch.setattr(Origin, "here", lambda: replace(here, source="0123"))
    with open_executor(backend) as executor, pytest.raises(InputError, match=r"the worker on .* other code .* 0123"):
        list(executor.run(execution_units.place, None, [0]))


def test_a_worker_needs_the_same_packages_and_the_working_folder(tmp_path: Path) -> None:
    here = Origin.here()
    other = tuple((name, "0.0.1" if name == "numpy" else version) for name, version in here.versions)
    with pytest.raises(InputError, match=r"the worker on .*: numpy: is .*; allowed: 0\.0\.1"):
        replace(here, versions=other).enter()
    with pytest.raises(
        InputError, match="No such file or directory; allowed: a working folder that all machines share"
    ):
        replace(here, folder=str(tmp_path / "none")).enter()


@RAY
def test_workers_are_where_the_command_is(backend: BackendConfig, tmp_path: Path) -> None:
    with open_executor(backend) as executor:
        assert dict(executor.run(execution_units.place, None, [0])) == {0: str(tmp_path)}


@RAY
def test_runs_of_seeds_are_units_that_finish_once(backend: BackendConfig, tmp_path: Path) -> None:
    config = validate(TrainConfig, TRAINING | {"backend": backend}, "test")
    alone = train(validate(TrainConfig, TRAINING | {"seed": 1}, "test"), out=tmp_path / "alone", progress=False)
    # A worker was lost before its first checkpoint.
    RunFolder.create("tiny", tmp_path / "out" / "seed-1", config.model_copy(update={"seed": 1}).model_dump(mode="json"))
    found = train_seeds(config, [0, 1], out=tmp_path / "out", progress=False)
    assert list(found) == [0, 1]
    for name in ("policy.safetensors", "policy.json"):
        assert (found[1].policy / name).read_bytes() == (alone.policy / name).read_bytes()
    assert (tmp_path / "out" / "best").resolve() == min(found.values(), key=lambda run: run.best_objective).folder
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert train_seeds(config, [0, 1], out=tmp_path / "out", progress=False) == found
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    config = validate(TrainConfig, TRAINING, "test")
    RunFolder.create("tiny", tmp_path / "seed-0", config.model_dump(mode="json"))
    other = validate(TrainConfig, TRAINING | {"network": {"width": 2}}, "test")
    with pytest.raises(InputError, match="network: differs from the config given"):
        train_seeds(other, [0], out=tmp_path, progress=False)
    assert (tmp_path / "seed-0" / "config.yaml").is_file()


@RAY
def test_tuning_finds_the_same_elsewhere(backend: BackendConfig, tmp_path: Path) -> None:
    evaluation = _evaluation(tmp_path) | {"policies": {"rr": {"engine": "round_robin"}}}
    (tmp_path / "evaluation.yaml").write_text(yaml.safe_dump(evaluation), encoding="utf-8")
    content = {
        "name": "test",
        "evaluation": "evaluation.yaml",
        "changes": {"seeds": [100, 101]},
        "trials": 2,
        "contestants": {
            "gimbal": {"policies": {"engine": "gimbal2"}, "space": {"engine.prefill": {"low": 0.01, "high": 10}}},
        },
    }
    here = tune(validate(TuneConfig, content, "test"), tmp_path / "here", processes=1)
    there = tune(validate(TuneConfig, content | {"backend": backend}, "test"), tmp_path / "there")
    assert [(one.first, one.best, one.values) for one in there] == [(one.first, one.best, one.values) for one in here]


def test_where_cells_run_is_no_part_of_the_result() -> None:
    content = {
        "workloads": [{"name": "azure-conv"}],
        "policies": {"rr": {"engine": "round_robin"}},
        "baseline": "rr",
    }
    plain = validate(EvaluationConfig, content, "test")
    elsewhere = validate(EvaluationConfig, content | {"backend": {"name": "ray", "workers": 8}}, "test")
    assert elsewhere.backend.workers == 8
    assert plain.digest() == elsewhere.digest()
    assert "backend" not in elsewhere.model_dump()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "dask"}, "backend.name: got 'dask'; allowed: 'local', 'ray' or 'slurm'"),
        ({"name": "ray", "address": "here"}, "auto or HOST:PORT as the address of a Ray cluster"),
        ({"name": "ray", "address": "ray://host:1"}, "auto or HOST:PORT"),
        ({"name": "slurm", "address": "host:1"}, "local, or none, as the address with slurm"),
        ({"address": "auto"}, "an address only with ray or slurm"),
        ({"name": "ray", "options": {"timeout_min": 5}}, "options only with slurm"),
        ({"name": "ray", "workers": 0}, "backend.workers: got 0"),
    ],
)
def test_bad_backends_are_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(TrainConfig, TRAINING | {"backend": content}, "test")


def test_wrong_options_of_jobs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="needs servegym[slurm]")
    monkeypatch.chdir(tmp_path)
    backend = BackendConfig(name="slurm", address="local", options={"timeout_minutes": 5})
    with open_executor(backend) as executor, pytest.raises(InputError, match=r"backend: slurm: .*timeout_minutes"):
        list(executor.run(execution_units.place, None, [0]))
    assert not any((tmp_path / "runs" / "slurm").iterdir())


def _servegym(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "from servegym.agents.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd)


@RAY
def test_the_command_line_prints_the_same_with_ray(backend: BackendConfig, tmp_path: Path) -> None:
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(_evaluation(tmp_path)), encoding="utf-8")
    command = ("evaluate", "evaluate.yaml", "--json", "--workers", "2", "--backend")
    alone = _servegym(*command, "local", cwd=tmp_path)
    (tmp_path / "armed").touch()
    elsewhere = _servegym(*command, "ray", "--address", str(backend.address), cwd=tmp_path)
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert (tmp_path / "fired").exists()
    assert elsewhere.stdout == alone.stdout
    assert len(json.loads(alone.stdout)["cells"]) == 12


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs servegym[ray]")
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(_evaluation(tmp_path)), encoding="utf-8")
    done = _servegym("evaluate", "evaluate.yaml", "--backend", "ray", "--address", "127.0.0.1:9", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "servegym: error: backend: address: got 127.0.0.1:9: Connection refused; allowed: HOST"
    )
    assert done.stderr.count("\n") == 1


def test_a_server_that_is_no_cluster_is_named_at_once(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs servegym[ray]")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        backend = BackendConfig(name="ray", address=f"127.0.0.1:{server.server_address[1]}")
        with (
            open_executor(backend) as executor,
            pytest.raises(InputError, match="what answers there is no Ray cluster"),
        ):
            list(executor.run(execution_units.place, None, [0]))
        server.shutdown()


def test_train_takes_seeds_and_a_rerun_is_at_once_done(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAINING), encoding="utf-8")
    command = ("train", "train.yaml", "--seeds", "0-1", "--workers", "1", "--out", "out", "--json")
    first = _servegym(*command, cwd=tmp_path)
    assert [run["seed"] for run in json.loads(first.stdout)["runs"]] == [0, 1]
    assert _servegym(*command, cwd=tmp_path).stdout == first.stdout
    wrong = _servegym("train", "train.yaml", "--seeds", "3-1", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (2, "servegym: error: --seeds: got 3-1; allowed: 0-3, or 0,2,5\n")
