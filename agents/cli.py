"""The command line. Exit codes: 0 done, 2 bad input (one line), 130 interrupted, 1 anything else."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from servegym.agents.cluster_cli import cluster_app
from servegym.agents.deploy_cli import deploy_app
from servegym.agents.finetune_cli import finetune_command
from servegym.agents.replay_cli import replay_command
from servegym.errors import EngineError, InputError

app = typer.Typer(
    name="servegym",
    help="Train, compare and deploy scheduling policies for serving Mixture-of-Experts models with vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# What comes with an extra.
_EXTRAS = dict.fromkeys(("torch", "stable_baselines3", "sb3_contrib", "tensorboard", "pyarrow", "cmaes"), "train")
_EXTRAS |= dict.fromkeys(("aiohttp", "grpc", "google", "prometheus_client"), "live") | {"matplotlib": "plot"}

# Click's class, which newer versions of Typer carry inside and older ones import.
_UsageError: Any = typer.BadParameter.__mro__[1]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; messages go to stderr.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config value: a.b=3.")]
PolicyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="LAYER=NAME[,KEY=VALUE]",
        help="request, engine or expert; a name of `servegym list`, module:Class, file.py:Class, or a bundle.",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Overrides the config's seed.")]


def main() -> None:
    """Entry point: turns errors that a person can mend into one line."""
    try:
        # Typer answers Ctrl-C with a code of its own, or with Abort in older versions.
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except InputError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(str(error.name).partition(".")[0])
        if extra is None:
            raise
        _fail(f"{error.name} is not installed; allowed: pip install 'servegym[{extra}]'")
    except EngineError as error:
        print(f"servegym: error: {error}", file=sys.stderr)
        sys.exit(1)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        _fail(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def _fail(message: str) -> None:
    print(f"servegym: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _console() -> Console:
    """Where tables go: as wide as the terminal, or wide enough for all columns where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=110)


