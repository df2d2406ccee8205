"""The command line: contract, exit codes, one line for bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import TOY

WORKLOAD = {
    "name": "toy",
    "description": "made-up lengths",
    "source": "invented",
    "arrivals": {"process": "poisson"},
    "prompt_tokens": {"kind": "lognormal", "mu": [4.5], "sigma": [0.8]},
    "output_tokens": {"kind": "lognormal", "mu": [3.5], "sigma": [0.7]},
}


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def servegym(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    code = "from servegym.agents.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=_environment(), input=stdin)


def _interruptible(command: list[str]) -> subprocess.Popen[str]:
    """Start a process group that takes Ctrl-C even where the tests run in the background, with SIGINT ignored."""
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a profile, a workload, a trace and a config per command."""
    _write(tmp_path / "profile.yaml", TOY)
    _write(tmp_path / "workload.yaml", WORKLOAD)
    rows = [f"{i * 0.05},{50 + i},{10 + i % 5}" for i in range(200)]
    (tmp_path / "trace.csv").write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]), encoding="utf-8")
    cluster = {"engines": 2, "profile": str(tmp_path / "profile.yaml")}
    workload = {"name": str(tmp_path / "workload.yaml"), "requests": 300}
    _write(tmp_path / "simulate.yaml", {"cluster": cluster, "workload": workload | {"load": 0.7}})
    evaluation = {
        "cluster": cluster,
        "workloads": [workload],
        "loads": [0.5, 0.8],
        "seeds": 2,
        "baseline": "rr",
        "policies": {"rr": {"engine": "round_robin"}, "p2c": {"engine": "power_of_two"}},
    }
    _write(tmp_path / "evaluate.yaml", evaluation)
    env = {"cluster": cluster, "workload": workload | {"load": 0.7}, "episode_requests": 50, "reference": "lmetric"}
    algorithm = {"n_envs": 4, "n_steps": 32, "batch_size": 64}
    train = {
        "name": "toy",
        "total_steps": 256,
        "algorithm": algorithm,
        "env": env,
        "evaluation": {"every_steps": 128, "episodes": 2},
    }
    _write(tmp_path / "train.yaml", train)
    return tmp_path


def _write(path: Path, content: Any) -> None:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")


def _refused(run: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert run.returncode == 2, run.stderr
    lines = [line for line in run.stderr.splitlines() if not line.startswith("servegym: compiling")]
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("servegym: error: ")
    for part in parts:
        assert part in lines[0]
    assert run.stdout == ""


def test_list_describes_everything() -> None:
    content = json.loads(servegym("list", "--json").stdout)
    assert set(content) == {"policies", "bundles", "environments", "workloads", "profiles", "configs"}
    assert {"request", "engine", "expert"} == set(content["policies"])
    entries = [*content["policies"]["engine"], *(e for kind in list(content)[1:] for e in content[kind])]
    for entry in entries:
        assert {"name", "explanation", "parameters", "source"} <= set(entry)
        assert entry["explanation"], entry["name"]
    assert "azure-conv" in {entry["name"] for entry in content["workloads"]}
    assert "lmetric" in servegym("list").stdout
    assert {entry["name"] for entry in content["environments"]} == {
        f"servegym/{name}-v0"
        for name in ("EngineDispatch", "RequestOrdering", "RequestTuning", "ExpertPlacement", "MultiLayer")
    }
    for entry in content["environments"]:
        assert all(word in entry["page"] for word in ("Action Space", "Observation Space", "Rewards", "Arguments"))
        assert all(feature["meaning"] for features in entry["features"].values() for feature in features)
    for layer in content["policies"].values():
        for entry in layer:
            assert entry["source"], entry["name"]


def test_list_shows_one_entry_whole() -> None:
    page = servegym("list", "gimbal2").stdout
    assert "w_k * (x_k - mean x_k) / std x_k" in page
    assert "weight of KV use" in page
    assert "arXiv 2606.15177" in page
    assert "relative_batch" in servegym("list", "EngineDispatch-v0").stdout
    assert "uniformly at random" in servegym("list", "engine=random").stdout
    for name, line in (
        ("random", "list: random: several; allowed: engine=random, expert=random"),
        ("gimbal", "list: gimbal: unknown name; did you mean gimbal2?"),
    ):
        failed = servegym("list", name)
        assert failed.returncode == 2
        assert failed.stderr.strip().endswith(line)


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("aiohttp", "live", ["replay", "local", "--url", "http://127.0.0.1:9"]),
        ("torch", "train", ["train", "dispatch_ppo"]),
    ],
)
def test_a_missing_extra_is_one_line(module: str, extra: str, arguments: list[str]) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv[1:] = {arguments!r}\n"
        "from servegym.agents.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=_environment())
    assert done.returncode == 2
    assert done.stderr == f"servegym: error: {module} is not installed; allowed: pip install 'servegym[{extra}]'\n"


