"""Bundles: written whole, read with suspicion, named like any policy."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from servegym.baselines import registry
from servegym.baselines.features import ENGINE_FEATURES
from servegym.baselines.interface import EnginePolicy, RequestPolicy
from servegym.engine_bridge import bundle_writer
from servegym.engine_bridge.bundle import load_bundle
from servegym.engine_bridge.decisions import ADMISSION, DECISIONS, DISPATCH
from servegym.errors import InputError


def edit(folder: Path, change) -> None:
    """Apply a change to policy.json."""
    path = folder / "policy.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_weights(folder: Path, change) -> None:
    """Apply a change to the weights and let the manifest agree with the new file."""
    path = folder / "policy.safetensors"
    weights = {name: array.copy() for name, array in safetensors.numpy.load_file(path).items()}
    change(weights)
    path.write_bytes(safetensors.numpy.save(weights))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(folder, lambda content: content.update(weights_sha256=digest))


def put_nan(weights) -> None:
    weights["hidden.weight"][0, 0] = np.nan


def swap_features(content) -> None:
    names = content["item_features"]
    names[0], names[1] = names[1], names[0]


DAMAGES = {
    "no manifest": (lambda folder: (folder / "policy.json").unlink(), "policy.json: missing"),
    "not JSON": (lambda folder: (folder / "policy.json").write_text("{"), "not readable as JSON"),
    "a list": (lambda folder: (folder / "policy.json").write_text("[]"), "top level is list"),
    "no weights": (lambda folder: (folder / "policy.safetensors").unlink(), "cannot be read: No such file"),
    "other schema": (lambda f: edit(f, lambda c: c.update(schema_version=1)), "schema_version: got 1; allowed: 2"),
    "other layer": (
        lambda f: edit(f, lambda c: c.update(layer="cluster")),
        "layer: got 'cluster'; allowed: 'engine', 'request' or 'expert'",
    ),
    "other level": (
        lambda f: edit(f, lambda c: c.update(layer="request")),
        "item_features.0: 'log_prefill_work' is not computed by this version; did you mean log_prefill",
    ),
    "other formula": (
        lambda f: edit(f, lambda c: c.update(architecture="index_scorer")),
        "architecture: got 'index_scorer'; allowed: 'set_scorer'",
    ),
    "unknown key": (lambda f: edit(f, lambda c: c.update(colour="red")), "colour: unknown key"),
    "missing key": (lambda f: edit(f, lambda c: c.pop("widths")), "widths: missing"),
    "feature order": (lambda f: edit(f, swap_features), "logits differ by"),
    "unknown feature": (
        lambda f: edit(f, lambda c: c["item_features"].append("colour")),
        f"item_features.{len(ENGINE_FEATURES)}: 'colour' is not computed by this version",
    ),
    "feature twice": (
        lambda f: edit(f, lambda c: c["context_features"].append("priority")),
        "context_features.8: 'priority' a second time; allowed: each once",
    ),
    "feature count": (lambda f: edit(f, lambda c: c["context_features"].pop()), "widths: do not match"),
    "widths": (lambda f: edit(f, lambda c: c["widths"].update(item_features=3)), "widths: do not match"),
    "hidden width": (
        lambda f: edit(f, lambda c: c["widths"].update(hidden=8)),
        f"got float32 (32, {len(ENGINE_FEATURES)}); allowed: float32 (8, {len(ENGINE_FEATURES)})",
    ),
    "golden count": (
        lambda f: edit(f, lambda c: c["golden"].pop()),
        "golden: got a list; allowed: Tuple should have at least 16",
    ),
    "golden answer": (lambda f: edit(f, lambda c: c["golden"][3].update(logits=[9.0] * 99)), "golden.3"),
    "flipped bit": (
        lambda f: (f / "policy.safetensors").write_bytes((f / "policy.safetensors").read_bytes()[:-1] + b"\x55"),
        "damaged or replaced",
    ),
    "NaN weights": (lambda f: set_weights(f, put_nan), "hidden.weight: has values that are not finite"),
    "missing weight": (lambda f: set_weights(f, lambda w: w.pop("hidden.bias")), "hidden.bias: missing"),
    "extra weight": (lambda f: set_weights(f, lambda w: w.update(x=w["hidden.bias"])), "x: unknown weight"),
    "wrong type": (
        lambda f: set_weights(f, lambda w: w.update({"hidden.bias": w["hidden.bias"].astype(np.float64)})),
        "hidden.bias: got float64",
    ),
    "other weights": (
        lambda f: set_weights(f, lambda w: w.update({"hidden.bias": w["hidden.bias"] + 1})),
        "logits differ by",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused_in_one_line(damage: str, bundle: Path) -> None:
    change, message = DAMAGES[damage]
    change(bundle)
    with pytest.raises(InputError) as caught:
        load_bundle(bundle)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(bundle))
    assert "\n" not in str(caught.value)


def test_a_changed_feature_is_noticed_by_the_golden_decisions(bundle: Path, monkeypatch) -> None:
    def scaled(request, engines, engine_features, request_features) -> None:
        DISPATCH.fill(request, engines, engine_features, request_features)
        engine_features[:, 3] *= 1.1

    monkeypatch.setitem(DECISIONS, "engine", replace(DISPATCH, fill=scaled))
    with pytest.raises(InputError, match="logits differ by"):
        load_bundle(bundle)


def test_a_request_policy_may_carry_a_token_budget(request_bundle: Path) -> None:
    assert load_bundle(request_bundle).budget_share is None
    edit(request_bundle, lambda content: content.update(budget_share=0.55))
    assert load_bundle(request_bundle).budget_share == 0.55
    edit(request_bundle, lambda content: content.update(budget_share=1.5))
    with pytest.raises(InputError, match=r"budget_share: got 1\.5"):
        load_bundle(request_bundle)


@pytest.mark.parametrize("place", ["run/policy", "run/policy/policy.json", "run"])
def test_the_registry_takes_a_bundle_by_its_path(place: str, bundle: Path) -> None:
    policy = registry.create("engine", str(bundle.parents[1] / place))
    assert isinstance(policy, EnginePolicy)
    assert policy.manifest.training.run == "test"


def test_the_registry_knows_bundles_of_the_request_level(request_bundle: Path) -> None:
    policy = registry.create("request", str(request_bundle))
    assert isinstance(policy, RequestPolicy)
    assert policy.manifest.layer == "request"
    with pytest.raises(InputError, match="the bundle is a policy of the request level"):
        registry.create("engine", str(request_bundle))


def test_the_registry_says_what_is_wrong_with_a_path(bundle: Path) -> None:
    for layer, name, message in (
        ("engine", str(bundle.parent / "nothing"), "no such policy bundle"),
        ("engine", str(bundle.parents[1]), "policy.json: missing"),
        ("engine", f"{bundle},gamma=2", "gamma: a policy bundle takes no parameters"),
        ("request", str(bundle), "the bundle is a policy of the engine level"),
        ("engine", "least_request", "did you mean least_requests"),
    ):
        with pytest.raises(InputError, match=message):
            registry.create(layer, name)


def test_a_new_bundle_replaces_the_old_one_whole(bundle: Path, save_actor) -> None:
    before = (bundle / "policy.safetensors").read_bytes()
    (bundle / "stray").write_text("")
    save_actor(bundle, seed=1, width=16)
    assert (bundle / "policy.safetensors").read_bytes() != before
    assert load_bundle(bundle).manifest.widths.hidden == 16
    assert {path.name for path in bundle.iterdir()} == {"policy.json", "policy.safetensors", "README.md"}
    assert [path.name for path in bundle.parent.iterdir()] == ["policy"]


def test_an_interrupted_write_leaves_the_old_bundle(bundle: Path, save_actor, monkeypatch) -> None:
    def interrupt(manifest) -> str:
        raise KeyboardInterrupt

    before = (bundle / "policy.json").read_bytes()
    monkeypatch.setattr(bundle_writer, "model_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_actor(bundle, seed=1)
    assert (bundle / "policy.json").read_bytes() == before
    assert [path.name for path in bundle.parent.iterdir()] == ["policy"]


def test_the_same_weights_make_the_same_bytes(tmp_path: Path, save_actor) -> None:
    first, second = save_actor(tmp_path / "a"), save_actor(tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_the_card_names_features_and_results(bundle: Path, request_bundle: Path) -> None:
    card = (bundle / "README.md").read_text()
    assert "| ttft_s_ratio | 0.9 |" in card
    assert ", ".join(DISPATCH.item_names) in card
    other = (request_bundle / "README.md").read_text()
    assert other.startswith("# Admission policy")
    assert ", ".join(ADMISSION.item_names) in other
