"""Build a profile from public kernel tables: ``python -m servegym.envs.profiles.kernel_tables --help``.

The measured latencies of single kernels are summed over the layers of a model (:mod:`.kernel_costs` says which are
measured and which modelled) and fitted to the terms of :class:`~servegym.envs.profiles.profile.StepTime`:

======================  ===============================================================================================
``dense_us(T)``         projections + element-wise kernels + attention's cost per query token
``moe_us(T)``           fused MoE layers with equally likely experts; ``T`` counts the tokens of all ranks
``communication_us(T)`` all-gather and reduce-scatter of the hidden states, with expert parallelism only
``prefill_pair_us``     attention per query-key pair
``decode_context_us``   attention per context token of a decoding sequence
``per_sequence_us``     attention, lm_head and sampling per sequence
``fixed_us``            attention and lm_head of an empty batch, and the host's share of a step
======================  ===============================================================================================

Attention of a layer is fitted as ``floor + a * sequences + b * tokens + c * pairs + d * context`` to the prefill and
the decode table together, since one kernel serves a mixed batch. The tables prefill from an empty context only: that a
chunk behind ``p`` tokens costs ``c`` per query-key pair as well is an extrapolation.

From tables to a profile: ``servegym profile --help`` tells the files and the steps. ``servegym profile build`` adds
what a serving engine adds to the kernels (:mod:`.serving`), and ``servegym profile check`` compares such profiles with
published measurements. The shipped profiles are made by this script, of the kernels alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from servegym.envs.profiles.document import render, write
from servegym.envs.profiles.expert_cost import expert_shape, fit_experts
from servegym.envs.profiles.fitting import FitQuality, FloatArray, fit_relative, significant, token_curve
from servegym.envs.profiles.hardware import GPUS, H200, MODELS, PRECISIONS, Gpu, ModelShape
from servegym.envs.profiles.kernel_costs import HOST_US, KernelCosts
from servegym.envs.profiles.limits import MAX_NUM_SEQS, engine_limits
from servegym.envs.profiles.profile import Profile, StepTime, TokenCurve
from servegym.envs.profiles.scaled_tables import ScaledTables
from servegym.envs.profiles.serving import REAL_DATA, Serving
from servegym.envs.profiles.tables import GRAPH_TOKENS, AttentionRows, KernelTables
from servegym.errors import InputError, nearest

DENSE_KNOTS: tuple[int, ...] = (1, 16, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
MOE_KNOTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
COMMUNICATION_KNOTS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16384)

SMALL_BATCH = 256

LARGEST_PREFILL = 16384

SOURCE = (
    "Measured: per-kernel latencies of vLLM 0.24 on NVIDIA H200, from ai-dynamo/aiconfigurator @ 095f58a5 "
    "(Apache-2.0): QKV, output and router projection, fused MoE (Triton, bfloat16), FlashAttention 3 in prefill and "
    "decode, all-reduce. Modelled: norms, rotary embedding, top-k and sampling by memory bandwidth; lm_head scaled "
    "from the widest product in the tables; number of activated experts under random routing; dispatch and combine of "
    "expert parallelism as one all-reduce; host's share of a step; KV blocks."
)


@dataclass(frozen=True, slots=True)
class Report:
    """How well a profile repeats the tables that it was built from.

    Attributes:
        fits: relative errors by term, and of whole decode and prefill steps against the plain sum of the tables.
        skew: MoE cost under each power-law distribution of the tables over the profile's balanced cost: medians over
            batches of up to ``SMALL_BATCH`` tokens and over larger ones, and the highest ratio.
        notes: shapes that the tables do not hold, and how their cost was inferred.
    """

    fits: dict[str, FitQuality]
    skew: dict[str, tuple[float, float, float]]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the report as aligned lines, each starting with two spaces."""
        rows = [f"  {name:<14} {quality}" for name, quality in self.fits.items()]
        for name, (small, large, highest) in self.skew.items():
            rows.append(
                f"  {name:<14} MoE cost over balanced: median {small:.2f} up to {SMALL_BATCH} tokens, "
                f"{large:.2f} above, highest {highest:.2f}"
            )
        return rows + [f"  inferred: {note}" for note in self.notes]


