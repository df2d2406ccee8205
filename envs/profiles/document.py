"""Writing a profile as YAML whose comments say what each number means and where it comes from."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import yaml
from pydantic import BaseModel

from servegym.envs.profiles.profile import Profile, TokenCurve
from servegym.errors import InputError

WIDTH = 116


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)


def render(profile: Profile, header: Iterable[str]) -> str:
    """Return the profile as YAML text; loading it gives the same profile.

    Args:
        profile: the profile.
        header: paragraphs of the comment at the top. A line that starts with a space is kept as it is.
    """
    lines = []
    for paragraph in header:
        lines += [f"# {line}".rstrip() for line in _wrapped(paragraph)]
    lines.append("")
    lines += _section(profile, "")
    return "\n".join(lines) + "\n"


def write(text: str, out: Path | None) -> None:
    """Write the text to a file, or to stdout without one.

    Raises:
        InputError: the file cannot be written.
    """
    if out is None:
        sys.stdout.write(text)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(str(out), "", f"cannot be written: {error.strerror}") from None


def _wrapped(text: str) -> list[str]:
    return [text] if text.startswith(" ") or not text else _wrap(text)


def _section(section: BaseModel, indent: str) -> list[str]:
    lines = []
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if value is None:
            continue
        if info.description and not isinstance(section, TokenCurve):  # its two lines speak for themselves
            lines += [f"{indent}# {line}" for line in _wrap(info.description, indent)]
        if isinstance(value, BaseModel):
            lines += [f"{indent}{name}:", *_section(value, indent + "  ")]
        elif isinstance(value, str) and len(value) > WIDTH - len(indent) - len(name) - 2:
            lines.append(f"{indent}{name}: >-")
            lines += [f"{indent}  {line}" for line in _wrap(value, indent)]
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}")
    return lines


def _scalar(value: object) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
