"""``servegym schedule-trace``: what the simulated engine schedules, for comparison with vLLM's own scheduler."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from servegym.errors import InputError


def schedule_trace_command(
    spec: Annotated[str, typer.Argument(help="A JSON file with the engine's limits and the requests; - for stdin.")],
) -> None:
    """Print what the simulated engine schedules at each step, one JSON object a line.

    SPEC needs `max_num_seqs`, `max_num_batched_tokens`, `num_blocks`, `block_size`, `max_model_len` and `requests`, a
    list of objects with `id`, `prompt` (token ids) and `output_len`. It may have `policy` (`fcfs` or `priority`),
    `prefix_caching` and `long_prefill_token_threshold`, and a request `arrival_step`, `priority` and `output` (token
    ids). Names and meaning are vLLM's.
    """
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
