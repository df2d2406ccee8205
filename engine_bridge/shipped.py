"""Policy bundles that come with servegym, by name: ``servegym/dispatch`` and the others of ``configs/policies``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from servegym.engine_bridge.manifest import MANIFEST
from servegym.errors import InputError, nearest

PREFIX = "servegym/"


def shipped_bundles() -> dict[str, Path]:
    """Return the folders of the shipped bundles by name."""
    folder = Path(str(files("servegym"))) / "configs" / "policies"
    return {f"{PREFIX}{path.parent.name}": path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))}


def resolved(name: str | Path) -> Path:
    """Return the folder that a shipped bundle's name means; any other path as it is.

    Raises:
        InputError: no shipped bundle has this name.
    """
    text = str(name)
    if not text.startswith(PREFIX):
        return Path(name)
    known = shipped_bundles()
    if text not in known:
        raise InputError(text, "", f"no such shipped policy; {nearest(text, known)}")
    return known[text]
