"""Starting, finding and ending clusters of vLLM engines.

A cluster that runs in the background is a folder: ``state.json`` says which engines it has, and each engine has its log
there. ``policy.json`` names the request policy that the engines' schedulers follow, and may be replaced at any time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import servegym
import servegym.engine_bridge.bundle  # makes bundles available by path
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create_live
from servegym.engine_bridge.cluster.checkpoint import write_tiny_moe
from servegym.engine_bridge.cluster.config import TINY_MOE, ClusterFile
from servegym.engine_bridge.cluster.engine import (
    SERVER,
    EngineCommand,
    EngineProcess,
    check_port,
    completes,
    find_python,
    free_port,
    group_alive,
    healthy,
    served_models,
    stop_groups,
    vllm_arguments,
)
from servegym.engine_bridge.vllm_plugin.eplb import POLICY_VARIABLE as EPLB_VARIABLE
from servegym.engine_bridge.vllm_plugin.protocol import (
    POLICY_VARIABLE,
    RATE_VARIABLE,
    STATE_VARIABLE,
    read_policy,
    write_policy,
)
from servegym.errors import EngineError, InputError

STATE = "state.json"
POLICY = "policy.json"
PLUGIN = "servegym.engine_bridge.vllm_plugin.plugin:register"
WORKER = "servegym.engine_bridge.vllm_plugin.worker.ExpertExtension"
SCHEDULER = "servegym.engine_bridge.vllm_plugin.scheduler.PolicyAsyncScheduler"

Say = Callable[[str], None]


def describe_shim(state: dict[str, Any] | None) -> str:
    """Say what orders an engine's waiting queue, from the state of our scheduler in it."""
    if state is None:
        return "vLLM's own order: our scheduler was not loaded"
    if state["tier"] == "stock":
        return f"vLLM's own order: {state['reason']}"
    failed = f", {state['failures']} failed decisions" if state["failures"] else ""
    return f"ordered by {state['policy']} (version {state['version']}{failed})"


@dataclass(frozen=True, slots=True)
class LiveEngine:
    """One engine of a live cluster.

    Attributes:
        url: its server.
        pid: its process group; None if it was attached.
        log: its log file; None if it was attached.
        shim: where our scheduler inside it writes its state; None without one.
    """

    url: str
    pid: int | None = None
    log: str | None = None
    shim: str | None = None

    @property
    def running(self) -> bool:
        """Whether it answers."""
        return (self.pid is None or group_alive(self.pid)) and healthy(self.url)

    def shim_state(self) -> dict[str, Any] | None:
        """Return what our scheduler inside the engine said last; None without one."""
        if self.shim is None or not Path(self.shim).is_file():
            return None
        state: dict[str, Any] = json.loads(Path(self.shim).read_text(encoding="utf-8"))
        return state


