from __future__ import annotations

from pathlib import Path

import pytest

from servegym import compilation


def test_a_stamp_changes_with_whatever_the_source_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's own stamp is of one file: a changed callee elsewhere left the old machine code in force."""
    monkeypatch.setattr(compilation, "__file__", str(tmp_path / "compilation.py"))
    package = tmp_path / "kernel"
    package.mkdir()
    (package / "step.py").write_text("from servegym.kernel import (\n    blocks,\n    state,\n)\nimport numpy\n")
    (package / "blocks.py").write_text("from servegym.kernel.state import COLUMNS\n")
    (package / "state.py").write_text("COLUMNS = 3\n")
    (package / "other.py").write_text("ROWS = 3\n")

    def stamp() -> str:
        compilation.source_stamp.cache_clear()
        compilation._imports.cache_clear()
        return compilation.source_stamp(package / "step.py")

    before = stamp()
    assert stamp() == before
    (package / "other.py").write_text("ROWS = 4\n")
    assert stamp() == before
    (package / "state.py").write_text("COLUMNS = 4\n")
    assert stamp() != before
    compilation.source_stamp.cache_clear()
    compilation._imports.cache_clear()
