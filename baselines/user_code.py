"""A class from the user's own code: ``module:Class`` or ``path/to/file.py:Class``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from servegym.errors import InputError, nearest


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
        raise InputError(source, "", f"no module {error.name!r}, neither installed nor in this directory") from error
    except Exception as error:
        problem = f"{module_name} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(source, "", problem) from error
    if not hasattr(module, class_name):
        classes = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise InputError(source, "", f"{module_name} has no {class_name}; {nearest(class_name, classes)}")
    return getattr(module, class_name)


def _import(name: str) -> ModuleType:
    if name.endswith(".py"):
        path = Path(name).resolve()
        return _execute(path, path.stat().st_mtime_ns)
    # The console script's search path lacks the current directory, where users keep their own modules.
    _make_importable(Path.cwd())
    importlib.invalidate_caches()
    return importlib.import_module(name)


@lru_cache(maxsize=64)
def _execute(path: Path, _modified_ns: int) -> ModuleType:
    """Run a file as a module of its own, once per version of the file."""
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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