@dataclass(frozen=True, slots=True)
class LiveCluster:
    """Engines that are ready.

    Attributes:
        name: of the cluster file.
        model: its name in requests.
        engines: the engines.
        folder: state and logs.
    """

    name: str
    model: str
    engines: tuple[LiveEngine, ...]
    folder: Path

    @property
    def ordered(self) -> bool:
        """Whether our scheduler orders the waiting queues of all engines."""
        return all(engine.shim for engine in self.engines)

    @property
    def request_policy(self) -> PolicySpec | None:
        """What the engines' schedulers were told last; None without our scheduler."""
        path = self.folder / POLICY
        return read_policy(path)[1] if path.is_file() else None

    @contextmanager
    def restoring_policy(self) -> Iterator[None]:
        """Put the request policy of before in force again on leaving."""
        before = self.request_policy
        try:
            yield
        finally:
            if before is not None:
                self.set_request_policy(before)

    @property
    def failed_decisions(self) -> int:
        """How often a request policy has failed in the engines' schedulers, which then ordered by arrival."""
        states = [engine.shim_state() for engine in self.engines]
        return sum(int(state["failures"]) for state in states if state is not None)

    def set_request_policy(self, spec: PolicySpec) -> int:
        """Let the engines' schedulers follow another request policy, within a second.

        Returns:
            The version of the policy file, which ``shim_state`` repeats once it is in force.

        Raises:
            InputError: no such policy, or engines without our scheduler.
        """
        create_live("request", spec)
        if not self.ordered:
            raise InputError(self.name, "request_policy", "the engines run vLLM's own scheduler; start them with one")
        return write_policy(self.folder / POLICY, spec.located())

    def follow(self, spec: PolicySpec, timeout_s: float = 60.0) -> int:
        """Let the engines' schedulers follow another request policy, and wait until they do.

        They look for one when they have something to do, so that they are given something.

        Returns:
            The version of the policy file.

        Raises:
            InputError: no such policy, or engines without our scheduler.
            EngineError: an engine does not take it up.
        """
        version = self.set_request_policy(spec)
        deadline = time.monotonic() + timeout_s
        for engine in self.engines:
            while (state := engine.shim_state()) is None or (state["tier"], state["version"]) != ("policy", version):
                if time.monotonic() > deadline:
                    raise EngineError(f"{engine.url} did not take up the request policy: {describe_shim(state)}")
                completes(engine.url, self.model)
                time.sleep(0.05)
        return version

    def stop(self) -> None:
        """End the engines that were started for the cluster."""
        stop_groups([engine.pid for engine in self.engines if engine.pid is not None])
        (self.folder / STATE).unlink(missing_ok=True)


def start_cluster(file: ClusterFile, folder: Path, say: Say = lambda text: None) -> LiveCluster:
    """Start the engines of a cluster file, or attach to those it names, and wait until each has completed a request.

    Args:
        file: the cluster.
        folder: for state and logs; made if absent.
        say: told of progress, a line each.

    Raises:
        InputError: a port in use, a cluster that runs already, an address where no engine answers.
        EngineError: an engine that does not start; those that did are ended.
    """
    if file.discover is not None:
        raise InputError(file.name, "discover", "such engines are for `servegym deploy`; allowed here: attach")
    earlier = find_cluster(folder)
    if earlier is not None and any(engine.pid is not None and group_alive(engine.pid) for engine in earlier.engines):
        raise InputError(str(folder), "", f"the cluster runs already; end it: servegym cluster down {file.name}")
    folder.mkdir(parents=True, exist_ok=True)
    if file.attach:
        return _attach(file, folder)
    if file.request_policy is not None:
        create_live("request", file.request_policy)
        write_policy(folder / POLICY, file.request_policy.located())
    commands = [_command(file, folder, index) for index in range(file.engines)]
    processes: list[EngineProcess] = []
    try:
        for command in commands:
            processes.append(EngineProcess(command))
            say(f"engine {command.url}: starting, log {command.log}")
        _write_state(file, folder, processes)
        deadline = time.monotonic() + file.ready_timeout_s
        for process in processes:
            process.wait_ready(deadline)
            say(f"engine {process.command.url}: ready")
    except BaseException:
        stop_groups([process.pid for process in processes])
        (folder / STATE).unlink(missing_ok=True)
        raise
    cluster = find_cluster(folder)
    assert cluster is not None
    for engine in cluster.engines:
        if engine.shim is not None:
            say(f"engine {engine.url}: {describe_shim(engine.shim_state())}")
    return cluster


@contextmanager
def running_cluster(file: ClusterFile, folder: Path, say: Say = lambda text: None) -> Iterator[LiveCluster]:
    """Start a cluster and end it on leaving; see :func:`start_cluster`."""
    cluster = start_cluster(file, folder, say)
    try:
        yield cluster
    finally:
        cluster.stop()


def find_cluster(folder: Path) -> LiveCluster | None:
    """Return the cluster whose state a folder holds, whether its engines still run or not; None without one."""
    path = folder / STATE
    if not path.is_file():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    engines = tuple(LiveEngine(**engine) for engine in state["engines"])
    return LiveCluster(state["name"], state["model"], engines, folder)


