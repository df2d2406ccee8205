"""The model card of a policy bundle."""

from __future__ import annotations

from servegym.engine_bridge.manifest import Manifest

_TEXTS = {
    "engine": (
        "Dispatch",
        "Decides which engine of a cluster gets an arriving request. It scores every engine",
        "servegym evaluate quick --policy learned=PATH_OF_THIS_FOLDER",
        "scores = policy.score(request, engines)  # lower is better",
    ),
    "request": (
        "Admission",
        "Decides in which order an engine admits its waiting requests. It scores every request",
        "servegym cluster order NAME PATH_OF_THIS_FOLDER",
        "scores = policy.score(queue)  # lower is better",
    ),
    "expert": (
        "Placement",
        "Decides which expert-parallel rank holds which expert: it sets the weights of a search. It sets each of them",
        "servegym simulate drift --policy expert=PATH_OF_THIS_FOLDER",
        "wanted = policy.place(load, current)  # None: keep the current placement",
    ),
}


def model_card(manifest: Manifest) -> str:
    """Return the card as Markdown."""
    training = manifest.training
    results = "\n".join(f"| {name} | {value:.6g} |" for name, value in training.evaluation.items())
    packages = ", ".join(f"{name} {version}" for name, version in manifest.packages.items())
    widths = manifest.widths
    title, does, use, call = _TEXTS[manifest.layer]
    share = manifest.budget_share
    budget = "" if share is None else f"| token budget of a step | {share:.3g} of the engine's |\n"
    return f"""# {title} policy `{training.run}`

{does} with the same weights, so that it serves any number of them, and needs
numpy only.

    {use}

```python
from servegym.engine_bridge.bundle import load_bundle

policy = load_bundle("PATH_OF_THIS_FOLDER")
{call}
```

| | |
|---|---|
| level | {manifest.layer} |
| architecture | {manifest.architecture} |
| inputs | {widths.item_features} of a candidate, {widths.context_features} of the context |
| hidden units | {widths.hidden} |
{budget}| trained in | {training.environment}, {training.steps:,} decisions, seed {training.seed} |
| training config | sha256 `{training.config_sha256}` |
| weights | sha256 `{manifest.weights_sha256}` |
| versions | {packages} |

## Evaluation during training

Means over held-out seeds; `_ratio` is relative to the reference heuristic on the same requests.

| metric | value |
|---|---|
{results or "| none | |"}

## Inputs

Of a candidate: {", ".join(manifest.item_features)}.

Of the context: {", ".join(manifest.context_features)}.

The features have fixed scales (`servegym.engine_bridge.decisions`). A loader refuses the bundle where it lacks one of
them or does not reproduce the {len(manifest.golden)} golden decisions in `policy.json`.
"""