def build_profile(
    model_name: str | ModelShape,
    tables: Path,
    ranks: int = 1,
    gpu: Gpu = H200,
    tensor: int = 1,
    *,
    precision: str = "bf16",
    moe_tensor: int = 1,
    serving: Serving | None = None,
) -> tuple[Profile, Report]:
    """Build the profile of one rank of a model.

    Args:
        model_name: a key of ``MODELS``, or a shape.
        tables: folder of the tables.
        ranks: 1, or the number of expert-parallel ranks of a lockstep cluster.
        gpu: the GPU; tables measured on another one are scaled.
        tensor: GPUs of one engine, each an expert-parallel rank; the engines are data parallel.
        precision: a key of ``PRECISIONS``.
        moe_tensor: GPUs that divide each expert, without expert parallelism.
        serving: what a serving engine adds to the kernels; None: the kernels alone, as in the shipped profiles.

    Raises:
        InputError: unknown model, tables that are missing or hold no rows of this shape, or no pyarrow.
    """
    if isinstance(model_name, str) and model_name not in MODELS:
        raise InputError("--model", "", f"got {model_name!r}; {nearest(model_name, MODELS)}")
    if precision not in PRECISIONS:
        raise InputError("--precision", "", f"got {precision!r}; {nearest(precision, PRECISIONS)}")
    if gpu.tables is None and precision != "bf16":
        raise InputError("--precision", "", f"got {precision!r}; allowed on {gpu.name}, which is scaled: bf16")
    model = MODELS[model_name] if isinstance(model_name, str) else model_name
    read = _tables(tables, gpu, serving)
    costs = KernelCosts(model, gpu, read, ranks, tensor, PRECISIONS[precision], moe_tensor, serving)
    rows = _relevant(costs.attention, model)
    terms = np.stack([np.ones(len(rows.us)), rows.sequences, rows.tokens, rows.pairs, rows.context], axis=1)
    attention = fit_relative(terms, rows.us)
    floor, per_sequence, per_token, per_pair, per_context = model.layers * attention

    tokens, projections = costs.projections
    within = tokens <= DENSE_KNOTS[-1]
    tokens, dense = tokens[within], (projections + costs.elementwise(tokens) + per_token * tokens)[within]
    dense_us = token_curve(tokens, dense, DENSE_KNOTS)
    moe_us = None
    if model.experts:
        moe_tokens = np.union1d(costs.moe_measured("balanced")[0], MOE_KNOTS)
        moe = costs.moe(moe_tokens)
        moe_us = token_curve(moe_tokens, moe, MOE_KNOTS)
    communication_us = None
    if costs.group > 1:
        communication_tokens = np.array(COMMUNICATION_KNOTS, dtype=np.float64)
        communication = costs.communication(communication_tokens)
        communication_us = token_curve(communication_tokens, communication, COMMUNICATION_KNOTS)
    batch, lm_head = costs.lm_head
    batch, lm_head = batch[batch <= MAX_NUM_SEQS], lm_head[batch <= MAX_NUM_SEQS]
    head = fit_relative(np.stack([np.ones(len(batch)), batch], axis=1), lm_head)

    fitted_dense = dense_us.at(tokens.astype(np.int64))
    if serving is not None:
        dense_us = _with_launches(costs, dense_us, per_pair)
    step_time = StepTime(
        fixed_us=significant(floor + head[0] + HOST_US),
        per_sequence_us=significant(per_sequence + head[1] + costs.sampler_us_per_sequence),
        dense_us=dense_us,
        moe_us=moe_us,
        moe_imbalance=1.0,
        communication_us=communication_us,
        prefill_pair_us=significant(per_pair),
        decode_context_us=significant(per_context),
    )
    fits = {
        "projections": FitQuality.of(fitted_dense, dense),
        **({"MoE": FitQuality.of(moe_us.at(moe_tokens.astype(np.int64)), moe)} if moe_us else {}),
        "attention": FitQuality.of(terms @ attention, rows.us),
        "lm_head": FitQuality.of(head[0] + head[1] * batch, lm_head),
    } | _whole_steps(costs, rows, step_time)
    ratios = {}
    for name in ("power_law_1.01", "power_law_1.2") if model.experts else ():
        skewed_tokens, us = costs.moe_measured(name)
        ratio = us / costs.moe(skewed_tokens)
        small = skewed_tokens <= SMALL_BATCH
        ratios[name] = (float(np.median(ratio[small])), float(np.median(ratio[~small])), float(ratio.max()))
    if model.experts:
        experts = fit_experts(model, costs.tables, ranks, costs.precision.moe, moe_tensor)
        fits |= {"per expert": experts.quality, "MoE by expert": experts.decomposition}
    name = model_name if isinstance(model_name, str) else model.model.rsplit("/", 1)[-1].lower()
    return _profile(name, costs, step_time, precision), Report(fits, ratios, tuple(costs.tables.notes))


