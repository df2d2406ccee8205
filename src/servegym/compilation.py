"""Compilation with numba: on disk where that is possible, in memory where no folder can be written.

Inside an engine whose environment has no numba, what is compiled elsewhere runs as plain Python.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

HAS_NUMBA = importlib.util.find_spec("numba") is not None
if HAS_NUMBA:
    import numba

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
_IMPORT = re.compile(r"^\s*(?:from (servegym[\w.]*) import (\([^)]*|[\w, ]*)|import (servegym[\w.]*))", re.MULTILINE)


def compiled(function: FunctionT, **options: Any) -> FunctionT:
    """Compile a function in nopython mode, when it is first called.

    numba's cache on disk looks at the file of the function alone, so that a change in a callee of another module would
    go unnoticed; here it carries the stamp of all sources that the function may have been compiled from.

    Args:
        function: plain Python in the subset that numba takes.
        options: further options of ``numba.njit``.
    """
    if not HAS_NUMBA:
        return function
    try:
        dispatcher = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither beside the source nor in the user's cache folder, or a function from a prompt
        return cast(FunctionT, numba.njit(**options)(function))
    # Without the attribute (a future numba) the default stamp, of one file, stays in force.
    cache_file: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(cache_file, "_source_stamp"):
        cache_file._source_stamp = source_stamp(Path(inspect.getfile(function)))
    return cast(FunctionT, dispatcher)


@cache
def source_stamp(source: Path) -> str:
    """Hash of a source file and of all of servegym that it imports, directly or not."""
    digest = hashlib.sha256()
    seen = {source}
    pending = [source]
    while pending:
        found = _imports(pending.pop()) - seen
        seen |= found
        pending.extend(found)
    for path in sorted(seen):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _imports(source: Path) -> frozenset[Path]:
    """The files of servegym that a source file names in its import statements."""
    names = set()
    for module, members, plain in _IMPORT.findall(source.read_text()):
        names.add(module or plain)
        names.update(f"{module}.{member}" for member in re.findall(r"\w+", members))
    root = Path(__file__).parent
    files: set[Path] = set()
    for name in names:
        path = root.joinpath(*name.split(".")[1:])
        files.update(file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file())
    return frozenset(files)
