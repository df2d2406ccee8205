"""Policies from the user's own files, without registration."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from servegym.baselines import registry
from servegym.baselines.heuristic import compiled_form
from servegym.errors import InputError

TEN_LINES = """
import numpy as np

class Longest:
    def __init__(self, weight: float = 1.0):
        self.weight = weight

    def score(self, request, engines):
        return -self.weight * engines.inflight
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as a console script has it
    return tmp_path


def test_a_file_by_path(folder, make_request, make_engines) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "mine.py").write_text(TEN_LINES)
    engines = make_engines(3, inflight=[1, 3, 2])
    for reference in ("sub/mine.py:Longest", f"{folder}/sub/mine.py:Longest"):
        assert registry.create("engine", reference).score(make_request(), engines).argmin() == 1


def test_a_module_of_the_current_directory(folder) -> None:
    name = f"module_{folder.name}"
    (folder / f"{name}.py").write_text(TEN_LINES)
    policy = registry.create("engine", f"{name}:Longest,weight=2")
    assert policy.weight == 2


def test_an_installed_module() -> None:
    policy = registry.create("engine", "servegym.baselines.engine.lmetric:LMetric")
    assert policy.compiled_params().shape == (0,)


def test_a_params_model_is_validated(folder) -> None:
    code = (
        "from pydantic import Field\nfrom servegym.configuration import Config\n"
        "class Mine:\n    class Params(Config):\n        depth: int = Field(2, ge=1)\n"
        "    def __init__(self, params):\n        self.params = params\n"
        "    def score(self, queue):\n        return []\n"
    )
    (folder / "mine.py").write_text(code)
    assert registry.create("request", "mine.py:Mine").params.depth == 2
    assert registry.create("request", "mine.py:Mine,depth=5").params.depth == 5
    with pytest.raises(InputError, match=r"^policy request=mine.py:Mine: depth: got 0; allowed: greater than or equal"):
        registry.create("request", "mine.py:Mine,depth=0")


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(folder) -> None:
    file = folder / "mine.py"
    file.write_text(TEN_LINES)
    first = registry.policy_class("engine", "mine.py:Longest")
    assert registry.policy_class("engine", "mine.py:Longest") is first
    file.write_text(TEN_LINES.replace("1.0", "7.0"))
    os.utime(file, (0, 0))
    assert registry.create("engine", "mine.py:Longest").weight == 7.0


def test_a_file_may_import_its_neighbours_and_hold_dataclasses(folder) -> None:
    (folder / f"near_{folder.name}.py").write_text("BASE = 40\n")
    code = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        f"from near_{folder.name} import BASE\n"
        "@dataclass\nclass Mine:\n    extra: int = 2\n    def score(self, request, engines):\n"
        "        return BASE + self.extra\n"
    )
    (folder / "mine.py").write_text(code)
    assert registry.create("engine", "mine.py:Mine").score(None, None) == 42


@pytest.mark.parametrize(
    ("code", "reference", "problem"),
    [
        (TEN_LINES, "other.py:Longest", "no file other.py"),
        (TEN_LINES, "no_such_module:Longest", "no module 'no_such_module', neither installed nor in this directory"),
        (TEN_LINES, "mine.py:Longst", "mine.py has no Longst; did you mean Longest?"),
        (TEN_LINES, "mine.py:", "allowed: a registered name, module:Class or file.py:Class"),
        (TEN_LINES, "mine.py:np", "is not a class"),
        (TEN_LINES, "mine.py:Longest,wait=1", "unexpected keyword argument 'wait'; allowed: (weight: float = 1.0)"),
        (
            "class Longest:\n    pass\n",
            "mine.py:Longest",
            "class Longest has no method score, which every engine policy",
        ),
        ("def f(:\n", "mine.py:Longest", "mine.py cannot be imported: SyntaxError: "),
        ("1 / 0\n", "mine.py:Longest", "mine.py cannot be imported: ZeroDivisionError: division by zero"),
        ("open('absent')\n", "mine.py:Longest", "mine.py cannot be imported: FileNotFoundError: "),
        ("import no_such_library\n", "mine.py:Longest", "no module 'no_such_library', neither installed nor in"),
    ],
)
def test_mistakes_are_one_line(folder, code, reference, problem) -> None:
    (folder / "mine.py").write_text(code)
    with pytest.raises(InputError) as caught:
        registry.create("engine", reference)
    line = str(caught.value)
    assert line.startswith(f"policy engine={reference.partition(',')[0]}: ")
    assert problem in line
    assert "\n" not in line


def test_a_class_attribute_form_is_compiled_too(folder) -> None:
    code = TEN_LINES + (
        "\n    @staticmethod\n    def compiled(request, engines, params, out):\n"
        "        for i in range(len(out)):\n            out[i] = -engines[i, 5]\n"
    )
    (folder / "mine.py").write_text(code)
    function, params = compiled_form(registry.create("engine", "mine.py:Longest"))
    out = np.zeros(2)
    function(np.zeros(12), np.ones((2, 21)), params, out)
    assert out.tolist() == [-1, -1]
    assert params.shape == (0,)