def _with_launches(costs: KernelCosts, dense_us: TokenCurve, per_pair: float) -> TokenCurve:
    """Add the wait for the host, as of a step that prefills one prompt; it begins where the CUDA graphs end."""
    knots = np.array(sorted({*dense_us.tokens, GRAPH_TOKENS + 1}))
    us = dense_us.at(knots)
    kernels = us + _shared(costs, knots) + per_pair * knots * (knots + 1) / 2
    us += costs.launch_wait(knots, kernels)
    return TokenCurve(tokens=tuple(knots.tolist()), us=tuple(significant(value) for value in us))


def _shared(costs: KernelCosts, tokens: FloatArray) -> FloatArray:
    """Return us of MoE layers and communication when each engine has so many tokens."""
    moe = costs.moe(costs.engines * tokens) if costs.model.experts else 0.0
    return np.asarray(moe + costs.communication(tokens))


def _tables(folder: Path, gpu: Gpu, serving: Serving | None) -> KernelTables:
    if gpu.tables is not None:
        return KernelTables(folder, gpu.tables, moe_prefix=serving.moe_tables if serving else None)
    return ScaledTables(folder, str(H200.tables), measured=H200, target=gpu)


def _relevant(rows: AttentionRows, model: ModelShape) -> AttentionRows:
    """Keep the batches that an engine with these limits can run, with prefill up to twice the largest token budget."""
    keep = (rows.sequences <= MAX_NUM_SEQS) & (rows.tokens <= LARGEST_PREFILL)
    keep &= rows.context <= rows.sequences * model.max_position_embeddings
    return _select(rows, keep)


def _select(rows: AttentionRows, keep: npt.NDArray[np.bool_]) -> AttentionRows:
    return AttentionRows(**{field.name: getattr(rows, field.name)[keep] for field in fields(AttentionRows)})


def _whole_steps(costs: KernelCosts, rows: AttentionRows, time: StepTime) -> dict[str, FitQuality]:
    """Compare the profile with the plain sum of the tables, for a step of each batch in the attention tables."""
    rows = _select(rows, costs.engines * rows.tokens <= MOE_KNOTS[-1])  # beyond it the MoE table ends
    kernels = np.interp(rows.tokens, *costs.projections) + costs.elementwise(rows.tokens)
    kernels += _shared(costs, rows.tokens) + costs.model.layers * rows.us
    head = np.interp(rows.sequences, *costs.lm_head) + costs.sampler_us_per_sequence * rows.sequences
    summed = kernels + costs.launch_wait(rows.tokens, kernels) + head + HOST_US

    tokens = rows.tokens.astype(np.int64)
    fitted = time.fixed_us + time.per_sequence_us * rows.sequences + time.dense_us.at(tokens)
    fitted += time.prefill_pair_us * rows.pairs + time.decode_context_us * rows.context
    if time.moe_us is not None:
        fitted += time.moe_us.at(costs.engines * tokens)
    if time.communication_us is not None:
        fitted += time.communication_us.at(tokens)
    decode = rows.pairs == 0
    return {
        "decode steps": FitQuality.of(fitted[decode], summed[decode]),
        "prefill steps": FitQuality.of(fitted[~decode], summed[~decode]),
    }


