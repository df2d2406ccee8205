"""Starting, finding and ending engines; what they are stands aside here, see tests/live for the real ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from servegym.baselines.policy_spec import PolicySpec
from servegym.configuration import validate
from servegym.engine_bridge.cluster.config import ClusterFile
from servegym.engine_bridge.cluster.engine import group_alive
from servegym.engine_bridge.cluster.launcher import STATE, describe_shim, find_cluster, running_cluster, start_cluster
from servegym.errors import EngineError, InputError

Make = Callable[..., ClusterFile]


def test_a_cluster_starts_is_found_and_ends_whole(fake_cluster: Make, tmp_path: Path) -> None:
    said: list[str] = []
    with running_cluster(fake_cluster(), tmp_path / "state", said.append) as cluster:
        assert cluster.model == "model"
        assert all(engine.running for engine in cluster.engines)
        assert find_cluster(tmp_path / "state") == cluster
        assert [line.rpartition(": ")[2] for line in said if "ready" in line] == ["ready", "ready"]
        with pytest.raises(InputError, match="the cluster runs already; end it: servegym cluster down fake"):
            start_cluster(fake_cluster(), tmp_path / "state")
        pids = [engine.pid for engine in cluster.engines]
    assert not any(group_alive(pid) for pid in pids if pid)
    assert find_cluster(tmp_path / "state") is None


def test_an_engine_that_ends_shows_its_last_words_and_takes_the_others_along(
    fake_cluster: Make, tmp_path: Path
) -> None:
    with pytest.raises(EngineError) as caught:
        start_cluster(fake_cluster({"crash": True}), tmp_path / "state")
    assert "ended with code 3" in str(caught.value)
    assert str(caught.value).endswith("  loading the model\n  out of memory, alas")
    assert not (tmp_path / "state" / STATE).exists()


def test_a_server_that_answers_but_completes_nothing_is_not_ready(fake_cluster: Make, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="was not ready within ready_timeout_s"):
        start_cluster(fake_cluster({"broken": True}, engines=1, ready_timeout_s=2), tmp_path / "state")


def test_a_port_in_use_is_one_line(fake_cluster: Make, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cluster: ports.0: got {port}; Address already in use"):
            start_cluster(fake_cluster(ports=[port], engines=1), tmp_path / "state")


def test_attaching_to_engines_that_run(fake_cluster: Make, tmp_path: Path) -> None:
    with running_cluster(fake_cluster(), tmp_path / "state") as cluster:
        urls = [engine.url for engine in cluster.engines]
        attached = start_cluster(ClusterFile(name="mine", attach=tuple(urls)), tmp_path / "mine")
        assert attached.model == "model"
        assert [engine.pid for engine in attached.engines] == [None, None]
        attached.stop()
        assert all(engine.running for engine in cluster.engines)
        with pytest.raises(InputError, match=r"served_model_name: got gpt; http://.* serves model"):
            start_cluster(ClusterFile(name="m", attach=tuple(urls), served_model_name="gpt"), tmp_path / "m")
        with pytest.raises(InputError, match="request_policy: the engines run vLLM's own scheduler"):
            cluster.set_request_policy(PolicySpec(name="fcfs"))
    with pytest.raises(InputError, match=r"attach: got http://127.0.0.1:9, where no vLLM engine answers"):
        start_cluster(ClusterFile(name="none", attach=("http://127.0.0.1:9",)), tmp_path / "none")


def test_ctrl_c_while_starting_leaves_no_process(fake_cluster: Make, tmp_path: Path) -> None:
    file = fake_cluster({"broken": True})
    path = tmp_path / "cluster.json"
    path.write_text(file.model_dump_json())
    code = (
        "import sys; from servegym.agents.cli import main; "
        f"sys.argv = ['servegym', 'cluster', 'up', {str(path)!r}, '--folder', {str(tmp_path / 'state')!r}]; main()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    state = tmp_path / "state" / STATE
    deadline = time.monotonic() + 30
    while not state.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [engine["pid"] for engine in json.loads(state.read_text())["engines"]]
    assert all(group_alive(pid) for pid in pids)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert not any(group_alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"name": "a/b"}, "name: got 'a/b'"),
        ({"name": "x", "ports": [1, 2, 3]}, "as many ports as engines (2), got 3"),
        ({"name": "x", "ports": [8000, 8000]}, "ports that differ"),
        ({"name": "x", "attach": ["localhost:8000"]}, "URLs like http://127.0.0.1:8000"),
        ({"name": "x", "engines": 0}, "engines: got 0; allowed: greater than or equal to 1"),
        ({"name": "x", "python": 3}, "python: got 3"),
    ],
)
def test_bad_files_are_one_line(content: dict[str, object], line: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]+$") as caught:
        validate(ClusterFile, content, "cluster.yaml")
    assert line in str(caught.value)


def test_a_missing_interpreter_is_one_line(fake_cluster: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="python: got /no/python, which is no program; allowed: an interpreter with"):
        start_cluster(fake_cluster(python="/no/python"), tmp_path / "state")


def test_what_orders_a_queue_is_said_in_words() -> None:
    state = {"tier": "policy", "policy": "fcfs", "version": 3, "failures": 2, "reason": ""}
    assert describe_shim(state) == "ordered by fcfs (version 3, 2 failed decisions)"
    assert describe_shim(state | {"tier": "stock", "reason": "no queue"}) == "vLLM's own order: no queue"
    assert describe_shim(None) == "vLLM's own order: our scheduler was not loaded"
