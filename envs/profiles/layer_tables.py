"""Build a profile from LLMServingSim's layer profile: ``python -m servegym.envs.profiles.layer_tables --help``.

The tables (MIT) hold microseconds of each layer of vLLM on one NVIDIA RTX PRO 6000 with Qwen3-30B-A3B in bfloat16:
dense layers by tokens, lm_head and sampler by sequences, attention by prefill chunk, its prior context, decoding
sequences and their context, and the MoE layer by tokens and activated experts. They are summed over the layers and
fitted to the terms of :class:`~servegym.envs.profiles.profile.StepTime`, attention to the batches that only prefill or
only decode: in a mixed batch one kernel serves both, and a context token of a decoding sequence costs about three times
as much there, which the terms cannot express. With ``--ranks 2`` the profile is one rank of
two, with data-parallel attention and expert parallelism (DP2 + EP). Then a rank has half of the experts and computes
the tokens of both ranks that choose them.

Modelled: the number of activated experts (equally likely ones), the host's share of a step, the KV blocks, and with
two ranks dispatch and combine over PCIe 5.0 x16, since this GPU has no NVLink.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from servegym.envs.profiles.document import render, write
from servegym.envs.profiles.expert_cost import ACTIVATION_TABLE, fit_roofline, read_activations
from servegym.envs.profiles.fitting import FitQuality, FloatArray, fit_relative, significant, token_curve
from servegym.envs.profiles.hardware import BYTES, GIB, MODELS, Gpu
from servegym.envs.profiles.kernel_costs import HOST_US
from servegym.envs.profiles.limits import engine_limits
from servegym.envs.profiles.profile import ExpertShape, Profile, StepTime, TokenCurve
from servegym.envs.profiles.tables import read_parquet, read_rows
from servegym.errors import InputError

PREFIX = "llmservingsim_profile_rtxpro6000_qwen3-30b-a3b_tp1"
MODEL = MODELS["qwen3-30b-a3b"]

RTX_PRO_6000 = Gpu("NVIDIA RTX PRO 6000", None, int(95.0 * GIB), 1.792e12, 504e12, 125e12, 128e9, 2048, 0.9)
"""Blackwell, 96 GB of GDDR7. The link is PCIe 5.0 x16, both directions together."""

LINK_SHARE = 0.8
"""Share of the link's one direction that a transfer reaches: modelled."""

LINK_LATENCY_US = 15.0
"""Latency of an all-gather or reduce-scatter of two GPUs over PCIe: modelled."""

DENSE_LAYERS = {"layernorm": 2, "qkv_proj": 1, "qk_norm": 1, "rotary_emb": 1, "o_proj": 1}
"""Calls in each layer of the model."""

ONCE = ("embedding", "final_layernorm")

TOKEN_KNOTS = (1, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048)
MOE_KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
COMMUNICATION_KNOTS = (1, 64, 256, 1024, 2048)

SOURCE = (
    "Measured: layers of vLLM on one NVIDIA RTX PRO 6000, from casys-kaist/LLMServingSim @ 5daddb21 (MIT): "
    "projections, norms, rotary embedding, lm_head, sampler, attention of pure and mixed batches, MoE by tokens and "
    "activated experts. Modelled: "
    "the number of activated experts under equally likely routing, the host's share of a step, KV blocks"
)


