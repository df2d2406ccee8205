"""The kernel's compilation: cached on disk, and thrown away when any source of the kernel changes.

numba's cache looks at the file of the compiled function alone, so that a change in a callee of another module would
go unnoticed; here every function carries the stamp of all sources that the kernel is made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from servegym.baselines import interface
from servegym.compilation import compiled

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


@cache
def source_stamp() -> str:
    """Hash of the sources that compiled kernel functions depend on."""
    digest = hashlib.sha256()
    for path in sorted([*Path(__file__).parent.glob("*.py"), Path(interface.__file__)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def jit(function: FunctionT) -> FunctionT:
    """Compile a kernel function: nopython, cached on disk, without run-time error checks of NumPy semantics."""
    dispatcher = compiled(function, error_model="numpy", boundscheck=False)
    # The cache file compares this stamp; without the attribute (a future numba) the default stamp stays in force.
    cache_file: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(cache_file, "_source_stamp"):
        cache_file._source_stamp = source_stamp()
    return dispatcher