def test_simulate_prints_the_contract_and_repeats_itself(folder: Path) -> None:
    first = servegym("simulate", folder / "simulate.yaml", "--policy", "engine=lmetric", "--json")
    metrics = json.loads(first.stdout)
    assert {"requests", "wall_s", "ttft_s", "tpot_s", "per_engine", "expert_imbalance"} <= set(metrics)
    again = json.loads(servegym("simulate", folder / "simulate.yaml", "--policy", "engine=lmetric", "--json").stdout)
    other = json.loads(servegym("simulate", folder / "simulate.yaml", "--seed", "5", "--json").stdout)
    for result in (metrics, again, other):
        del result["wall_s"]
    assert metrics == again
    assert metrics != other
    assert "TTFT" in servegym("simulate", folder / "simulate.yaml").stdout


def test_a_policy_of_ones_own_in_ten_lines(folder: Path) -> None:
    policy = folder / "mine.py"
    policy.write_text(
        "class Shortest:\n    def score(self, request, engines):\n        return engines.prefill_tokens\n",
        encoding="utf-8",
    )
    run = servegym("simulate", folder / "simulate.yaml", "--policy", f"engine={policy}:Shortest", "--json")
    assert json.loads(run.stdout)["requests"] == 270


def test_an_error_in_ones_own_policy_is_one_line_from_a_worker_process_too(folder: Path) -> None:
    policy = folder / "mine.py"
    code = "class Late:\n    def score(self, request, engines):\n        if request.index == 250:\n"
    code += "            raise KeyError('a')\n        return engines.inflight\n"
    policy.write_text(code, encoding="utf-8")
    line = f"{policy}:4: KeyError: 'a', in score"
    # The first cell, of a shorter workload, runs in the parent and is fine.
    _write(folder / "longer.yaml", WORKLOAD | {"name": "longer"})
    counts = {"workload.yaml": 200, "longer.yaml": 300}
    workloads = [{"name": str(folder / name), "requests": count} for name, count in counts.items()]
    options = ["--policy", f"mine={policy}:Late", "--processes", "2", "--set", f"workloads={json.dumps(workloads)}"]
    _refused(servegym("evaluate", folder / "evaluate.yaml", *options), line)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["cluster.engnes=2"], ["cluster.engnes: unknown key", "did you mean engines"]),
        (["cluster.engines=many"], ["cluster.engines: got 'many'", "valid integer"]),
        (["workload.rate_rps=-3", "workload.load=null"], ["workload.rate_rps: got -3; allowed: greater than 0"]),
        (["policies.engine=round_robbin"], ["did you mean round_robin"]),
        (["slo.ttft_s=.nan"], ["slo.ttft_s: got nan; allowed: a finite number"]),
        (["workload.name=azur-conv"], ["did you mean azure-con"]),
    ],
)
def test_bad_settings(folder: Path, settings: list[str], parts: list[str]) -> None:
    options = [item for setting in settings for item in ("--set", setting)]
    _refused(servegym("simulate", folder / "simulate.yaml", *options), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("arrival_s,prompt_tokens\n0,5\n", ["output_tokens"]),
        ("arrival_s,prompt_tokens,output_tokens\n", ["trace.csv"]),
        ("arrival_s,prompt_tokens,output_tokens\n0,5,inf\n", ["trace.csv:2", "output_tokens", "inf"]),
        ("arrival_s,prompt_tokens,output_tokens\n0,5,1\n1,9000,5\n", ["requests[1]", "9000", "can never fit"]),
    ],
)
def test_bad_traces(folder: Path, text: str, parts: list[str]) -> None:
    (folder / "trace.csv").write_text(text, encoding="utf-8")
    workload = f"workload={{trace: {{path: {folder / 'trace.csv'}}}}}"
    _refused(servegym("simulate", folder / "simulate.yaml", "--set", workload), *parts)


def test_a_profile_with_a_missing_field(folder: Path) -> None:
    step_time = {key: value for key, value in TOY["step_time"].items() if key != "fixed_us"}
    _write(folder / "profile.yaml", TOY | {"step_time": step_time})
    _refused(servegym("simulate", folder / "simulate.yaml"), "profile.yaml: step_time.fixed_us: missing")


def test_wrong_usage_is_one_line_too(folder: Path) -> None:
    _refused(servegym("simulate", "--frobnicate"), "--frobnicate")
    _refused(servegym("frobnicate"), "frobnicate")
    _refused(servegym("train"), "a config, or --resume")
    _refused(servegym("evaluate", folder / "evaluate.yaml", "--set", "baseline=rrr"), "did you mean rr?")
    _refused(servegym("schedule-trace", folder / "trace.csv"), "not valid JSON")


@pytest.mark.parametrize(
    ("command", "option", "value", "problem"),
    [
        ("evaluate", "--policy", "lmetric", "allowed: LABEL=NAME"),
        ("evaluate", "--policy", "mine=request=lmetrik", "unknown policy; "),
        ("evaluate", "--policy", "mine=runs/none", "runs/none: no such policy bundle"),
        ("simulate", "--policy", "engine=spf_aging", "unknown policy; "),
        ("simulate", "--policy", "request=spf_aging,gamma=-1", "gamma: got -1; allowed: "),
        ("simulate", "--against", "engine=none.py:Mine", "no file none.py"),
    ],
)
def test_a_wrong_policy_is_named_by_its_option(
    folder: Path, command: str, option: str, value: str, problem: str
) -> None:
    run = servegym(command, folder / f"{command}.yaml", option, value)
    _refused(run, f"error: {option}: {value}: {problem}")


