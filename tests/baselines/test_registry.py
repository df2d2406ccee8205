"""Lookup, creation, description and extension of the registry."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from servegym.baselines import registry
from servegym.baselines.interface import EnginePolicy, RequestPolicy
from servegym.errors import InputError

FIRST_SET = {
    "request": {"fcfs", "priority", "sjf_age", "spf_aging", "sjf_oracle", "sjf_predicted", "srpt_oracle"},
    "engine": {
        "random",
        "round_robin",
        "least_requests",
        "power_of_two",
        "vllm",
        "vllm_0_9",
        "vllm_2025_11",
        "load_aware",
        "lmetric",
        "session_sticky",
    },
    "expert": {"linear"},
}


@pytest.fixture(autouse=True)
def _restored(monkeypatch) -> Iterator[None]:
    """Let each test register what it likes."""
    registry.names("engine")
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(registry, "_loaders", [])
    yield
    registry._plugins.cache_clear()


class Constant:
    """Every engine is as good as any other.

    More words.
    """

    def score(self, request, engines):
        return np.zeros(len(engines))


@pytest.mark.parametrize("layer", registry.LAYERS)
def test_the_first_set_is_there(layer) -> None:
    assert set(registry.names(layer)) >= FIRST_SET[layer]


def test_every_policy_is_described_in_full() -> None:
    for layer in registry.LAYERS:
        for row in registry.describe(layer):
            assert row.keys() == {"name", "explanation", "formula", "parameters", "source", "compiled"}
            assert row["explanation"].endswith(".")
            assert row["source"]
            assert all(parameter["meaning"] for parameter in row["parameters"])
    by_name = {row["name"]: row for row in registry.describe("request")}
    assert by_name["spf_aging"]["parameters"] == [
        {"name": "gamma", "default": 100.0, "meaning": "prefill tokens that one second of waiting is worth"}
    ]


@pytest.mark.parametrize("layer", ["request", "engine"])
def test_created_policies_follow_the_protocol(layer) -> None:
    protocol = {"request": RequestPolicy, "engine": EnginePolicy}[layer]
    assert all(isinstance(registry.create(layer, name), protocol) for name in registry.names(layer))


def test_parameters_reach_the_compiled_form_in_order() -> None:
    policy = registry.create("engine", "load_aware,theta_load_tokens=500")
    assert policy.compiled_params().tolist() == [0.9, 0.1, 500.0]
    assert registry.create("engine", "session_sticky").compiled_params().tolist() == [np.inf]
    assert registry.create("engine", "lmetric").compiled_params().shape == (0,)


@pytest.mark.parametrize(
    ("layer", "spec", "line"),
    [
        ("engine", "load_awre", "policy engine=load_awre: unknown policy; did you mean load_aware?"),
        ("request", "lmetric", "policy request=lmetric: unknown policy; known: chunked, edf, ewsjf, "),
        (
            "engine",
            "load_aware,theta_k=3",
            "policy engine=load_aware: theta_k: got 3; allowed: less than or equal to 1",
        ),
        ("engine", "load_aware,thetak=1", "policy engine=load_aware: thetak: unknown key; did you mean theta_k"),
        ("request", "spf_aging,gamma=nan", "policy request=spf_aging: gamma: got nan; allowed: a finite number"),
        ("request", "spf_aging,gamma=x", "policy request=spf_aging: gamma: got 'x'; allowed: a valid number"),
        ("engine", "lmetric,alpha=2", "policy engine=lmetric: alpha: unknown key"),
    ],
)
def test_bad_specs_are_one_line(layer, spec, line) -> None:
    with pytest.raises(InputError) as caught:
        registry.create(layer, spec)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_registering() -> None:
    assert registry.register("engine", "constant", source="a book")(Constant) is Constant
    assert isinstance(registry.create("engine", "constant"), Constant)
    row = next(row for row in registry.describe("engine") if row["name"] == "constant")
    assert row == {
        "name": "constant",
        "explanation": "Every engine is as good as any other.",
        "formula": "More words.",
        "parameters": [],
        "source": "a book",
        "compiled": False,
    }


def test_a_name_is_taken_once_per_layer() -> None:
    registry.register("request", "lmetric")(Constant)
    with pytest.raises(
        ValueError, match=r"engine policy 'lmetric' is already registered by servegym\.baselines\..*LMetric"
    ):
        registry.register("engine", "lmetric")(Constant)


def test_a_class_without_the_layers_method_is_refused() -> None:
    with pytest.raises(TypeError, match="has no method place, which every expert policy needs"):
        registry.register("expert", "constant")(Constant)


def test_loaders_come_after_registered_names(tmp_path) -> None:
    (tmp_path / "policy.json").write_text("{}")
    seen = []
    registry.register_loader(
        lambda name: name == "lmetric" or (Path(name) / "policy.json").is_file(),
        lambda layer, spec: seen.append((layer, spec)) or Constant(),
    )
    assert isinstance(registry.create("engine", f"{tmp_path},temperature=0"), Constant)
    assert not isinstance(registry.create("engine", "lmetric"), Constant)
    assert seen == [("engine", registry.PolicySpec(name=str(tmp_path), params={"temperature": 0}))]


def install_plugin(folder: Path, monkeypatch, code: str, entry_points: str) -> None:
    """Lay out what pip would: a module and the metadata with its entry points."""
    metadata = folder / "acme_policies-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-policies\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[servegym.policies]\n{entry_points}\n")
    (folder / f"{folder.name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    registry._plugins.cache_clear()


GOOD_PLUGIN = '''
class Last:
    """The last engine."""

    def score(self, request, engines):
        return [-i for i in range(len(engines))]

class Placeless:
    pass
'''


def test_a_plugin_is_imported_when_used(tmp_path, monkeypatch) -> None:
    module = tmp_path.name
    install_plugin(tmp_path, monkeypatch, GOOD_PLUGIN, f"engine.last = {module}:Last")
    assert "last" in registry.names("engine")
    assert "last" not in registry.names("request")
    assert module not in sys.modules
    assert type(registry.create("engine", "last")).__name__ == "Last"
    row = next(row for row in registry.describe("engine") if row["name"] == "last")
    assert (row["explanation"], row["source"]) == ("The last engine.", "plugin acme-policies")


def test_a_plugin_may_register_itself(tmp_path, monkeypatch) -> None:
    code = "from servegym.baselines.registry import register\n" + GOOD_PLUGIN.replace(
        "class Last", "@register('engine', 'last', source='acme')\nclass Last"
    )
    install_plugin(tmp_path, monkeypatch, code, f"engine.last = {tmp_path.name}:Last")
    assert next(row for row in registry.describe("engine") if row["name"] == "last")["source"] == "acme"


@pytest.mark.parametrize(
    ("code", "target", "reason"),
    [
        ("import no_such_library", "Last", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise RuntimeError('two\\nlines')", "Last", "RuntimeError: two lines"),
        (GOOD_PLUGIN, "First", "AttributeError: "),
        (GOOD_PLUGIN, "Placeless", "TypeError: class Placeless has no method score"),
    ],
)
def test_a_broken_plugin_costs_one_warning(tmp_path, monkeypatch, caplog, code, target, reason) -> None:
    install_plugin(tmp_path, monkeypatch, code, f"engine.last = {tmp_path.name}:{target}")
    with caplog.at_level(logging.WARNING):
        assert "last" not in [row["name"] for row in registry.describe("engine")]
        assert isinstance(registry.create("engine", "lmetric"), EnginePolicy)
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0]
    assert "\n" not in caplog.messages[0]
    with pytest.raises(InputError, match=r"^policy engine=last: the plugin cannot be loaded: ") as caught:
        registry.create("engine", "last")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "problem"), [("engine.lmetric", "the name is taken"), ("motor.last", "its name is not LAYER.NAME")]
)
def test_an_unusable_entry_point_is_ignored_with_a_warning(tmp_path, monkeypatch, caplog, name, problem) -> None:
    install_plugin(tmp_path, monkeypatch, GOOD_PLUGIN, f"{name} = {tmp_path.name}:Last")
    assert type(registry.create("engine", "lmetric")).__name__ == "LMetric"
    assert [message.rpartition(": ")[2] for message in caplog.messages] == [problem]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def test_importing_the_registry_is_light() -> None:
    code = (
        "import sys; import servegym.baselines.registry as r; r.create('engine', 'lmetric'); r.describe('expert'); "
        "print([m for m in ('torch', 'simpy', 'stable_baselines3') if m in sys.modules])"
    )
    assert run_python(code).stdout.strip() == "[]"


def test_registering_before_anything_was_looked_up_still_finds_the_name_taken() -> None:
    code = (
        "from servegym.baselines.registry import register\n"
        "register('engine', 'lmetric')(type('A', (), {'score': print}))"
    )
    assert "engine policy 'lmetric' is already registered" in run_python(code).stderr
