"""Policies from the user's own files, without registration."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from servegym.baselines import registry
from servegym.baselines.heuristic import compiled_form
from servegym.baselines.user_code import checked_scores, user_errors
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
        ("def f(:\n", "mine.py:Longest", "cannot be imported: mine.py:1: SyntaxError: "),
        ("1 / 0\n", "mine.py:Longest", "cannot be imported: mine.py:1: ZeroDivisionError: division by zero"),
        ("open('absent')\n", "mine.py:Longest", "cannot be imported: mine.py:1: FileNotFoundError: "),
        (
            "import no_such_library\n",
            "mine.py:Longest",
            "mine.py:1: no module 'no_such_library', neither installed nor in",
        ),
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


FAILS = "class Mine:\n    def score(self, request, engines):\n        return {}\n"


@pytest.mark.parametrize(
    ("returned", "line"),
    [
        ("engines.kv_use", "mine.py:3: AttributeError: 'EngineViews' object has no attribute 'kv_use', in score"),
        ("sum(int(x) for x in 'ab')", "mine.py:3: ValueError: invalid literal for int() with base 10: 'a', in "),
        ("__import__('math').sqrt(-1)", "mine.py:3: ValueError: "),
    ],
)
def test_an_error_inside_is_told_with_its_line(folder, make_request, make_engines, returned, line) -> None:
    (folder / "mine.py").write_text(FAILS.format(returned))
    policy = registry.create("engine", "mine.py:Mine")
    with pytest.raises(InputError) as caught, user_errors():
        policy.score(make_request(), make_engines(2))
    assert str(caught.value).startswith(line)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_error_of_ours_keeps_its_traceback(folder) -> None:
    (folder / "mine.py").write_text(TEN_LINES)
    registry.create("engine", "mine.py:Longest")
    with pytest.raises(ZeroDivisionError), user_errors():
        1 / 0  # noqa: B018


def test_an_error_in_the_constructor_is_told_with_its_line(folder) -> None:
    code = "class Mine:\n    def __init__(self):\n        open('absent')\n" + FAILS.partition("\n")[2].format("0")
    (folder / "mine.py").write_text(code)
    with pytest.raises(InputError, match=r"^mine.py:3: FileNotFoundError: .*absent.*, in __init__$"):
        registry.create("engine", "mine.py:Mine")


@pytest.mark.parametrize(
    ("method", "allowed"),
    [
        ("def score(self, engines)", "score(self, request, engines)"),
        ("def score(request, engines)", "score(self, request, engines)"),
        ("def reset(self)", "reset(self, seed)"),
        ("def on_finish(self, index, engine, now_s)", "on_finish(self, request_index, engine, now_s, output_tokens)"),
    ],
)
def test_wrong_arguments_are_told_before_anything_runs(folder, method, allowed) -> None:
    good = FAILS.format("engines.inflight") if "score" not in method else "class Mine:\n"
    (folder / "mine.py").write_text(f"{good}    {method}:\n        pass\n")
    with pytest.raises(InputError) as caught:
        registry.create("engine", "mine.py:Mine")
    line = good.count("\n") + 1
    assert f"mine.py:{line}: Mine.{method[4:].partition('(')[0]}: " in str(caught.value)
    assert str(caught.value).endswith(f"allowed: {allowed}")


def test_static_methods_and_defaults_are_fine(folder, make_request, make_engines) -> None:
    code = (
        "class Mine:\n    @staticmethod\n    def score(request, engines, weight=2):\n        return engines.inflight\n"
        "    def on_finish(self, *anything):\n        pass\n"
    )
    (folder / "mine.py").write_text(code)
    assert registry.create("engine", "mine.py:Mine").score(make_request(), make_engines(2)).shape == (2,)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (3.0, r"returned shape \(\); allowed: shape \(2,\)"),
        ([1.0, 2.0, 3.0], r"returned shape \(3,\); allowed: shape \(2,\)"),
        ("abc", r"returned a str \(.*\); allowed: shape \(2,\)"),
    ],
)
def test_scores_of_another_shape_are_refused(folder, value, problem) -> None:
    (folder / "mine.py").write_text(TEN_LINES)
    policy = registry.create("engine", "mine.py:Longest")
    with pytest.raises(InputError, match=rf"^mine.py:8: Longest.score: {problem}$"):
        checked_scores(policy, value, 2)
    assert checked_scores(policy, [1, 2], 2).tolist() == [1.0, 2.0]