def _attach(file: ClusterFile, folder: Path) -> LiveCluster:
    models = {url: served_models(url) for url in file.attach}
    model = file.served_model_name or models[file.attach[0]][0]
    for url, names in models.items():
        if model not in names:
            raise InputError(file.name, "served_model_name", f"got {model}; {url} serves {', '.join(names)}")
        if not completes(url, model):
            raise InputError(file.name, "attach", f"got {url}, which answers but completes no request")
    engines = tuple(LiveEngine(url) for url in file.attach)
    _save(folder, file.name, model, engines)
    return LiveCluster(file.name, model, engines, folder)


def _command(file: ClusterFile, folder: Path, index: int) -> EngineCommand:
    if file.ports:
        check_port(file.host, file.ports[index], "cluster", f"ports.{index}")
    port = file.ports[index] if file.ports else free_port(file.host)
    tiny = file.model == TINY_MOE
    model = str(write_tiny_moe(folder / TINY_MOE).resolve()) if tiny else file.model
    served = _served_name(file)
    arguments = {"model": model, "served-model-name": served, "host": file.host, "port": port} | file.arguments
    environment = dict(os.environ) | {"VLLM_HOST_IP": file.host}
    if tiny:
        environment["HF_HUB_OFFLINE"] = "1"
    if file.cores:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = file.cores[index]
    if file.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = file.gpus[index]
    if file.request_policy is not None or file.expert_policy is not None or file.experts:
        environment |= _import_path(folder)
    if file.expert_policy is not None:
        environment[EPLB_VARIABLE] = str(file.expert_policy)
    if file.request_policy is not None:
        arguments.setdefault("scheduler-cls", SCHEDULER)
        environment |= _shim_environment(file, folder, index)
    if file.experts:
        arguments.setdefault("worker-extension-cls", WORKER)
        environment["VLLM_SERVER_DEV_MODE"] = "1"
    argv = (find_python(file.python), "-m", SERVER, *vllm_arguments(arguments))
    return EngineCommand(
        f"http://{file.host}:{port}", served, argv, environment | file.environment, folder / f"engine-{index}.log"
    )


def _served_name(file: ClusterFile) -> str:
    return file.served_model_name or Path(file.model).name


def _import_path(folder: Path) -> dict[str, str]:
    """Make our package and its plugin importable in the engine, and nothing else of this environment."""
    link = folder / "import" / "servegym"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(Path(servegym.__file__).parent, target_is_directory=True)
    metadata = link.with_name(f"servegym-{servegym.__version__}.dist-info")
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: servegym\nVersion: {servegym.__version__}\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\nservegym = {PLUGIN}\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(link.parent.resolve()), os.environ.get("PYTHONPATH"))))}


def _shim_environment(file: ClusterFile, folder: Path, index: int) -> dict[str, str]:
    shim = _shim_file(folder, index)
    shim.unlink(missing_ok=True)
    environment = {
        POLICY_VARIABLE: str((folder / POLICY).resolve()),
        STATE_VARIABLE: str(shim.resolve()),
    }
    if file.prefill_tokens_per_s is not None:
        environment[RATE_VARIABLE] = repr(file.prefill_tokens_per_s)
    return environment


def _shim_file(folder: Path, index: int) -> Path:
    return folder / f"engine-{index}.shim.json"


def _write_state(file: ClusterFile, folder: Path, processes: list[EngineProcess]) -> None:
    shims = [str(_shim_file(folder, i)) if file.request_policy else None for i in range(len(processes))]
    engines = tuple(
        LiveEngine(process.command.url, process.pid, str(process.command.log), shim)
        for process, shim in zip(processes, shims, strict=True)
    )
    _save(folder, file.name, _served_name(file), engines)


def _save(folder: Path, name: str, model: str, engines: tuple[LiveEngine, ...]) -> None:
    content = {"name": name, "model": model, "engines": [asdict(engine) for engine in engines]}
    partial = folder / f".{STATE}"
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(folder / STATE)
