"""Published TTFT and TPOT of vLLM on H200, and how each model was served: rows of aiconfigurator's ``silicon_sample``.

MiniMax-M2.5 and Llama-3.1-70B come from InferenceX (formerly InferenceMAX), whose scripts say how
(github.com/SemiAnalysisAI/InferenceX: ``benchmarks/single_node/minimaxm2.5_fp8_h200.sh`` as of March 2026,
``benchmarks/70b_fp8_h200_slurm.sh``, ``bench_serving/benchmark_serving.py``): ten requests for each one in flight, as
many at once as the concurrency allows, the next one sent when one ends; lengths uniform from 0.8 of the nominal ones;
means over all requests. Llama-3.1-70B had an FP8 cache, 0.9 of the memory and ``--async-scheduling``; MiniMax-M2.5 0.95
of the memory and defaults, which schedule asynchronously as well, and expert parallelism on eight GPUs.

Of Llama-3.1-8B only the name of a private file is given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from servegym.envs.profiles.hardware import H200, MODELS, Gpu, ModelShape
from servegym.envs.profiles.serving import Serving
from servegym.envs.profiles.tables import read_rows
from servegym.errors import InputError

SILICON_TABLE = "aic_silicon_ttft_tpot.parquet"

LLAMA_70B = ModelShape("meta-llama/Llama-3.1-70B", 80, 8192, 64, 8, 128, 0, 1, 1, 128256, 131072, 28672)
LLAMA_8B = ModelShape("nvidia/Llama-3.1-8B-Instruct-FP8", 32, 4096, 32, 8, 128, 0, 1, 1, 128256, 131072, 14336)


@dataclass(frozen=True, slots=True)
class Run:
    """How a model was served.

    Attributes:
        shape: a key of ``MODELS``, or a shape.
        precision: a key of ``PRECISIONS``.
        serving: what the engine added, but for the launches.
        gpu: with the share of memory that the engine took.
        described: whether the client and the engine's settings are known.
    """

    shape: str | ModelShape
    precision: str
    serving: Serving
    gpu: Gpu = H200
    described: bool = True

    @property
    def model(self) -> ModelShape:
        """The shape itself."""
        return MODELS[self.shape] if isinstance(self.shape, str) else self.shape


RUNS = {
    "MiniMaxAI/MiniMax-M2.5": Run(
        "minimax-m2.5",
        "fp8_block",
        # vLLM 0.16 and 0.18: of the tables of 0.19 and 0.24 the older ones. The skew is the one that aiconfigurator
        # takes for its own predictions.
        Serving(moe_tables="aic_h200_vllm0.19", skew="power_law_1.01"),
        replace(H200, utilization=0.95),
    ),
    LLAMA_70B.model: Run(LLAMA_70B, "fp8", Serving(kv="fp8"), replace(H200, utilization=0.9)),
    LLAMA_8B.model: Run(LLAMA_8B, "fp8", Serving(), described=False),
}
"""By ``model_path``. The dense models test everything but the experts."""


@dataclass(frozen=True, slots=True)
class Case:
    """One measured setting; where it was published more than once, the median.

    Attributes:
        model, isl, osl, concurrency, tensor: the setting.
        ttft_ms, tpot_ms: what was measured.
        version: of vLLM; empty: not given.
        spread: how much the published values of the TTFT differ, the largest over the smallest, less 1.
    """

    model: str
    isl: int
    osl: int
    concurrency: int
    tensor: int
    ttft_ms: float
    tpot_ms: float
    version: str = ""
    spread: float = 0.0

    @property
    def label(self) -> str:
        """The setting in short."""
        return f"{self.model.rsplit('/', 1)[-1]} tp{self.tensor} {self.isl}/{self.osl} c{self.concurrency}"


def read_cases(folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return the covered cases, and how many rows are not covered, by reason.

    Raises:
        InputError: the file is missing or not such a table.
    """
    columns = ("backend", "backend_version", "system", "mode", "model_path", "isl", "osl", "batch_size", "tp_size")
    rows = read_rows(folder / SILICON_TABLE, (*columns, "silicon_ttft_ms", "silicon_tpot_ms"))
    found: dict[tuple[str, int, int, int, int], list[dict[str, Any]]] = {}
    left_out: dict[str, int] = {}
    for row in rows:
        reason = _not_covered(row)
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        isl, osl, concurrency, tensor = (int(row[name]) for name in ("isl", "osl", "batch_size", "tp_size"))
        key = (row["model_path"], isl, osl, concurrency, tensor)
        found.setdefault(key, []).append(row)
    if not found:
        raise InputError(str(folder / SILICON_TABLE), "", f"no rows of {', '.join(RUNS)} on vLLM and H200")
    return [_case(key, same) for key, same in sorted(found.items())], left_out


def _case(key: tuple[str, int, int, int, int], rows: list[dict[str, Any]]) -> Case:
    ttft, tpot = (np.array([row[name] for row in rows]) for name in ("silicon_ttft_ms", "silicon_tpot_ms"))
    return Case(
        *key,
        ttft_ms=float(np.median(ttft)),
        tpot_ms=float(np.median(tpot)),
        version=str(rows[0]["backend_version"] or ""),
        spread=float(ttft.max() / ttft.min() - 1),
    )


def _not_covered(row: dict[str, Any]) -> str | None:
    if row["backend"] != "vllm":
        return f"{row['backend']}: no kernel tables of it"
    if row["mode"] != "agg":
        return "prefill and decode on separate engines"
    if row["system"] != "h200_sxm":
        return f"{row['system']}: no kernel tables of it"
    if row["model_path"] not in RUNS:
        return f"{row['model_path']}: attention (latent) is not in the tables"
    return None
