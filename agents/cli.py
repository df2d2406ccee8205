"""The command line. Exit codes: 0 done, 2 bad input (one line), 130 interrupted, 1 anything else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import servegym
from servegym.agents.backend_options import Address, Backend, Workers, backend_overrides
from servegym.agents.calibrate_cli import calibrate_command
from servegym.agents.cluster_cli import cluster_app
from servegym.agents.deploy_cli import deploy_app
from servegym.agents.finetune_cli import finetune_command
from servegym.agents.init_cli import init_command
from servegym.agents.profile_cli import profile_app
from servegym.agents.progress import Bar
from servegym.agents.replay_cli import replay_command
from servegym.agents.runs import finite
from servegym.agents.schedule_trace_cli import schedule_trace_command
from servegym.agents.tune_cli import tune_command
from servegym.agents.validate_cli import validate_command
from servegym.agents.versions import command_line
from servegym.baselines.user_code import blame
from servegym.errors import EngineError, InputError, WorkerError

app = typer.Typer(
    name="servegym",
    help="Train, compare and deploy scheduling policies for serving Mixture-of-Experts models with vLLM.",
    epilog="First steps: servegym simulate quickstart, servegym init evaluate mine.yaml, and docs/tutorial.md.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

# The table of contents of `servegym --help`, in the order in which commands are registered.
LOOK, COMPARE, LEARN = "Look around", "Simulate and compare", "Learn"
LIVE, INSIDE = "Live engines", "What the simulator rests on"

# What comes with an extra.
_EXTRAS = dict.fromkeys(
    ("torch", "stable_baselines3", "sb3_contrib", "tensorboard", "pyarrow", "cmaes", "optuna"), "train"
)
_EXTRAS |= dict.fromkeys(("aiohttp", "grpc", "google", "prometheus_client"), "live")
_EXTRAS |= dict.fromkeys(("matplotlib", "plotly", "jinja2"), "plot") | {"ray": "ray", "submitit": "slurm"}

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
    except (EngineError, WorkerError) as error:
        print(f"servegym: error: {error}", file=sys.stderr)
        sys.exit(1)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        _fail(_with_next_step(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        line = blame(error)
        if line is None:
            raise
        _fail(line)


def _fail(message: str) -> None:
    print(f"servegym: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _with_next_step(error: Any) -> str:
    """A message of the parser's, and the command that explains more."""
    message, context = error.format_message().rstrip("."), error.ctx
    if context is None:
        return str(message)
    path = " ".join(["servegym", *context.command_path.split()[1:]])
    return f"{message}; see: {path} --help"


def _console() -> Console:
    """Where tables go: as wide as the terminal, or wide enough for all columns where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=110)


def _print_json(content: Any) -> None:
    """Print one JSON object; numbers that do not exist become null."""
    print(json.dumps(finite(content), indent=2))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"servegym {servegym.__version__}")
        raise typer.Exit


@app.callback()
def servegym_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, compare and deploy scheduling policies for serving Mixture-of-Experts models with vLLM."""


