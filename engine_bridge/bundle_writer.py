"""Writing policy bundles; :mod:`servegym.engine_bridge.bundle` reads them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from servegym.baselines.features import Float32Array
from servegym.engine_bridge.bundle_card import model_card
from servegym.engine_bridge.decisions import Decisions
from servegym.engine_bridge.golden import draw_decision, golden_pair
from servegym.engine_bridge.manifest import CARD, GOLDEN_PAIRS, MANIFEST, WEIGHTS, Manifest, Provenance, Widths

ReferenceLogits = Callable[[Float32Array, Float32Array, npt.NDArray[np.bool_]], Float32Array]


def write_bundle(
    folder: str | Path,
    decisions: Decisions,
    weights: Mapping[str, Float32Array],
    reference: ReferenceLogits,
    training: Provenance,
    packages: Mapping[str, str],
    budget_share: float | None = None,
) -> None:
    """Write a bundle; an older one in its place is replaced as a whole.

    Args:
        folder: where the bundle is to stand.
        decisions: what the policy decides.
        weights: float32 arrays with the names and shapes of :func:`weight_shapes`.
        reference: the trained network itself, (item features, context features, eligible) -> logits; its answers
            become the golden pairs.
        training: where the weights come from.
        packages: versions to record.
        budget_share: of an engine's token budget, for a request policy that sets one.
    """
    blob = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in weights.items()})
    hidden = len(weights["encoder.item.weight"])
    golden = []
    rng = np.random.default_rng(np.random.SeedSequence(0))
    for _ in range(GOLDEN_PAIRS):
        row, matrix = draw_decision(decisions, rng)
        logits = reference(*decisions.features(row, matrix), decisions.eligible(matrix))
        golden.append(golden_pair(decisions, row, matrix, logits))
    manifest = Manifest(
        schema_version=2,
        layer=decisions.layer,
        architecture=decisions.architecture,
        widths=Widths(item_features=len(decisions.items), context_features=len(decisions.context), hidden=hidden),
        item_features=decisions.item_names,
        context_features=decisions.context_names,
        action=decisions.action,
        mask=decisions.mask,
        budget_share=budget_share,
        normalisation=None,
        training=training,
        packages=dict(packages),
        weights_sha256=hashlib.sha256(blob).hexdigest(),
        golden=tuple(golden),
    )
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        (fresh / WEIGHTS).write_bytes(blob)
        (fresh / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        (fresh / CARD).write_text(model_card(manifest), encoding="utf-8")
        fresh.chmod(0o755)
        _put_in_place(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _put_in_place(fresh: Path, target: Path) -> None:
    """Rename a finished folder to its place. A reader sees the old bundle, the new one, or for an instant none."""
    old = fresh.with_name(fresh.name + ".old")
    if target.exists():
        os.replace(target, old)
    os.replace(fresh, target)
    shutil.rmtree(old, ignore_errors=True)
