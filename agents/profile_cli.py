"""``servegym profile``: profiles from public kernel tables, and their check against published measurements."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from servegym.agents.progress import Bar

if TYPE_CHECKING:
    from servegym.envs.profiles.hardware import ModelShape
    from servegym.envs.profiles.silicon import Check, Compared

HELP = """Profiles of engines from public kernel tables, checked against published measurements.

From kernel tables to a profile:

1. Put the tables into a folder, under these names: aic_h200_vllm0.24_{gemm,moe,context_attention,generation_attention,
custom_allreduce}_perf.parquet, from aic-core/src/aiconfigurator_core/systems/data/h200_sxm of
github.com/ai-dynamo/aiconfigurator at 095f58a5.

2. `profile build --tables FOLDER --model qwen3-235b-a22b --tp 4 --dp 2 --precision fp8_block --out my.yaml` sums the
kernels over the layers and adds what an engine adds. A model that is not known by name is given by --shape. The file
says what is measured, what is modelled, and how well it repeats the tables.

3. `profile check --tables FOLDER` shows how well such profiles predict published TTFT and TPOT; it needs
aic_silicon_ttft_tpot.parquet (systems/silicon_sample.csv there, as Parquet) and aic_h200_vllm0.19_moe_perf.parquet in
the same folder.