def test_policies_of_a_file_are_named_by_that_file(folder: Path) -> None:
    _write(folder / "best.yaml", {"mine": {"engine": "lmetrik"}})
    run = servegym("evaluate", folder / "evaluate.yaml", "--policies", folder / "best.yaml")
    _refused(run, f"error: {folder / 'best.yaml'}: mine: policy engine=lmetrik: unknown policy; did you mean lmetric")


def test_schedule_trace_reads_a_file_or_stdin() -> None:
    request = {"id": "r0", "arrival_step": 0, "prompt": list(range(40)), "output_len": 2, "priority": 0}
    spec = {
        "max_num_seqs": 2, "max_num_batched_tokens": 32, "num_blocks": 10, "block_size": 16, "max_model_len": 100,
        "policy": "fcfs", "prefix_caching": False, "requests": [request],
    }  # fmt: skip
    run = servegym("schedule-trace", "-", stdin=json.dumps(spec))
    assert [json.loads(line)["scheduled"] for line in run.stdout.splitlines()] == [{"r0": 32}, {"r0": 8}, {"r0": 1}]


def test_evaluate_is_the_same_in_one_process_and_in_two_and_goes_on_where_it_stopped(folder: Path) -> None:
    config, out = folder / "evaluate.yaml", folder / "out"
    alone = servegym("evaluate", config, "--processes", "1", "--json")
    content = json.loads(alone.stdout)
    assert len(content["cells"]) == 8
    assert servegym("evaluate", config, "--processes", "2", "--json", "--out", out).stdout == alone.stdout
    # All but the first line of the finished cells are lost, one of them in the middle of writing.
    lines = (out / "cells.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "cells.jsonl").write_text(lines[0] + lines[1][:40], encoding="utf-8")
    assert servegym("evaluate", config, "--json", "--out", out).stdout == alone.stdout
    _refused(servegym("evaluate", config, "--out", out, "--set", "seeds=3"), "another evaluation")
    rr = next(row for row in content["statistics"] if row["policy"] == "rr")
    assert rr["metrics"]["ttft_s"]["difference"]["value"] == 0.0
    table = servegym("evaluate", config, "--parquet", folder / "cells.parquet").stdout
    assert "p2c" in table
    assert (folder / "cells.parquet").stat().st_size > 0


def test_train_evaluate_and_simulate_a_learned_policy(folder: Path) -> None:
    run = servegym("train", folder / "train.yaml", "--out", folder / "run", "--json")
    result = json.loads(run.stdout)
    assert result["steps"] == 256
    learned = servegym("evaluate", folder / "evaluate.yaml", "--policy", f"learned={folder / 'run'}", "--json")
    assert {row["policy"] for row in json.loads(learned.stdout)["statistics"]} == {"rr", "p2c", "learned"}
    _refused(servegym("train", "--resume", folder / "run", "--steps", "999"), "--resume")
    _refused(servegym("train", folder / "train.yaml", "--set", "algorithm.n_step=3"), "did you mean n_steps")


def test_ctrl_c_in_training_leaves_a_checkpoint_that_resumes(folder: Path) -> None:
    code = "from servegym.agents.cli import main; main()"
    out = folder / "run"
    command = [sys.executable, "-c", code, "train", str(folder / "train.yaml"), "--out", str(out), "--steps", "200000"]
    process = _interruptible(command)
    deadline = time.monotonic() + 120
    while not (out / "evaluations.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "servegym train --resume" in errors
    assert "Traceback" not in errors
    assert list((out / "checkpoints").iterdir())
    assert not [path for path in out.rglob("*") if path.suffix == ".tmp"]
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert config["total_steps"] == 200_000


def test_ctrl_c_in_evaluation_leaves_no_worker_and_can_go_on(folder: Path) -> None:
    code = "from servegym.agents.cli import main; main()"
    out = folder / "out"
    workloads = f"workloads=[{{name: {folder / 'workload.yaml'}, requests: 20000}}]"
    options = ["--processes", "2", "--out", str(out), "--set", "seeds=400", "--set", workloads]
    command = [sys.executable, "-c", code, "evaluate", str(folder / "evaluate.yaml"), *options]
    process = _interruptible(command)
    deadline = time.monotonic() + 120
    cells = out / "cells.jsonl"
    while not (cells.is_file() and cells.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    assert all(json.loads(line)["rows"] for line in cells.read_text(encoding="utf-8").splitlines())
    while _alive(process.pid) and time.monotonic() < deadline + 60:
        time.sleep(0.1)
    assert not _alive(process.pid)  # the whole group is gone: no orphan


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
