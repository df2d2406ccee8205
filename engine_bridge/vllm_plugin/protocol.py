"""The files through which an engine's scheduler learns its policy and reports back.

The engine is another process, maybe on another machine with a shared folder. It looks at the policy file's time of
change once a second; a new file replaces the old one whole, by renaming.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from servegym.baselines.policy_spec import PolicySpec
from servegym.configuration import validate
from servegym.errors import InputError

POLICY_VARIABLE = "SERVEGYM_POLICY"
"""Environment variable with the path of the policy file."""
STATE_VARIABLE = "SERVEGYM_SCHEDULER_STATE"
"""Environment variable with the path of the state file, which the scheduler writes."""
RATE_VARIABLE = "SERVEGYM_PREFILL_TOKENS_PER_S"
"""Environment variable with the engine's calibrated prefill rate."""


def write_policy(path: Path, spec: PolicySpec) -> int:
    """Write a policy file and return its version, one more than that of the file it replaces."""
    try:
        version = read_policy(path)[0] + 1
    except InputError:
        version = 1
    _replace(path, {"version": version, "policy": spec.model_dump(mode="json")})
    return version


def read_policy(path: Path) -> tuple[int, PolicySpec]:
    """Read a policy file.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = int(content["version"])
        policy: Mapping[str, Any] = content["policy"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(str(path), "", f"no policy file: {error}") from None
    return version, validate(PolicySpec, policy, str(path))


def write_state(path: Path, content: Mapping[str, Any]) -> None:
    """Write a state file; a reader never sees a half of it."""
    _replace(path, content)


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)
