"""The model card of a policy bundle."""

from __future__ import annotations

from servegym.engine_bridge.manifest import Manifest


def model_card(manifest: Manifest) -> str:
    """Return the card as Markdown."""
    training = manifest.training
    results = "\n".join(f"| {name} | {value:.6g} |" for name, value in training.evaluation.items())
    packages = ", ".join(f"{name} {version}" for name, version in manifest.packages.items())
    widths = manifest.widths
    return f"""# Dispatch policy `{training.run}`

Decides which engine of a cluster gets an arriving request. It scores every engine with the same weights, so that it
serves any number of them, and needs numpy only.

    servegym evaluate ... --policy engine=PATH_OF_THIS_FOLDER

```python
from servegym.engine_bridge.bundle import load_bundle
policy = load_bundle("PATH_OF_THIS_FOLDER")
scores = policy.score(request, engines)   # lower is better, infinity = not allowed
```

| | |
|---|---|
| level | {manifest.layer} |
| architecture | {manifest.architecture} |
| inputs | {widths.engine_features} engine features, {widths.request_features} request features |
| hidden units | {widths.hidden} |
| trained in | {training.environment}, {training.steps:,} decisions, seed {training.seed} |
| training config | sha256 `{training.config_sha256}` |
| weights | sha256 `{manifest.weights_sha256}` |
| versions | {packages} |

## Evaluation during training

Means over held-out seeds; `_ratio` is relative to the reference heuristic on the same requests.

| metric | value |
|---|---|
{results or "| none | |"}

## Inputs

Engine features: {", ".join(manifest.engine_features)}.

Request features: {", ".join(manifest.request_features)}.

The features have fixed scales (`servegym.baselines.features`). A loader refuses the bundle where it computes other
features or does not reproduce the {len(manifest.golden)} golden decisions in `policy.json`.
"""