def build_profile(folder: Path, ranks: int = 2) -> tuple[Profile, dict[str, FitQuality]]:
    """Fit the profile.

    Args:
        folder: where the tables are.
        ranks: data-parallel engines that share the experts; 1: one GPU.

    Returns:
        The profile, and its relative errors against the tables by term.

    Raises:
        InputError: tables that are missing or are none of these.
    """
    tokens, dense = _dense(folder)
    sequences, head = _heads(folder)
    terms, attention_us = attention_rows(folder)
    pure = (terms[:, 3] == 0) | (terms[:, 4] == 0)
    attention = fit_relative(terms[pure], attention_us[pure])
    floor, per_sequence, per_token, per_pair, per_context = attention
    layers = MODEL.layers
    dense_us = token_curve(tokens, dense + layers * per_token * tokens, TOKEN_KNOTS)
    head_columns = np.stack([np.ones(len(sequences)), sequences], axis=1)
    head_fit = fit_relative(head_columns, head)

    moe_tokens, active, us = read_activations(folder / ACTIVATION_TABLE)
    fixed, expert_us, token_us = moe_fit = fit_roofline(moe_tokens, active, us)
    knots = np.array(MOE_KNOTS, dtype=np.float64)
    moe = layers * moe_cost(knots, ranks, moe_fit)

    step_time = StepTime(
        fixed_us=significant(layers * floor + head_fit[0] + HOST_US),
        per_sequence_us=significant(layers * per_sequence + head_fit[1]),
        dense_us=dense_us,
        moe_us=TokenCurve(tokens=MOE_KNOTS, us=tuple(significant(value) for value in moe)),
        communication_us=_communication(ranks),
        prefill_pair_us=significant(layers * per_pair),
        decode_context_us=significant(layers * per_context),
    )
    fits = {
        "dense": FitQuality.of(dense_us.at(tokens.astype(np.int64)) - layers * per_token * tokens, dense),
        "lm_head": FitQuality.of(head_columns @ head_fit, head),
        "MoE": FitQuality.of(fixed + np.maximum(expert_us * active, token_us * moe_tokens), us),
    }
    # Whole steps: the attention as measured, or by the profile's terms; everything else is the same in both.
    batch = terms[:, 2].astype(np.int64)
    rest = step_time.fixed_us - layers * floor + (step_time.per_sequence_us - layers * per_sequence) * terms[:, 1]
    rest += dense_us.at(batch) - layers * per_token * terms[:, 2] + layers * moe_cost(terms[:, 2], 1, moe_fit)
    fitted, summed = rest + layers * terms @ attention, rest + layers * attention_us
    decode = terms[:, 3] == 0
    for name, rows in (("decode steps", decode), ("prefill steps", pure & ~decode), ("mixed steps", ~pure)):
        fits[name] = FitQuality.of(fitted[rows], summed[rows])
    return _profile(step_time, expert_us, ranks), fits


def _dense(folder: Path) -> tuple[FloatArray, FloatArray]:
    """Return (tokens, us of the dense layers of the whole model)."""
    rows = read_rows(folder / f"{PREFIX}_dense.parquet", ("layer", "tokens", "time_us"))
    calls = {name: MODEL.layers * count for name, count in DENSE_LAYERS.items()} | dict.fromkeys(ONCE, 1)
    total: dict[int, float] = {}
    for row in rows:
        total[row["tokens"]] = total.get(row["tokens"], 0.0) + calls.get(row["layer"], 0) * row["time_us"]
    tokens = sorted(total)
    return np.array(tokens, dtype=np.float64), np.array([total[count] for count in tokens])


def _heads(folder: Path) -> tuple[FloatArray, FloatArray]:
    """Return (sequences, us of lm_head and sampler)."""
    columns = read_parquet(folder / f"{PREFIX}_per_sequence.parquet", ("sequences", "time_us"), {})
    sequences = np.unique(columns["sequences"])
    return sequences, np.array([columns["time_us"][columns["sequences"] == count].sum() for count in sequences])


def attention_rows(folder: Path) -> tuple[FloatArray, FloatArray]:
    """Return the terms (one, sequences, tokens, pairs, context; shape (rows, 5)) and the us of one attention layer."""
    names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    columns = read_parquet(folder / f"{PREFIX}_attention.parquet", names, {})
    chunk, prior, decoding, context, us = (columns[name] for name in names)
    terms = np.stack(
        [
            np.ones(len(us)),
            decoding + (chunk > 0),
            chunk + decoding,
            chunk * (prior + (chunk + 1) / 2),
            decoding * context,
        ],
        axis=1,
    )
    return terms, us


