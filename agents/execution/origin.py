"""What workers on other machines must have in common with the one that the work comes from."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

import servegym
from servegym.agents.versions import package_versions
from servegym.errors import InputError

_SOURCES = {".py", ".yaml", ".json", ".safetensors"}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where work comes from.

    Attributes:
        versions: of the packages that a result depends on, pairs of name and version.
        source: hash of all files of servegym.
        folder: the working folder, which relative paths start from.
    """

    versions: tuple[tuple[str, str], ...]
    source: str
    folder: str

    @classmethod
    def here(cls) -> Self:
        """Return that of this process."""
        return cls(tuple(package_versions().items()), source_digest(), str(Path.cwd()))

    @cache  # noqa: B019 - once a worker
    def enter(self) -> None:
        """Make a worker's process one that gives the results of the origin.

        Raises:
            InputError: it has other code, other packages, or not the folder.
        """
        worker = f"the worker on {socket.gethostname()}"
        versions = package_versions()
        for name, wanted in self.versions:
            if name in versions and versions[name] != wanted:
                raise InputError(worker, name, f"is {versions[name]}; allowed: {wanted}, as where the command runs")
        if source_digest() != self.source:
            raise InputError(
                worker, "servegym", f"has other code (hash {source_digest()}); allowed: {self.source}, as here"
            )
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise InputError(
                worker, self.folder, f"{error.strerror}; allowed: a working folder that all machines share"
            ) from None


@cache
def source_digest() -> str:
    """Hash of servegym's code, shipped configs and bundles."""
    digest = hashlib.sha256()
    root = Path(servegym.__file__).parent
    for folder, names, files in os.walk(root, followlinks=True):
        names.sort()
        for path in (Path(folder, name) for name in sorted(files)):
            if path.suffix in _SOURCES:
                digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
