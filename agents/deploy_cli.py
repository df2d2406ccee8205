"""``servegym deploy``: a policy before live engines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console

from servegym.agents.progress import Bar
from servegym.errors import EngineError, InputError

if TYPE_CHECKING:
    from servegym.baselines.policy_spec import PolicySpec
    from servegym.engine_bridge.cluster.config import ClusterFile
    from servegym.engine_bridge.cluster.launcher import LiveCluster
    from servegym.engine_bridge.gateway.config import DeployConfig
    from servegym.engine_bridge.gateway.static_key import StaticKey

_COMMANDS = ("run", "status", "swap", "drain", "readmit", "stop")


class _RunByDefault(typer.core.TyperGroup):
    """Lets ``deploy POLICY ...`` stand for ``deploy run POLICY ...``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*_COMMANDS, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


deploy_app = typer.Typer(
    cls=_RunByDefault,
    help="Put a policy before live engines. `deploy POLICY` is short for `deploy run POLICY`.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Option(help="The deployment's name.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; messages go to stderr.")]


@deploy_app.command()
def run(
    policy: Annotated[
        str, typer.Argument(metavar="POLICY", help="An engine policy by name, file.py:Class, a bundle or run folder.")
    ],
    cluster: Annotated[
        str,
        typer.Option(help="A cluster that runs, by name; or a cluster file, whose engines are started or attached to."),
    ],
    config: Annotated[str | None, typer.Option(help="A deployment file (kind deploy) by name, or a path.")] = None,
    request_policy: Annotated[
        str | None, typer.Option(metavar="NAME[,KEY=VALUE]", help="Order of the engines' waiting queues.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="shadow, canary or full.")] = None,
    percent: Annotated[float | None, typer.Option(help="Of sessions, for a canary.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Engine policy that acts where POLICY does not.")] = None,
    listen: Annotated[str | None, typer.Option(help="Address of the endpoint, 127.0.0.1:8000.")] = None,
    name: Annotated[str | None, typer.Option(help="Names state and logs in runs/deploy.")] = None,
    no_envoy: Annotated[
        bool, typer.Option("--no-envoy", help="Only the Endpoint Picker, for a gateway that brings its own Envoy.")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value: limits.in_flight=100.")
    ] = None,
) -> None:
    """Serve the engines of a cluster behind one OpenAI-compatible endpoint, by a policy, until Ctrl-C."""
    from servegym.engine_bridge.gateway.arms import check_policy
    from servegym.engine_bridge.gateway.serve import serve
    from servegym.engine_bridge.router.discovery import Discovery

    given = {
        "policy": policy.removeprefix("engine="),
        "request_policy": request_policy,
        "mode": mode,
        "percent": percent,
        "baseline": baseline,
        "listen": listen,
        "name": name,
    }
    loaded = _load(config, {key: value for key, value in given.items() if value is not None}, settings or [])
    check_policy(loaded.policy, loaded.deadline_ms / 1000)
    file = _discovering(cluster)
    if file is not None:
        key = None if loaded.request_policy is None else _static_key(loaded.request_policy, loaded)
        _say(f"engines: all that answer to {file.discover}")
        asyncio.run(
            serve(
                loaded,
                _folder(loaded.name),
                (),
                discovery=Discovery(str(file.discover), file.most_engines),
                static_key=key,
                with_envoy=not no_envoy,
                facts={"cluster": file.name},
                say=_say,
            )
        )
        return
    with _engines(cluster, loaded.request_policy) as live, contextlib.suppress(asyncio.CancelledError):
        key = _request_level(live, loaded)
        facts = {"cluster": live.name, "model": live.model}
        facts |= {"request_policy": str(loaded.request_policy)} if loaded.request_policy else {}
        urls = [engine.url for engine in live.engines]
        asyncio.run(
            serve(loaded, _folder(loaded.name), urls, static_key=key, with_envoy=not no_envoy, facts=facts, say=_say)
        )


@deploy_app.command()
def status(
    name: Name = "default",
    watch: Annotated[bool, typer.Option("--watch", help="Until Ctrl-C: a live page; off a terminal, lines.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks of --watch.")] = 2.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout; with --watch one a line.")
    ] = False,
) -> None:
    """Show a deployment: its policy, mode, traffic and engines."""
    from servegym.agents import deploy_view

    content = _call(name, "/status")

    def look() -> dict[str, Any]:
        try:
            return _call(name, "/status")
        except InputError:
            raise EngineError(f"{name} has ended") from None

    if watch:
        deploy_view.watch(look, interval, as_json)
    elif as_json:
        print(json.dumps(content, indent=1))
    else:
        console = Console() if sys.stdout.isatty() else Console(width=140)
        console.print(deploy_view.page(content, width=console.width))


@deploy_app.command()
def swap(
    policy: Annotated[str | None, typer.Argument(metavar="[POLICY]", help="The new policy; none: the same.")] = None,
    mode: Annotated[str | None, typer.Option(help="shadow, canary or full.")] = None,
    percent: Annotated[float | None, typer.Option(help="Of sessions, for a canary.")] = None,
    name: Name = "default",
) -> None:
    """Let another policy decide, or the same in another mode. It must first answer recorded requests; none is lost."""
    from servegym.baselines.policy_spec import PolicySpec

    given = {"policy": policy and policy.removeprefix("engine="), "mode": mode, "percent": percent}
    content = {key: value for key, value in given.items() if value is not None}
    if not content:
        raise InputError("deploy swap", "", "nothing to change; allowed: POLICY, --mode, --percent")
    if policy is not None:
        content["policy"] = str(PolicySpec.parse(policy.removeprefix("engine=")).located())
    with Bar("rehearsing the policy", None):
        _call(name, "/policy", content)
    state = _call(name, "/status")
    _say(f"{name}: {state['policy']} (version {state['version']}), mode {state['mode']}")


@deploy_app.command()
def drain(
    engine: Annotated[str, typer.Argument(help="URL or host:port of an engine.")], name: Name = "default"
) -> None:
    """Send an engine nothing new; what it runs goes on."""
    _call(name, "/drain", {"engine": engine})
    _say(f"{name}: {engine} gets no new requests")


@deploy_app.command()
def readmit(
    engine: Annotated[str, typer.Argument(help="URL or host:port of an engine.")], name: Name = "default"
) -> None:
    """Send requests again to an engine that was drained."""
    _call(name, "/drain", {"engine": engine, "drain": False})
    _say(f"{name}: {engine} gets requests")


@deploy_app.command()
def stop(name: Name = "default") -> None:
    """End a deployment after its running streams."""
    from servegym.engine_bridge.cluster.engine import process_alive, stop_groups
    from servegym.engine_bridge.gateway.serve import STATE, read_state

    state = read_state(_folder(name))
    if state is None:
        raise _not_serving(name)
    with contextlib.suppress(ProcessLookupError):
        os.kill(state["pid"], signal.SIGTERM)
    with Bar("draining: running streams may end", None):
        while process_alive(state["pid"]):
            time.sleep(0.1)
    # Of a deployment that was killed, Envoy still runs.
    if state["envoy_group"]:
        stop_groups([state["envoy_group"]], timeout_s=3.0)
    (_folder(name) / STATE).unlink(missing_ok=True)
    _say(f"{name}: ended")


def _load(config: str | None, given: dict[str, Any], settings: Sequence[str]) -> DeployConfig:
    from servegym.configuration import apply_overrides, find_config, load_mapping, validate
    from servegym.engine_bridge.gateway.config import DeployConfig

    source = "deploy" if config is None else str(find_config(config, "deploy"))
    content = {} if config is None else load_mapping(source)
    return validate(DeployConfig, apply_overrides(content | given, settings), source)


def _discovering(cluster: str) -> ClusterFile | None:
    """The cluster file, if it is one whose engines come and go."""
    from servegym.configuration import load_config
    from servegym.engine_bridge.cluster.config import ClusterFile

    if any(folder.is_dir() for folder in (Path(cluster), Path("runs") / "clusters" / cluster)):
        return None
    file = load_config(ClusterFile, cluster, "clusters")
    return file if file.discover is not None else None


@contextlib.contextmanager
def _engines(cluster: str, request_policy: PolicySpec | None) -> Iterator[LiveCluster]:
    """The cluster that runs under this name, or the one of this file, started for as long as needed."""
    from servegym.configuration import load_config
    from servegym.engine_bridge.cluster.config import ClusterFile
    from servegym.engine_bridge.cluster.launcher import find_cluster, running_cluster

    folders = Path("runs") / "clusters"
    for folder in (Path(cluster), folders / cluster):
        found = find_cluster(folder)
        if found is not None:
            yield found
            return
    file = load_config(ClusterFile, cluster, "clusters")
    found = find_cluster(folders / file.name)
    if found is not None and all(engine.running for engine in found.engines):
        yield found
        return
    with contextlib.ExitStack() as stack:
        with Bar(f"starting {file.name}, gives up after {file.ready_timeout_s:g} s", None) as bar:
            wanted = _with_order(file, request_policy)
            started = stack.enter_context(running_cluster(wanted, folders / file.name, bar.say))
        yield started


def _with_order(file: ClusterFile, request_policy: PolicySpec | None) -> ClusterFile:
    """Start engines with our scheduler where a request policy is wanted and vLLM's priorities are not."""
    if request_policy is None or file.attach or file.arguments.get("scheduling-policy") == "priority":
        return file
    return file.model_copy(update={"request_policy": request_policy})


def _request_level(live: LiveCluster, config: DeployConfig) -> StaticKey | None:
    """Put the request policy in force, inside the engines or as a key of each request."""
    from servegym.engine_bridge.cluster.priorities import heeds_priorities

    spec = config.request_policy
    if spec is None:
        return None
    if live.ordered:
        live.follow(spec)
        _say(f"waiting queues: {spec}, by our scheduler in the engines")
        return None
    key = _static_key(spec, config)
    for engine in live.engines:
        heeds = heeds_priorities(engine.url, live.model)
        if heeds is False:
            raise InputError(
                "deploy",
                "request_policy",
                f"got {spec}, but {engine.url} admits first come first served and ignores priorities; allowed: engines"
                " with --scheduling-policy priority, or with our scheduler (request_policy in the cluster file)",
            )
        if heeds is None:
            _say(f"{engine.url}: cannot tell whether it heeds priorities; it needs --scheduling-policy priority")
    _say(f"waiting queues: {spec}, as a fixed priority of each request")
    return key


def _static_key(spec: PolicySpec, config: DeployConfig) -> StaticKey:
    from servegym.baselines.registry import create
    from servegym.engine_bridge.gateway.static_key import StaticKey

    return StaticKey(create("request", spec), str(spec), config.engine.prefill_tokens_per_s)


def _folder(name: str) -> Path:
    return Path("runs") / "deploy" / name


def _state(name: str) -> dict[str, Any]:
    from servegym.engine_bridge.cluster.engine import process_alive
    from servegym.engine_bridge.gateway.serve import read_state

    state = read_state(_folder(name))
    if state is None or not process_alive(state["pid"]):
        raise _not_serving(name)
    return state


def _not_serving(name: str) -> InputError:
    return InputError(
        "deploy", "name", f"got {name}, which does not serve; start it: servegym deploy POLICY --cluster NAME"
    )


def _call(name: str, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
    url = f"http://{_state(name)['admin']}{path}"
    body = None if content is None else json.dumps(content).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as response:
            answer: dict[str, Any] = json.loads(response.read())
    except urllib.error.HTTPError as error:
        raise InputError("", "", json.loads(error.read())["error"]) from None
    except OSError as error:
        raise EngineError(f"the deployment does not answer: {error}") from None
    return answer


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