def moe_cost(tokens: FloatArray, ranks: int, fit: tuple[float, float, float]) -> FloatArray:
    """Return the us of a layer on a rank for ``tokens`` over all ranks, with equally likely experts.

    A rank holds ``E / ranks`` experts, of which ``1 - (1 - k / E)**T`` are activated, and computes ``1 / ranks`` of the
    pairs of token and expert.
    """
    fixed, expert, token = fit
    active = MODEL.experts / ranks * (1 - (1 - MODEL.top_k / MODEL.experts) ** tokens)
    return np.asarray(fixed + np.maximum(expert * active, token * tokens / ranks))


def _communication(ranks: int) -> TokenCurve | None:
    """Dispatch and combine of all layers: an all-gather and a reduce-scatter of the hidden states."""
    if ranks == 1:
        return None
    tokens = np.array(COMMUNICATION_KNOTS, dtype=np.float64)
    sent = (ranks - 1) * BYTES * MODEL.hidden * tokens
    us = 2 * MODEL.layers * (LINK_LATENCY_US + sent / _link_bytes_per_us())
    return TokenCurve(tokens=COMMUNICATION_KNOTS, us=tuple(significant(value) for value in us))


def _link_bytes_per_us() -> float:
    return LINK_SHARE * RTX_PRO_6000.link_bytes_per_s / 2 * 1e-6


def _profile(step_time: StepTime, expert_us: float, ranks: int) -> Profile:
    gpu = RTX_PRO_6000
    link = ", dispatch and combine over PCIe 5.0 x16" if ranks > 1 else ""
    layout = f"one of {ranks} data-parallel ranks with expert parallelism (lockstep)" if ranks > 1 else "one GPU"
    return Profile(
        name="qwen3-30b-a3b-rtxpro6000" + (f"-dp{ranks}-ep{ranks}" if ranks > 1 else ""),
        description=f"{MODEL.model}, bfloat16, on {gpu.name}, {layout}",
        model=MODEL.model,
        hardware=gpu.name,
        source=SOURCE + link + ".",
        engine=engine_limits(MODEL, gpu, ranks=ranks),
        step_time=step_time,
        experts=ExpertShape(
            layers=MODEL.layers,
            experts=MODEL.experts,
            top_k=MODEL.top_k,
            ranks=ranks,
            expert_bytes=BYTES * 3 * MODEL.hidden * MODEL.moe_intermediate,
            token_bytes=BYTES * MODEL.hidden,
            expert_us=significant(expert_us),
            link_gb_s=significant(_link_bytes_per_us() * 1e-3),
            link_latency_us=LINK_LATENCY_US,
        ),
    )


def header(profile: Profile, fits: dict[str, FitQuality], command: str) -> list[str]:
    """Return the comment at the top of the shipped file."""
    return [
        f"{profile.description}. Made by: {command}",
        "",
        "Times in microseconds, lengths in tokens. The formula of a step stands in the docstring of "
        "servegym.envs.profiles.profile.StepTime; what is measured and what is modelled in `source` below and in "
        "servegym.envs.profiles.layer_tables. The tables are LLMServingSim's, MIT.",
        "",
        "Relative errors against the tables: of single terms, and of whole steps on one GPU against the sum of its "
        "layers. Attention is fitted to batches that only prefill or only decode; mixed steps with long contexts take "
        "longer than this profile says:",
        *[f"  {name:<14} {quality}" for name, quality in fits.items()],
        "",
        "The layers were measured one by one on one GPU: launches between them, the second rank and the link between "
        "the two were not. moe_us holds equally likely experts, moe_imbalance is 1.",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code: 0, or 2 on bad input with one line on stderr."""
    prog = "python -m servegym.envs.profiles.layer_tables"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n")[0])
    parser.add_argument("--tables", type=Path, required=True, help=f"folder of {PREFIX}_*.parquet")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=2, help="data-parallel ranks with shared experts")
    parser.add_argument("--out", type=Path, help="YAML file to write; default: stdout")
    options = parser.parse_args(arguments)
    try:
        profile, fits = build_profile(options.tables, options.ranks)
        command = f"{prog} --tables FOLDER --ranks {options.ranks}"
        write(render(profile, header(profile, fits, command)), options.out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    for name, quality in fits.items():
        print(f"  {name:<14} {quality}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