def _profile(model_name: str, costs: KernelCosts, step_time: StepTime, precision: str = "bf16") -> Profile:
    model, gpu, ranks, tensor = costs.model, costs.gpu, costs.ranks, costs.tensor
    kv = costs.serving.kv if costs.serving else "bfloat16"
    limits = engine_limits(model, gpu, ranks=ranks * costs.moe_tensor, tensor=tensor, precision=costs.precision, kv=kv)
    if limits.num_blocks < 2:
        raise InputError(
            f"{model_name} on {gpu.name}",
            "",
            f"weights leave no room for a KV cache; allowed: more GPUs than {costs.group}",
        )
    layout = f"one of {ranks} expert-parallel ranks with data-parallel attention (lockstep)" if ranks > 1 else "one GPU"
    if tensor > 1:
        layout = f"engine of {tensor} tensor-parallel GPUs among {ranks} expert-parallel ranks (lockstep)"
    if costs.moe_tensor > 1 or (tensor > 1 and ranks == 1):
        layout = f"engine of {tensor} tensor-parallel GPUs"
    formats = "bfloat16" if precision == "bf16" else precision
    suffix = (f"-tp{tensor}" if tensor > 1 else "") + (f"-ep{ranks}" if ranks > 1 else "")
    suffix += "" if precision == "bf16" else f"-{precision.replace('_', '-')}"
    return Profile(
        name=f"{model_name}-{gpu.name.split()[-1].lower()}" + suffix,
        description=f"{model.model}, {formats}, on {gpu.name}, {layout}",
        model=model.model,
        hardware=gpu.name,
        source=_served(_source(precision, costs) if gpu.tables is not None else _scaled_source(gpu), costs),
        engine=limits,
        step_time=step_time,
        experts=expert_shape(model, costs.tables, ranks, costs.precision, costs.moe_tensor) if model.experts else None,
    )


def _source(precision: str, costs: KernelCosts) -> str:
    if precision == "bf16":
        return SOURCE
    kernels = f"{costs.precision.moe} experts and {costs.precision.gemm} projections"
    return SOURCE.replace("fused MoE (Triton, bfloat16)", f"fused MoE ({kernels})")


def _served(source: str, costs: KernelCosts) -> str:
    """Add what :class:`Serving` adds to the kernels."""
    if costs.serving is None:
        return source
    added = []
    if costs.precision.gemm != "fp8_block":
        added.append(f"products of more than {GRAPH_TOKENS} tokens {REAL_DATA:.2f} times as long, for real data")
    if costs.group > 1:
        added.append("all-reduces beyond 8 MiB bounded by NCCL's ring")
    if costs.model.experts:
        added.append(f"at least {costs.serving.launch_us:g} us a layer, for launches, in steps outside CUDA graphs")
    return f"{source.removesuffix('.')}; {'; '.join(added)}." if added else source


def _scaled_source(gpu: Gpu) -> str:
    bandwidth = gpu.bandwidth_bytes_per_s / H200.bandwidth_bytes_per_s
    flops, link = gpu.flops_per_s / H200.flops_per_s, gpu.link_bytes_per_s / H200.link_bytes_per_s
    return (
        f"Modelled throughout: nothing here was measured on {gpu.name}. Each kernel of the H200 profile is scaled by "
        f"the ratio of its roofline times, with {bandwidth:.3f} of H200's HBM bandwidth, {flops:.3f} of its dense "
        f"bfloat16 rate and {link:.3f} of its NVLink bandwidth (data sheets, SXM, 80 GB); 2 us a kernel and the "
        f"latency of the all-reduce are kept (servegym.envs.profiles.scaled_tables). {SOURCE}"
    )