@app.command("list", rich_help_panel=LOOK)
def list_command(
    name: Annotated[
        str | None, typer.Argument(help="Everything about one of them: gimbal2, EngineDispatch-v0, engine=random.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show policies, bundles, environments, workloads, profiles and configs, or all about one of them."""
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


app.command("init", rich_help_panel=LOOK)(init_command)


@app.command(rich_help_panel=COMPARE)
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
    from servegym.agents.plots import check_plot, plot_timelines
    from servegym.agents.policy_options import layer_overrides
    from servegym.agents.tables import simulation_table
    from servegym.configuration import load_config
    from servegym.envs.simulation import SimulationConfig
    from servegym.envs.simulation import simulate as run

    overrides = [*(settings or []), *layer_overrides(policy)]
    variants = [overrides, [*overrides, *layer_overrides(against, "--against")]] if against else [overrides]
    configs = [load_config(SimulationConfig, config, "simulate", variant) for variant in variants]
    if plot is not None:
        check_plot(plot, configs[0])

    def simulated(loaded: SimulationConfig) -> Any:
        with Bar("simulating", quiet=as_json) as bar:
            return run(loaded, seed=seed, progress=bar.update if bar.shown else None)

    results = [simulated(loaded) for loaded in configs]
    if plot is not None:
        plot_timelines(plot, results)
    if as_json:
        first, *others = (result.metrics() for result in results)
        _print_json(first | ({"against": others[0]} if others else {}))
        return
    for result in results:
        _console().print(simulation_table(result))


@app.command(rich_help_panel=LEARN)
def train(
    config: Annotated[str | None, typer.Argument(help="A train config; not with --resume.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/NAME/TIME.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    seed: Seed = None,
    seeds: Annotated[
        str | None, typer.Option(help="One run per seed, 0-3 or 0,2,5, into OUT/seed-N; a rerun goes on.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Overrides the config's total_steps.")] = None,
    workers: Workers = None,
    backend: Backend = None,
    address: Address = None,
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
    overrides += backend_overrides(backend, address, workers)
    if seeds is not None and (seed is not None or resume is not None):
        raise InputError("servegym train", "--seeds", "allowed: without --seed and --resume; a rerun goes on by itself")
    if resume is not None and overrides:
        raise InputError("servegym train", "--resume", "a resumed run keeps its config; allowed: no overrides")
    loaded = load_config(TrainConfig, config, "train", overrides) if config is not None else None
    if loaded is not None and (seeds is not None or loaded.backend.name != "local"):
        from servegym.agents.seeds_cli import train_seeds_command

        content = train_seeds_command(loaded, seeds, out, quiet=as_json)
        if as_json:
            _print_json(content)
        return
    from servegym.agents.training.trainer import train as run

    result = run(loaded, out=out, resume=resume, progress=not as_json)
    if as_json:
        _print_json(result.plain())
    else:
        print(f"trained {result.steps:,} steps; best policy: {result.policy}")


@app.command(rich_help_panel=COMPARE)
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
    policies: Annotated[
        Path | None, typer.Option(help="Add the policies of this YAML file by label, such as best.yaml of `tune`.")
    ] = None,
    workers: Workers = None,
    backend: Backend = None,
    address: Address = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep finished cells and your policies' files here; a rerun goes on.")
    ] = None,
    parquet: Annotated[Path | None, typer.Option(help="Write all cells to this Parquet file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the report as one HTML page; `servegym report` has its options.")
    ] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Compare policies on the same requests over workloads, loads and seeds."""
    from servegym.agents.evaluation import EvaluationConfig
    from servegym.agents.evaluation import evaluate as run
    from servegym.agents.evaluation.folder import origin
    from servegym.agents.policy_options import file_overrides, label_overrides
    from servegym.agents.report.write import check_page, write_report
    from servegym.configuration import load_config

    overrides = [*(settings or []), *file_overrides(policies), *label_overrides(policy)]
    overrides += [f"live.cluster={json.dumps(cluster)}"] if cluster is not None else []
    overrides += backend_overrides(backend, address, workers)
    loaded = load_config(EvaluationConfig, config, "evaluate", overrides)
    if html is not None:
        check_page(html)
    try:
        result = run(loaded, out=out, progress=not as_json, command=command_line())
    except KeyboardInterrupt:
        hint = "the results are lost" if out is None else f"the same command goes on with what {out} holds"
        print(f"interrupted; {hint}", file=sys.stderr)
        raise
    if parquet is not None:
        result.write_parquet(parquet)
    if html is not None:
        with Bar("recording one cell", quiet=as_json) as bar:
            write_report(html, result, origin(command_line()), progress=bar.update)
    if as_json:
        _print_json(result.as_json())
        return
    console = _console()
    for table in result.tables():
        console.print(table)


@app.command(rich_help_panel=COMPARE)
def report(
    run: Annotated[Path, typer.Argument(help="The folder that `servegym evaluate ... --out FOLDER` has filled.")],
    html: Annotated[Path, typer.Option(help="Write the page to this file.")],
    workload: Annotated[
        str | None, typer.Option(help="Look into a cell of this workload; default: the cell nearest to the whole.")
    ] = None,
    level: Annotated[float | None, typer.Option("--load", help="Load, or rate, of that cell.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of that cell.")] = None,
    policies: Annotated[
        str | None, typer.Option(metavar="LABEL,LABEL", help="Draw these policies; default: those that matter most.")
    ] = None,
) -> None:
    """Write the report of a finished evaluation as one HTML page."""
    from servegym.agents.evaluation.folder import load_evaluation
    from servegym.agents.report.selection import Wish
    from servegym.agents.report.write import check_page, write_report

    check_page(html)
    result, made = load_evaluation(run)
    chosen = tuple(label.strip() for label in policies.split(",")) if policies is not None else None
    wish = Wish(workload, level, seed, chosen)
    with Bar("recording one cell") as bar:
        write_report(html, result, made, wish=wish, progress=bar.update)
    print(f"report: {html}")


app.command("tune", rich_help_panel=COMPARE)(tune_command)
app.command("finetune", rich_help_panel=LEARN)(finetune_command)
app.command("replay", rich_help_panel=LIVE)(replay_command)
app.command("calibrate", rich_help_panel=LIVE)(calibrate_command)
app.command("validate", rich_help_panel=LIVE)(validate_command)
app.add_typer(cluster_app, name="cluster", rich_help_panel=LIVE)
app.add_typer(deploy_app, name="deploy", rich_help_panel=LIVE)
app.command("schedule-trace", rich_help_panel=INSIDE)(schedule_trace_command)
app.add_typer(profile_app, name="profile", rich_help_panel=INSIDE)
