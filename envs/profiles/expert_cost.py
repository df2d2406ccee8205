"""The cost of one more activated expert, from MoE kernel tables: ``python -m … .expert_cost --tables FOLDER``.

A batch that gives an expert a single token reads all of that expert's weights, so that the kernel's latency grows with
the number of activated experts ``A`` at next to no compute. Over the rows of the ``balanced`` table in which each
expert gets at most one token, ``us = c0 + expert_us * A`` is fitted; what a larger batch costs beyond it is compute::

    us(T) = c0 + expert_us * A(T) + compute(T)

Two forms of it are compared on LLMServingSim's table of an RTX PRO 6000, which varies tokens and activated experts
apart: the sum ``c0 + w * A + c * tokens`` and the roofline ``c0 + max(w * A, c * tokens)``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from servegym.envs.profiles.fitting import FitQuality, FloatArray, fit_relative, significant
from servegym.envs.profiles.hardware import BYTES, PRECISIONS, ModelShape, Precision
from servegym.envs.profiles.profile import ExpertShape
from servegym.envs.profiles.tables import KernelTables, read_parquet
from servegym.errors import InputError

ACTIVATION_TABLE = "llmservingsim_profile_rtxpro6000_qwen3-30b-a3b_tp1_moe.parquet"

LARGEST_MESSAGE = 1 << 27
"""Bytes: all tokens of four full steps of 8,192 tokens; larger messages do not occur."""


@dataclass(frozen=True, slots=True)
class ExpertFit:
    """``us = fixed + expert * A`` of one MoE layer on one rank, and how well it holds.

    Attributes:
        fixed_us: cost of a layer without an activated expert.
        expert_us: cost of each activated expert.
        quality: relative errors over the rows in which every expert has at most one token.
        compute_us: (tokens over all ranks, what larger batches cost beyond it), made monotone.
        decomposition: relative errors of all three terms over all rows.
    """

    fixed_us: float
    expert_us: float
    quality: FitQuality
    compute_us: tuple[FloatArray, FloatArray]
    decomposition: FitQuality


def fit_experts(
    model: ModelShape, tables: KernelTables, ranks: int, dtype: str = "bfloat16", tensor: int = 1
) -> ExpertFit:
    """Fit the cost of an activated expert to the ``balanced`` rows, which deal tokens to experts in turn.

    Raises:
        InputError: the tables are missing or hold no rows of this shape.
    """
    tokens, us = tables.moe(model, ranks, "balanced", dtype, tensor)
    active = np.minimum(model.experts, model.top_k * tokens) / ranks
    single = model.top_k * tokens <= model.experts
    terms = np.stack([np.ones(len(us)), active], axis=1)
    fixed, expert = fit_relative(terms[single], us[single]).tolist()
    linear = fixed + expert * active
    compute = np.maximum.accumulate(np.where(single, 0.0, np.maximum(us - linear, 0.0)))
    return ExpertFit(
        fixed,
        expert,
        FitQuality.of(linear[single], us[single]),
        (tokens, compute),
        FitQuality.of(linear + compute, us),
    )


def fit_link(tables: KernelTables, ranks: int) -> tuple[float, float]:
    """Return bandwidth (GB/s) and latency (us) of one all-to-all of a rank, from the measured all-reduce.

    An all-reduce of ``M`` bytes is a reduce-scatter and an all-gather, each of which moves ``(ranks - 1) / ranks * M``
    out of a rank: one all-to-all is half of it. ``us = 2 * latency + moved / bandwidth`` is fitted.
    """
    message, us = tables.all_reduce(ranks)
    within = message <= LARGEST_MESSAGE
    moved = 2 * (ranks - 1) / ranks * message[within]
    fixed, per_byte = fit_relative(np.stack([np.ones(len(moved)), moved], axis=1), us[within]).tolist()
    return 1e-3 / per_byte, fixed / 2


def expert_shape(
    model: ModelShape, tables: KernelTables, ranks: int, precision: Precision = PRECISIONS["bf16"], tensor: int = 1
) -> ExpertShape:
    """Return the section ``experts`` of a profile; a single GPU gets the links between two of its kind."""
    bandwidth, latency = fit_link(tables, max(ranks, 2))
    return ExpertShape(
        layers=model.layers,
        experts=model.experts,
        top_k=model.top_k,
        ranks=ranks,
        expert_bytes=int(precision.moe_bytes * 3 * model.hidden * model.moe_intermediate / tensor),
        token_bytes=BYTES * model.hidden,
        expert_us=significant(fit_experts(model, tables, ranks, precision.moe, tensor).expert_us),
        link_gb_s=significant(bandwidth),
        link_latency_us=significant(latency),
    )


def read_activations(path: Path) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return tokens, activated experts and us of one MoE layer from a table that varies both."""
    columns = read_parquet(path, ("tokens", "activated_experts", "time_us"), {})
    return columns["tokens"], columns["activated_experts"], columns["time_us"]


def fit_roofline(tokens: FloatArray, active: FloatArray, us: FloatArray) -> tuple[float, float, float]:
    """Fit ``fixed + max(expert * A, token * T)``: weights are read while the products are computed.

    It is linear once it is known which rows are bound by compute: alternate until that settles.
    """
    ones = np.ones(len(us))
    fixed, expert, token = fit_relative(np.stack([ones, active, tokens], axis=1), us).tolist()
    for _ in range(50):
        bound = token * tokens > expert * active
        split = np.stack([ones, np.where(bound, 0, active), np.where(bound, tokens, 0)], axis=1)
        fixed, expert, token = fit_relative(split, us).tolist()
    return fixed, expert, token


def compare_forms(path: Path) -> dict[str, FitQuality]:
    """Fit both forms to a table of tokens, activated experts and time; returns their relative errors.

    Raises:
        InputError: the file is missing or not such a table.
    """
    tokens, active, us = read_activations(path)
    terms = np.stack([np.ones(len(us)), active, tokens], axis=1)
    found = {"sum": FitQuality.of(terms @ fit_relative(terms, us), us)}
    fixed, weight, compute = fit_roofline(tokens, active, us)
    found["roofline"] = FitQuality.of(fixed + np.maximum(weight * active, compute * tokens), us)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; returns the exit code: 0, or 2 on bad input with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m servegym.envs.profiles.expert_cost", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--tables", type=Path, required=True, help=f"folder of {ACTIVATION_TABLE}")
    options = parser.parse_args(arguments)
    try:
        found = compare_forms(options.tables / ACTIVATION_TABLE)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    for name, quality in found.items():
        print(f"{name:<9} {quality}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