def _limits(profile: Profile, gpu: Gpu) -> list[str]:
    blocks = "of the memory (servegym.envs.profiles.hardware.kv_blocks)."
    length = "max_model_len is the model's own"
    if gpu.tables is None:
        return [
            f"Engine limits: max_num_batched_tokens ({profile.engine.max_num_batched_tokens}), max_num_seqs "
            f"({MAX_NUM_SEQS}) and {gpu.utilization} of the memory are taken as vLLM 0.9's defaults for an API server "
            f"on this GPU; {length}; num_blocks follows from that share {blocks}"
        ]
    return [
        f"Engine limits: max_num_batched_tokens is vLLM 0.32's default for an API server on this GPU; max_num_seqs is "
        f"{MAX_NUM_SEQS}, where 0.32 has 1024 for GPUs of 70 GiB and more; {length}; num_blocks follows from "
        f"{gpu.utilization}, vLLM 0.32's default, {blocks}"
    ]


def header(profile: Profile, report: Report, command: str, gpu: Gpu = H200) -> list[str]:
    """Return the comment at the top of the shipped file: origin, units, what is modelled, quality of the fit."""
    return [
        f"{profile.description}. Made by: {command}",
        "",
        "Times in microseconds, lengths in tokens. The formula of a step stands in the docstring of "
        "servegym.envs.profiles.profile.StepTime; what is measured and what is modelled in `source` below and in "
        "servegym.envs.profiles.kernel_costs. The tables are Copyright (c) NVIDIA CORPORATION & AFFILIATES, "
        "Apache-2.0.",
        "",
        "Relative errors of this profile against the tables; `decode steps` and `prefill steps` compare whole steps "
        "with the plain sum of the kernels, for each batch in the attention tables within the engine's limits:",
        *report.lines(),
        "",
        "moe_us holds equally likely experts, moe_imbalance is 1. The last two lines say what the tables' skewed loads "
        "cost over that: as much for small batches, which load the weights of fewer experts when skewed, and more for "
        "large ones, whose median is the moe_imbalance to set for skewed traffic.",
        "",
        "expert_us is the slope of the `balanced` MoE kernel over the experts it activates, while each has one token "
        "(`per expert`); with a monotone compute term above it repeats the table (`MoE by expert`). The link is fitted "
        "to the all-reduce, half of which is one all-to-all; on one GPU it is that between two.",
        "",
        *_limits(profile, gpu),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code: 0, or 2 on bad input with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m servegym.envs.profiles.kernel_tables", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--tables", type=Path, required=True, help="folder of aic_h200_vllm0.24_*_perf.parquet")
    parser.add_argument("--model", default="qwen3-30b-a3b", help=f"one of: {', '.join(MODELS)}")
    parser.add_argument("--ep", type=int, default=1, help="expert-parallel ranks")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel GPUs of an engine, a divisor of --ep")
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="GPU; all but h200 are scaled from its tables")
    parser.add_argument("--out", type=Path, help="YAML file to write; default: stdout")
    options = parser.parse_args(arguments)
    try:
        if options.ep < 1:
            raise InputError("--ep", "", f"got {options.ep}; allowed: an integer of at least 1")
        if options.tp < 1 or options.ep % options.tp:
            raise InputError("--tp", "", f"got {options.tp}; allowed: a divisor of --ep {options.ep}")
        gpu = GPUS[options.gpu]
        profile, report = build_profile(options.model, options.tables, options.ep, gpu, options.tp)
        command = f"{parser.prog} --tables FOLDER --model {options.model} --ep {options.ep}"
        if gpu is not H200:
            command += f" --gpu {options.gpu}" + (f" --tp {options.tp}" if options.tp > 1 else "")
        write(render(profile, header(profile, report, command, gpu)), options.out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(*report.lines(), sep="\n", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