def _print_json(content: Any) -> None:
    """Print one JSON object; numbers that do not exist become null."""
    print(json.dumps(_finite(content), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@app.command("list")
def list_command(
    name: Annotated[
        str | None, typer.Argument(help="Everything about one of them: gimbal2, EngineDispatch-v0, engine=random.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show policies, environments, workloads, profiles and configs, or all about one of them."""
    from servegym.agents.catalogue import catalogue, page, tables

    content = catalogue()
    if as_json:
        _print_json(content)
        return
    console = _console()
    if name is not None:
        console.print(page(content, name))
        return
    for table in tables(content):
        console.print(table)


@app.command()
def simulate(
    config: Annotated[str, typer.Argument(help="A simulate config: a YAML file, or the name of a shipped one.")],
    policy: PolicyOption = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER=NAME[,KEY=VALUE]", help="Run the same requests again under these policies."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the run over time, an image; needs timeline_s in the config.")
    ] = None,
    seed: Seed = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Simulate a cluster and print its metrics."""
    import servegym.engine_bridge.bundle  # noqa: F401 - makes bundles available by path
    from servegym.agents.plots import check_plot, plot_timelines
    from servegym.agents.tables import simulation_table
    from servegym.configuration import load_config
    from servegym.envs.simulation import SimulationConfig
    from servegym.envs.simulation import simulate as run

    policies = [policy] if not against else [policy, [*(policy or []), *against]]
    configs = [
        load_config(SimulationConfig, config, "simulate", [*(settings or []), *_policy_overrides(options, "policies")])
        for options in policies
    ]
    if plot is not None:
        check_plot(plot, configs[0])

    def simulated(loaded: SimulationConfig) -> Any:
        return _with_bar("simulating", as_json, lambda report: run(loaded, seed=seed, progress=report))

    results = [simulated(loaded) for loaded in configs]
    if plot is not None:
        plot_timelines(plot, results)
    if as_json:
        first, *others = (result.metrics() for result in results)
        _print_json(first | ({"against": others[0]} if others else {}))
        return
    for result in results:
        _console().print(simulation_table(result))


@app.command()
def train(
    config: Annotated[str | None, typer.Argument(help="A train config; not with --resume.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/NAME/TIME.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    seed: Seed = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Overrides the config's total_steps.")] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Train a policy; the run folder holds checkpoints, TensorBoard logs and the best policy as a bundle."""
    from servegym.agents.training.config import TrainConfig
    from servegym.configuration import load_config

    if (config is None) == (resume is None):
        raise InputError("servegym train", "", "allowed: a config, or --resume with a run folder")
    overrides = list(settings or [])
    overrides += [f"seed={seed}"] if seed is not None else []
    overrides += [f"total_steps={steps}"] if steps is not None else []
    if resume is not None and overrides:
        raise InputError("servegym train", "--resume", "a resumed run keeps its config; allowed: no overrides")
    loaded = load_config(TrainConfig, config, "train", overrides) if config is not None else None
    from servegym.agents.training.trainer import train as run

    result = run(loaded, out=out, resume=resume, progress=not as_json)
    if as_json:
        _print_json(
            {
                "folder": str(result.folder),
                "policy": str(result.policy),
                "steps": result.steps,
                "best_objective": result.best_objective,
                "evaluation": result.evaluation,
            }
        )
    else:
        print(f"trained {result.steps:,} steps; best policy: {result.policy}")


@app.command()
def evaluate(
    config: Annotated[str, typer.Argument(help="An evaluate config: a YAML file, or the name of a shipped one.")],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="LABEL=[LAYER=]NAME",
            help="Add a policy under a label: a bundle or run folder, a registered name, file.py:Class. Layer: engine.",
        ),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="A cluster that runs, by name: measure on its engines (rates_rps in the config).")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Worker processes; default: one per core.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep finished cells here; a rerun goes on from them.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Write all cells to this Parquet file.")] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Compare policies on the same requests over workloads, loads and seeds."""
    from servegym.agents.evaluation import EvaluationConfig
    from servegym.agents.evaluation import evaluate as run
    from servegym.configuration import load_config

    overrides = [*(settings or []), *_label_overrides(policy)]
    overrides += [f"live.cluster={json.dumps(cluster)}"] if cluster is not None else []
    loaded = load_config(EvaluationConfig, config, "evaluate", overrides)
    try:
        result = run(loaded, processes=processes, out=out, progress=not as_json)
    except KeyboardInterrupt:
        hint = "the results are lost" if out is None else f"the same command goes on with what {out} holds"
        print(f"interrupted; {hint}", file=sys.stderr)
        raise
    if parquet is not None:
        result.write_parquet(parquet)
    if as_json:
        _print_json(result.as_json())
        return
    console = _console()
    for table in result.tables():
        console.print(table)


@app.command("schedule-trace")
def schedule_trace(
    spec: Annotated[
        str, typer.Argument(help="A JSON file as the documentation of the simulator describes; - for stdin.")
    ],
) -> None:
    """Print what the simulated engine schedules at each step, one JSON object a line."""
    from servegym.configuration import validate
    from servegym.envs.simulator.schedule_trace import ScheduleSpec
    from servegym.envs.simulator.schedule_trace import schedule_trace as run

    try:
        content = json.loads(sys.stdin.read() if spec == "-" else Path(spec).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(spec, "", f"cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{spec}:{error.lineno}:{error.colno}", "", f"not valid JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise InputError(spec, "", f"got a {type(content).__name__}; allowed: an object")
    for line in run(validate(ScheduleSpec, content, spec), spec):
        print(json.dumps(line))


def _policy_overrides(options: list[str] | None, prefix: str) -> list[str]:
    """Turn ``--policy engine=lmetric,x=1`` into overrides of a config."""
    from servegym.baselines.registry import parse_policy_option

    found = []
    for option in options or []:
        layer, spec = parse_policy_option(option)
        found.append(f"{prefix}.{layer}={spec.model_dump_json()}")
    return found


def _label_overrides(options: list[str] | None) -> list[str]:
    """Turn ``--policy learned=runs/x``, or ``learned=request=runs/x``, into an entry of an evaluation's policies."""
    from servegym.baselines.policy_spec import LAYERS, PolicySpec

    found = []
    for option in options or []:
        label, equals, text = option.partition("=")
        if not equals or not label.strip() or "." in label:
            raise InputError("--policy", option, "allowed: LABEL=NAME, such as learned=runs/dispatch_ppo/latest")
        layer, equals, name = text.partition("=")
        if not equals or layer not in LAYERS:
            layer, name = "engine", text
        found.append(f'policies.{label.strip()}={{"{layer}": {PolicySpec.parse(name).model_dump_json()}}}')
    return found


def _with_bar(title: str, quiet: bool, run: Callable[[Callable[[float], None] | None], Any]) -> Any:
    """Run something that reports its progress as a share, with a bar where a person looks on."""
    if quiet or not sys.stderr.isatty():
        return run(None)
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        return run(lambda share: bar.update(task, completed=share))


app.command("replay")(replay_command)
app.command("finetune")(finetune_command)
app.add_typer(cluster_app, name="cluster")
app.add_typer(deploy_app, name="deploy")
