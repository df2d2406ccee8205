"""A class from the user's own code, ``module:Class`` or ``path/to/file.py:Class``, and the lines where it fails."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from servegym.baselines.interface import FloatArray
from servegym.errors import InputError, nearest

_files: set[str] = set()


def load_class(reference: str, source: str) -> Any:
    """Import ``module:Class`` or ``file.py:Class``; a module may also be a file of the current directory.

    Args:
        reference: the module and the attribute, separated by the last colon.
        source: what an error names as the place of the reference.

    Raises:
        InputError: no such module, file or attribute, or an error while it was imported.
    """
    module_name, _, class_name = reference.rpartition(":")
    if not module_name or not class_name.isidentifier():
        raise InputError(source, "", "allowed: a registered name, module:Class or file.py:Class")
    if module_name.endswith(".py") and not Path(module_name).is_file():
        raise InputError(source, "", f"no file {module_name}")
    try:
        module = _import(module_name)
    except ModuleNotFoundError as error:
        where = _place(error)
        problem = f"no module {error.name!r}, neither installed nor in this directory"
        raise InputError(source, "", f"{where}: {problem}" if where else problem) from error
    except Exception as error:
        problem = blame(error) or f"{module_name}: {_describe(error)}"
        raise InputError(source, "", f"cannot be imported: {problem}") from error
    if not hasattr(module, class_name):
        classes = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise InputError(source, "", f"{module_name} has no {class_name}; {nearest(class_name, classes)}")
    return getattr(module, class_name)


def blame(error: BaseException) -> str | None:
    """Say in one line what went wrong in the user's code, and where; None if it was not there.

    ``mine.py:7: ZeroDivisionError: division by zero, in score``: the innermost line of a file that :func:`load_class`
    has read.
    """
    where = _place(error)
    if where is None:
        return None
    function = next((frame.name for frame in _own_frames(error)), "<module>")
    inside = "" if function == "<module>" else f", in {function}"
    return f"{where}: {_describe(error)}{inside}"


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn an exception from the user's code into an :class:`InputError` that names file and line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        line = blame(error)
        if line is None:
            raise
        raise InputError(line, "", "") from error


def checked_scores(policy: Any, scores: Any, count: int) -> FloatArray:
    """Return what a policy's ``score`` gave as an array, shape (count,).

    Raises:
        InputError: it has another shape (a single number would count for all), or no numbers.
    """
    try:
        found = np.asarray(scores, dtype=np.float64)
        got = f"shape {found.shape}"
    except (TypeError, ValueError, RuntimeError) as error:
        found, got = None, f"a {type(scores).__name__} ({' '.join(str(error).split())})"
    if found is None or found.shape != (count,):
        method = type(policy).score
        name = f"{type(policy).__qualname__}.score"
        raise InputError(defined_at(method), name, f"returned {got}; allowed: shape ({count},)")
    return found


def not_a_number(policy: Any, method: str = "score") -> InputError:
    """Return the error of a policy whose scores are NaN, by which nothing can be chosen.

    Args:
        policy: which.
        method: the function that gave them.
    """
    problem = "returned NaN; allowed: numbers, infinity where a candidate is not to be chosen"
    return InputError(defined_at(getattr(policy, method)), f"{type(policy).__qualname__}.{method}", problem)


def defined_at(function: Any) -> str:
    """Return ``FILE:LINE`` of a function, or the module of what has no source."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{_short(code.co_filename)}:{code.co_firstlineno}" if code is not None else str(function.__module__)


def _describe(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}" if text else type(error).__name__


def _place(error: BaseException) -> str | None:
    """Return ``FILE:LINE`` of the user's code; of a syntax error, where that is."""
    if isinstance(error, SyntaxError) and error.filename in _files:
        return f"{_short(error.filename)}:{error.lineno}"
    return next((f"{_short(frame.filename)}:{frame.lineno}" for frame in _own_frames(error)), None)


def _own_frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    """The frames of the user's files, the innermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    return (frame for frame in reversed(frames) if frame.filename in _files)


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def _import(name: str) -> ModuleType:
    if name.endswith(".py"):
        path = Path(name).resolve()
        return _execute(path, path.stat().st_mtime_ns)
    # The console script's search path lacks the current directory, where users keep their own modules.
    _make_importable(Path.cwd())
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None and not name.startswith("servegym."):
        _files.add(spec.origin)
    return importlib.import_module(name)


@lru_cache(maxsize=64)
def _execute(path: Path, _modified_ns: int) -> ModuleType:
    """Run a file as a module of its own, once per version of the file."""
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _files.add(str(path))
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    _make_importable(path.parent)  # a file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _make_importable(folder: Path) -> None:
    """Add a folder to the end of the search path, where its files shadow nothing that is installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
