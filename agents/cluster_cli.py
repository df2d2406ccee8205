"""``servegym cluster``: engines on this machine."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from servegym.agents.progress import Bar

if TYPE_CHECKING:
    from servegym.engine_bridge.cluster.launcher import LiveCluster

cluster_app = typer.Typer(help="Start, look at and end clusters of vLLM engines.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; messages go to stderr.")]
Folder = Annotated[Path | None, typer.Option(help="State and logs; default: runs/clusters/NAME.")]


def _folder(name: str, folder: Path | None) -> Path:
    return folder if folder is not None else Path("runs") / "clusters" / name


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@cluster_app.command()
def up(
    config: Annotated[str, typer.Argument(help="A shipped cluster file by name (local), or a path.")],
    folder: Folder = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value: engines=3.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Start the engines of a cluster file and return when each has completed a request. Ctrl-C ends them all."""
    from servegym.configuration import load_config
    from servegym.engine_bridge.cluster.config import ClusterFile
    from servegym.engine_bridge.cluster.launcher import start_cluster

    file = load_config(ClusterFile, config, "clusters", settings or [])
    with Bar(f"starting {file.name}, gives up after {file.ready_timeout_s:g} s", None, quiet=as_json) as bar:
        cluster = start_cluster(file, _folder(file.name, folder), bar.say)
    _show(cluster, as_json)


@cluster_app.command()
def status(
    name: Annotated[str, typer.Argument(help="The cluster's name.")], folder: Folder = None, as_json: Json = False
) -> None:
    """Show the engines of a cluster."""
    _show(_find(name, folder), as_json)


@cluster_app.command()
def down(name: Annotated[str, typer.Argument(help="The cluster's name.")], folder: Folder = None) -> None:
    """End the engines of a cluster, with all of their processes."""
    cluster = _find(name, folder)
    with Bar(f"ending {name}", None):
        cluster.stop()
    _say(f"cluster {name}: {len(cluster.engines)} engines ended")


@cluster_app.command()
def order(
    name: Annotated[str, typer.Argument(help="The cluster's name.")],
    policy: Annotated[str, typer.Argument(metavar="NAME[,KEY=VALUE]", help="A request policy by name, or a bundle.")],
    folder: Folder = None,
) -> None:
    """Let the running engines order their waiting queues by another request policy, or a policy bundle."""
    from servegym.baselines.policy_spec import PolicySpec

    with Bar("waiting until the engines follow", None):
        version = _find(name, folder).follow(PolicySpec.parse(policy))
    _say(f"cluster {name}: ordered by {policy}, version {version}")


@cluster_app.command()
def record(
    name: Annotated[str, typer.Argument(help="The cluster's name; its file needs experts: true.")],
    out: Annotated[Path, typer.Option(help="File to write, .npz.")],
    seconds: Annotated[float, typer.Option(min=0.1, help="How long.")] = 30.0,
    engine: Annotated[int, typer.Option(min=0, help="Which engine.")] = 0,
    folder: Folder = None,
) -> None:
    """Record which experts the tokens of an engine go to; the simulator reads it (experts.routing, source recorded)."""
    import time

    from servegym.engine_bridge.experts import LiveExperts
    from servegym.errors import InputError

    engines = _find(name, folder).engines
    if engine >= len(engines):
        raise InputError("--engine", str(engine), f"allowed: 0 to {len(engines) - 1}")
    if not out.parent.is_dir() or out.suffix != ".npz":
        raise InputError("--out", str(out), "allowed: a .npz file in a folder that exists")
    experts = LiveExperts(engines[engine].url)
    layers, count = experts.start(keep=True)
    _say(f"recording {layers} layers of {count} experts for {seconds:g} s; Ctrl-C ends it")
    begun = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt), Bar("recording", seconds, unit="s") as bar:
        while (passed := time.monotonic() - begun) < seconds:
            time.sleep(min(0.5, seconds - passed))
            bar.update(time.monotonic() - begun)
    _say(f"{experts.save_trace(out):,} tokens written to {out}")


def _find(name: str, folder: Path | None) -> LiveCluster:
    from servegym.engine_bridge.cluster.launcher import find_cluster
    from servegym.errors import InputError

    where = _folder(name, folder)
    cluster = find_cluster(where)
    if cluster is None:
        raise InputError(str(where), "", f"no cluster {name}; start one: servegym cluster up {name}")
    return cluster


def _show(cluster: LiveCluster, as_json: bool) -> None:
    from servegym.engine_bridge.cluster.launcher import describe_shim

    rows: list[dict[str, Any]] = []
    for engine in cluster.engines:
        order = describe_shim(engine.shim_state()) if engine.shim else "vLLM's own order"
        rows.append(
            {"url": engine.url, "running": engine.running, "pid": engine.pid, "order": order, "log": engine.log}
        )
    if as_json:
        print(json.dumps({"name": cluster.name, "model": cluster.model, "engines": rows}, indent=1))
        return
    table = Table("engine", "state", "waiting queue", "log", title=f"{cluster.name}, model {cluster.model}")
    for row in rows:
        table.add_row(row["url"], "running" if row["running"] else "down", row["order"], row["log"] or "")
    (Console() if sys.stdout.isatty() else Console(width=140)).print(table)
