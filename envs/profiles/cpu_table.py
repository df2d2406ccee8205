"""Profile of vLLM's CPU build with a tiny MoE model, fitted to measured steps: ``python -m … .cpu_table --help``.

Measured on vLLM-CPU 0.32.0 through its API server on one core of a shared machine (medians; between runs absolute times
vary by 30 %), with a Qwen3-MoE model of 4 layers, 16 experts of which 2 are active, hidden size 256, 7.2 million
parameters. Decode steps are the intervals between successive ``schedule()`` calls; prefill is the TTFT of a request
alone, which includes about 5 ms of HTTP, tokeniser and inter-process messages that are no engine time and are taken
off. One linear term each is fitted for the step, its sequences, its tokens, its query-key pairs and its context.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from servegym.envs.profiles.document import render, write
from servegym.envs.profiles.fitting import FitQuality, fit_relative, significant
from servegym.envs.profiles.profile import EngineLimits, Profile, StepTime, TokenCurve
from servegym.errors import InputError

DECODE_STEPS = (
    (1, 32, 5.95),
    (2, 32, 7.27),
    (4, 32, 5.72),
    (8, 32, 6.10),
    (16, 32, 7.20),
    (32, 32, 9.36),
    (64, 32, 11.26),
    (8, 512, 10.3),
    (8, 1024, 12.1),
    (8, 2048, 14.6),
    (8, 3500, 20.2),
    (32, 1024, 21.4),
)
"""(sequences, context of each, ms per step), measured."""

PREFILL_TTFT = (
    (16, 11.0),
    (32, 12.7),
    (64, 13.9),
    (128, 18.0),
    (256, 27.7),
    (512, 45.2),
    (1024, 81.5),
    (2000, 203.7),
)
"""(prompt tokens, ms to the first token of a request alone), measured."""

FRONTEND_MS = 5.0
"""Part of the TTFT above that is HTTP, tokeniser and messages between processes."""

LIMITS = EngineLimits(
    block_size=128,
    num_blocks=257,
    max_num_seqs=128,
    max_num_batched_tokens=2048,
    max_model_len=4096,
)
"""Block size, batch and budget are defaults of vLLM's CPU build for an API server. The KV cache is a setting there:
256 usable blocks hold 32,768 tokens."""


def build_profile() -> tuple[Profile, dict[str, FitQuality]]:
    """Fit the profile.

    Returns:
        The profile and its relative errors against the measured decode and prefill steps.
    """
    decode = [(1, sequences, sequences, 0.0, sequences * context) for sequences, context, _ in DECODE_STEPS]
    prefill = [(1, 1, tokens, tokens * (tokens + 1) / 2, 0.0) for tokens, _ in PREFILL_TTFT]
    columns = np.array(decode + prefill, dtype=np.float64)
    us = 1e3 * np.array([ms for *_, ms in DECODE_STEPS] + [ms - FRONTEND_MS for _, ms in PREFILL_TTFT])
    fixed, per_sequence, per_token, per_pair, per_context = (significant(value) for value in fit_relative(columns, us))

    budget = LIMITS.max_num_batched_tokens
    profile = Profile(
        name="cpu-tiny-moe",
        description="Qwen3-MoE of 7.2 million parameters (4 layers, 16 experts, top-2) on one CPU core",
        model="tiny qwen3_moe",
        hardware="one x86 core, vLLM-CPU 0.32.0",
        source=(
            "Measured: decode steps and TTFT of vLLM-CPU 0.32.0 (servegym.envs.profiles.cpu_table), on a machine whose "
            "absolute times vary by 30 %. Modelled: 5 ms of HTTP and tokeniser taken off the TTFT, terms linear in "
            "tokens, pairs and context; dense and MoE layers are not told apart."
        ),
        engine=LIMITS,
        step_time=StepTime(
            fixed_us=fixed,
            per_sequence_us=per_sequence,
            dense_us=TokenCurve(tokens=(1, budget), us=(per_token, significant(per_token * budget))),
            prefill_pair_us=per_pair,
            decode_context_us=per_context,
        ),
    )
    cost = profile.compile()
    steps = [cost.step_s([], [context] * sequences) for sequences, context, _ in DECODE_STEPS]
    steps += [cost.step_s([(0, tokens)], []) for tokens, _ in PREFILL_TTFT]
    fitted, split = 1e6 * np.array(steps), len(DECODE_STEPS)
    return profile, {
        "decode steps": FitQuality.of(fitted[:split], us[:split]),
        "prefill steps": FitQuality.of(fitted[split:], us[split:]),
    }


def header(profile: Profile, fits: dict[str, FitQuality]) -> list[str]:
    """Return the comment at the top of the shipped file."""
    return [
        f"{profile.description}. Made by: python -m servegym.envs.profiles.cpu_table",
        "",
        "Times in microseconds, lengths in tokens. The formula of a step stands in the docstring of "
        "servegym.envs.profiles.profile.StepTime. For studies beside a live CPU engine: `servegym calibrate` measures "
        "the engine at hand and replaces this file. A client sees about 5 ms more to the first token than the engine "
        "takes.",
        "",
        "Relative errors against the measured steps:",
        *[f"  {name:<14} {quality}" for name, quality in fits.items()],
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code: 0, or 2 if the file cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m servegym.envs.profiles.cpu_table", description="Fit the profile of the CPU engine."
    )
    parser.add_argument("--out", type=Path, help="YAML file to write; default: stdout")
    options = parser.parse_args(arguments)
    profile, fits = build_profile()
    try:
        write(render(profile, header(profile, fits)), options.out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