4. Name the file where a config has `profile:`. `servegym calibrate` measures an engine of your own instead.
"""

profile_app = typer.Typer(
    name="profile",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
)

Tables = Annotated[Path, typer.Option("--tables", help="Folder of aiconfigurator's tables: aic_*.parquet.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; messages go to stderr.")]

SHAPE = ("layers", "hidden", "heads", "kv_heads", "head_dim", "experts", "top_k", "moe_intermediate", "vocabulary")


@profile_app.command("build")
def build_command(
    tables: Tables,
    out: Annotated[Path | None, typer.Option(help="YAML file to write; default: stdout.")] = None,
    model: Annotated[str, typer.Option(help="A model by name, or any name with --shape.")] = "qwen3-30b-a3b",
    shape: Annotated[
        str | None,
        typer.Option(metavar="KEY=VALUE,...", help=f"Another MoE model: {', '.join(SHAPE)}, as in its config.json."),
    ] = None,
    gpu: Annotated[str, typer.Option(help="h200 is measured; h100 and a100 are scaled from it.")] = "h200",
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel GPUs of an engine.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Data-parallel engines that share the experts.")] = 1,
    ep: Annotated[
        int | None, typer.Option(min=1, help="Expert-parallel ranks: 1 or tp * dp; default: tp * dp.")
    ] = None,
    precision: Annotated[str, typer.Option(help="bf16, fp8, fp8_block, int4 or mxfp4, where tables have it.")] = "bf16",
    as_json: Json = False,
) -> None:
    """Compose the latencies of single kernels into the step times of a served model, and write them as a profile.

    Says how well the profile repeats the tables, and which shapes the tables lack and how they were inferred.
    """
    from servegym.envs.profiles.document import render, write
    from servegym.envs.profiles.hardware import GPUS
    from servegym.envs.profiles.kernel_tables import build_profile, header
    from servegym.envs.profiles.serving import Serving
    from servegym.errors import InputError, nearest

    if gpu not in GPUS:
        raise InputError("--gpu", "", f"got {gpu!r}; {nearest(gpu, GPUS)}")
    ranks = tp * dp if ep is None else ep
    if ranks not in (1, tp * dp) or (ranks == 1 and dp > 1):
        allowed = " or ".join(str(count) for count in sorted({1, tp * dp} if dp == 1 else {tp * dp}))
        raise InputError("--ep", "", f"got {ep}; allowed with --tp {tp} --dp {dp}: {allowed}")
    if as_json and out is None:
        raise InputError("--json", "", "got no --out; allowed: with a file to write the profile to")
    target = model if shape is None else _shape(model, shape)
    profile, report = build_profile(
        target, tables, ranks, GPUS[gpu], tp, precision=precision, moe_tensor=1 if ranks > 1 else tp, serving=Serving()
    )
    command = f"servegym profile build --tables FOLDER --model {model} --gpu {gpu} --tp {tp} --dp {dp} --ep {ranks}"
    command += f" --precision {precision}" + (f" --shape {shape}" if shape else "")
    write(render(profile, header(profile, report, command, GPUS[gpu])), out)
    if as_json:
        fits = {name: asdict(quality) for name, quality in report.fits.items()}
        print(json.dumps({"profile": profile.name, "out": str(out), "fits": fits, "inferred": report.notes}, indent=2))
    else:
        print(*report.lines(), sep="\n", file=sys.stderr)


def _shape(name: str, text: str) -> ModelShape:
    """Parse ``layers=48,hidden=2048,...``; ``max_position_embeddings`` may be given too.

    Raises:
        InputError: a key that is unknown or missing, or a value that is no positive integer.
    """
    from servegym.envs.profiles.hardware import ModelShape
    from servegym.errors import InputError, nearest

    values: dict[str, Any] = {"max_position_embeddings": 32768}
    for item in text.split(","):
        key, _, value = item.partition("=")
        if key not in (*SHAPE, "max_position_embeddings"):
            raise InputError("--shape", key, f"unknown key; {nearest(key, SHAPE)}")
        if not value.isdecimal() or int(value) < 1:
            raise InputError("--shape", key, f"got {value!r}; allowed: an integer of at least 1")
        values[key] = int(value)
    missing = [key for key in SHAPE if key not in values]
    if missing:
        raise InputError("--shape", "", f"missing: {', '.join(missing)}")
    return ModelShape(model=name, **values)


@profile_app.command("check")
def check_command(
    tables: Tables,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst cases to list for each model.")] = 5,
    as_json: Json = False,
) -> None:
    """Compare profiles from the tables with measured TTFT and TPOT, by model and by batch size.

    Covers the rows of vLLM on H200 whose kernels are in the tables. One number is fitted to them, the host's time to
    launch an MoE layer: to one half of the batch sizes for the other, and the other way round. Beside it stands the
    error without it. Takes about half a minute.
    """
    from servegym.envs.profiles.silicon import check

    with Bar("serving the published cases in simulated closed loops", quiet=as_json) as bar:
        outcome = check(tables, bar.update)
    if as_json:
        print(json.dumps(_report(outcome, worst), indent=2))
        return
    console = Console() if sys.stdout.isatty() else Console(width=110)
    for table in _tables(outcome, worst):
        console.print(table)
    for reason, rows in outcome.left_out.items():
        console.print(f"not covered: {rows} rows, {reason}", highlight=False)


def _groups(items: list[Compared]) -> dict[str, list[Compared]]:
    """Cases by model, and by batch size within each."""
    groups: dict[str, list[Compared]] = {}
    for item in sorted(items, key=lambda item: (item.case.model, item.case.concurrency)):
        model = item.case.model.rsplit("/", 1)[-1]
        for name in (model, f"{model} batch {item.case.concurrency}"):
            groups.setdefault(name, []).append(item)
    return groups


def _errors(items: list[Compared]) -> dict[str, float]:
    """Median absolute and median signed relative errors."""
    import numpy as np

    ttft, tpot = (np.array([getattr(item, name) for item in items]) for name in ("ttft_error", "tpot_error"))
    return {
        "cases": len(items),
        "ttft_median_absolute": float(np.median(np.abs(ttft))),
        "ttft_bias": float(np.median(ttft)),
        "tpot_median_absolute": float(np.median(np.abs(tpot))),
        "tpot_bias": float(np.median(tpot)),
    }


def _worst(items: list[Compared], count: int) -> list[Compared]:
    """Return the worst cases of each model, by the larger of the two errors."""
    found = []
    for model in dict.fromkeys(item.case.model for item in items):
        cases = [item for item in items if item.case.model == model]
        found += sorted(cases, key=lambda item: -max(abs(item.ttft_error), abs(item.tpot_error)))[:count]
    return found


def _report(outcome: Check, worst: int) -> dict[str, Any]:
    from servegym.envs.profiles.silicon import reason

    return {
        "fitted_to_other_batch_sizes": {name: _errors(items) for name, items in _groups(outcome.crossed).items()},
        "without_launches": {name: _errors(items) for name, items in _groups(outcome.unfitted).items()},
        "launch_us": {",".join(map(str, sizes)): value for sizes, value in outcome.launch_us.items()},
        "worst": [
            {"case": item.case.label, "ttft_error": item.ttft_error, "tpot_error": item.tpot_error}
            | {"reason": reason(item)}
            for item in _worst(outcome.crossed, worst)
        ],
        "not_covered": outcome.left_out,
    }


def _tables(outcome: Check, worst: int) -> list[Table]:
    from servegym.envs.profiles.silicon import reason

    columns = ("cases", "TTFT", "bias", "TPOT", "bias")
    summary = Table("median absolute error, %", *columns, "TTFT unfitted", "TPOT unfitted")
    unfitted = _groups(outcome.unfitted)
    for name, items in _groups(outcome.crossed).items():
        crossed, other = _errors(items), _errors(unfitted[name])
        keys = ("ttft_median_absolute", "ttft_bias", "tpot_median_absolute", "tpot_bias")
        cells = [f"{100 * crossed[key]:.1f}" for key in keys]
        cells += [f"{100 * other[key]:.1f}" for key in (keys[0], keys[2])]
        summary.add_row(name, str(len(items)), *cells)
    fitted = "; ".join(f"{value:g} us for {', '.join(map(str, sizes))}" for sizes, value in outcome.launch_us.items())
    summary.caption = f"launches of an MoE layer, fitted to the other batch sizes: {fitted}; unfitted: none"
    listed = Table("worst cases", "TTFT %", "TPOT %", "reason, as far as known")
    for item in _worst(outcome.crossed, worst):
        listed.add_row(item.case.label, f"{100 * item.ttft_error:+.0f}", f"{100 * item.tpot_error:+.0f}", reason(item))
    return [summary, listed]
