"""Policy bundles: a learned policy as a folder of plain files, and its way back to a policy.

::

    policy.json          what the policy is (servegym.engine_bridge.manifest), with golden decisions
    policy.safetensors   the weights
    README.md            the same for people

Nothing is pickled and nothing needs torch. Importing this module lets a bundle stand wherever a policy is named:
``--policy engine=runs/dispatch_ppo/latest`` (a run folder, a bundle folder or its ``policy.json``), or
``--policy engine=servegym/dispatch``, a shipped one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from servegym.baselines.features import Float32Array
from servegym.baselines.policy_spec import Layer, PolicySpec
from servegym.baselines.registry import register_loader
from servegym.configuration import validate
from servegym.engine_bridge.bundle_policy import (
    BundlePolicy,
    EngineBundlePolicy,
    ExpertBundlePolicy,
    RequestBundlePolicy,
)
from servegym.engine_bridge.decisions import DECISIONS
from servegym.engine_bridge.manifest import MANIFEST, WEIGHTS, Manifest
from servegym.engine_bridge.set_scorer import SetScorer, weight_shapes
from servegym.engine_bridge.shipped import resolved
from servegym.errors import InputError, nearest

TOLERANCE = 1e-4  # of golden logits: another CPU's float32 rounding passes, another feature or formula does not


_POLICIES = {"engine": EngineBundlePolicy, "request": RequestBundlePolicy, "expert": ExpertBundlePolicy}


def load_bundle(path: str | Path) -> BundlePolicy:
    """Read a bundle, check everything, and return its policy.

    Args:
        path: a bundle folder, its ``policy.json``, a run folder, whose best policy is taken, or the name of a shipped
            bundle, such as ``servegym/dispatch``.

    Raises:
        InputError: a missing file, an unknown schema, features that this version does not compute, weights that are
            damaged, not finite or of the wrong shape, or golden decisions that this machine does not reproduce.
    """
    folder = _bundle_folder(path)
    manifest = _read_manifest(folder / MANIFEST)
    scorer = SetScorer(_read_weights(folder / WEIGHTS, manifest))
    policy = _POLICIES[manifest.layer](scorer, manifest, folder)
    _replay(policy, folder / MANIFEST)
    return policy


def bundle_files(path: str | Path) -> list[Path]:
    """Return the files that a bundle's policy is made of.

    Args:
        path: as of :func:`load_bundle`.

    Raises:
        InputError: no such bundle.
    """
    folder = _bundle_folder(path)
    return [folder / name for name in (MANIFEST, WEIGHTS) if (folder / name).is_file()]


def _bundle_folder(name: str | Path) -> Path:
    path = resolved(name)
    folder = path.parent if path.name == MANIFEST else path
    if not (folder / MANIFEST).exists() and (folder / "policy" / MANIFEST).exists():
        return folder / "policy"
    if not folder.is_dir():
        raise InputError(str(path), "", "no such policy bundle; train one: servegym train dispatch_ppo")
    return folder


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(str(path), "", "missing; a policy bundle has it") from None
    except (OSError, ValueError) as error:
        raise InputError(str(path), "", f"not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(str(path), "", f"top level is {type(content).__name__}; allowed: an object")
    manifest = validate(Manifest, content, str(path))
    every, widths = DECISIONS[manifest.layer], manifest.widths
    _check_features(path, "item_features", manifest.item_features, every.item_names)
    _check_features(path, "context_features", manifest.context_features, every.context_names)
    decisions = manifest.decisions
    if (widths.item_features, widths.context_features) != (len(decisions.items), len(decisions.context)):
        raise InputError(str(path), "widths", "do not match the number of features")
    for field in ("architecture", "action", "mask"):
        if getattr(manifest, field) != getattr(decisions, field):
            raise InputError(
                str(path), field, f"got {getattr(manifest, field)!r}; allowed: {getattr(decisions, field)!r}"
            )
    return manifest


def _check_features(path: Path, field: str, found: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Refuse features that this version does not compute; those that a bundle lacks came after it."""
    for index, name in enumerate(found):
        if name not in known:
            raise InputError(
                str(path), f"{field}.{index}", f"{name!r} is not computed by this version; {nearest(name, known)}"
            )
        if name in found[:index]:
            raise InputError(str(path), f"{field}.{index}", f"{name!r} a second time; allowed: each once")


def _read_weights(path: Path, manifest: Manifest) -> dict[str, Float32Array]:
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise InputError(str(path), "", f"cannot be read: {error.strerror}") from None
    if hashlib.sha256(blob).hexdigest() != manifest.weights_sha256:
        raise InputError(str(path), "", f"damaged or replaced: its sha256 is not the one in {MANIFEST}")
    try:
        weights = safetensors.numpy.load(blob)
    except SafetensorError as error:
        raise InputError(str(path), "", f"not a safetensors file: {error}") from None
    widths = manifest.widths
    shapes = weight_shapes(
        widths.item_features, widths.context_features, widths.hidden, pooled=manifest.decisions.pooled
    )
    if set(weights) != set(shapes):
        odd = sorted(set(weights) ^ set(shapes))[0]
        raise InputError(str(path), odd, "missing" if odd in shapes else "unknown weight")
    for name, shape in shapes.items():
        array = weights[name]
        if array.shape != shape or array.dtype != np.float32:
            raise InputError(str(path), name, f"got {array.dtype} {array.shape}; allowed: float32 {shape}")
        if not np.isfinite(array).all():
            raise InputError(str(path), name, "has values that are not finite")
    return weights


def _replay(policy: BundlePolicy, source: Path) -> None:
    """Refuse to serve where the golden decisions come out differently."""
    decisions = policy.manifest.decisions
    for index, pair in enumerate(policy.manifest.golden):
        field = f"golden.{index}"
        row, matrix = pair.views(decisions)
        if matrix.shape != (len(pair.logits), len(matrix.T)):
            raise InputError(str(source), field, "columns of different length")
        expected = np.array([np.nan if logit is None else logit for logit in pair.logits])
        got = policy.logits(row, matrix)
        eligible = decisions.eligible(matrix)
        if (np.isnan(expected) == eligible).any():
            raise InputError(str(source), field, "logits are null exactly at candidates that may not be chosen")
        if not np.allclose(got[eligible], expected[eligible], rtol=TOLERANCE, atol=TOLERANCE):
            worst = float(np.abs(got - expected)[eligible].max())
            raise InputError(str(source), field, f"this machine's logits differ by {worst:.3g}; allowed: {TOLERANCE:g}")


def _looks_like_bundle(name: str) -> bool:
    path = Path(name)
    return path.is_dir() or path.name == MANIFEST or (len(path.parts) > 1 and ":" not in name)


def _from_registry(layer: Layer, spec: PolicySpec) -> BundlePolicy:
    source = f"policy {layer}={spec.name}"
    if spec.params:
        raise InputError(source, next(iter(spec.params)), "a policy bundle takes no parameters")
    policy = load_bundle(spec.name)
    if policy.manifest.layer != layer:
        raise InputError(source, "", f"the bundle is a policy of the {policy.manifest.layer} level")
    return policy


register_loader(_looks_like_bundle, _from_registry)
