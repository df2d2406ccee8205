"""Policies by name: built-in, third-party, or a class in the user's own file.

A name is looked up, in this order, among

1. the registered policies: the built-in ones and those that called :func:`register`;
2. plugins: entry points of the group ``servegym.policies``. The name of the entry point is ``layer.name``, its object
   the policy class; it is imported when the policy is first used. In the plugin's ``pyproject.toml``::

       [project.entry-points."servegym.policies"]
       "engine.my_policy" = "my_package.dispatch:MyPolicy"

3. loaders that another part of servegym added by :func:`register_loader` (policy bundles);
4. ``module:Class`` or ``path/to/file.py:Class``: the user's own class, without registration. A method ``score`` (or
   ``place`` at the expert level) is all that it needs. Parameters go to its pydantic model ``Params`` if it has one,
   else to its constructor by keyword.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar, overload

from servegym.baselines.interface import EnginePolicy, ExpertPolicy, PolicyHooks, RequestPolicy
from servegym.baselines.policy_spec import LAYERS, Layer, PolicySpec, parse_policy_option
from servegym.baselines.user_code import defined_at, load_class, user_errors
from servegym.configuration import validate
from servegym.errors import InputError, nearest

__all__ = [
    "LAYERS",
    "Layer",
    "PolicySpec",
    "create",
    "describe",
    "names",
    "parse_policy_option",
    "policy_class",
    "register",
    "register_loader",
]

ENTRY_POINT_GROUP = "servegym.policies"
PolicyT = TypeVar("PolicyT", bound=type[Any])
Loader = Callable[[Layer, PolicySpec], Any]
_METHOD: dict[Layer, str] = {"request": "score", "engine": "score", "expert": "place"}
_PROTOCOL: dict[Layer, type[Any]] = {"request": RequestPolicy, "engine": EnginePolicy, "expert": ExpertPolicy}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    policy: type[Any]
    source: str


_entries: dict[tuple[Layer, str], _Entry] = {}
_loaders: list[tuple[Callable[[str], bool], Loader]] = []


def register(layer: Layer, name: str, source: str = "") -> Callable[[PolicyT], PolicyT]:
    """Class decorator that makes a policy available under a name.

    Args:
        layer: ``request``, ``engine`` or ``expert``.
        name: the name in configs and on the command line.
        source: where the rule was published.

    Raises:
        ValueError: the name is taken.
        TypeError: the class has no method ``score`` (``place`` at the expert level).
    """
    _load_builtin()

    def decorate(policy: PolicyT) -> PolicyT:
        if (layer, name) in _entries:
            taken = _entries[layer, name].policy
            raise ValueError(
                f"{layer} policy {name!r} is already registered by {taken.__module__}.{taken.__qualname__}"
            )
        if problem := _unfit(layer, policy):
            raise TypeError(problem)
        _entries[layer, name] = _Entry(policy, source)
        return policy

    return decorate


def register_loader(accepts: Callable[[str], bool], load: Loader) -> None:
    """Add another way to obtain a policy from a name that nobody registered, such as the path of a policy bundle.

    Args:
        accepts: says whether a name is this loader's.
        load: returns the policy for a layer and a spec; raises :class:`InputError` if it cannot.
    """
    _loaders.append((accepts, load))


def names(layer: Layer) -> list[str]:
    """Return the registered names of a layer, sorted; plugins are listed without being imported."""
    _load_builtin()
    return sorted({known for of, known in (*_entries, *_plugins()) if of == layer})


@overload
def create(layer: Literal["request"], spec: PolicySpec | str) -> RequestPolicy: ...
@overload
def create(layer: Literal["engine"], spec: PolicySpec | str) -> EnginePolicy: ...
@overload
def create(layer: Literal["expert"], spec: PolicySpec | str) -> ExpertPolicy: ...
@overload
def create(layer: Layer, spec: PolicySpec | str) -> Any: ...
def create(layer: Layer, spec: PolicySpec | str) -> Any:
    """Make a policy.

    Args:
        layer: ``request``, ``engine`` or ``expert``.
        spec: a spec, or its string form ``NAME`` or ``NAME,key=value``.

    Raises:
        InputError: unknown name (with the nearest ones), a class that cannot be imported or made, or wrong parameters.

    >>> create("request", "spf_aging,gamma=-1")
    Traceback (most recent call last):
    servegym.errors.InputError: policy request=spf_aging: gamma: got -1; allowed: greater than or equal to 0
    """
    spec = PolicySpec.parse(spec) if isinstance(spec, str) else spec
    if spec.name not in names(layer):
        for accepts, load in _loaders:
            if accepts(spec.name):
                return load(layer, spec)
    policy = policy_class(layer, spec.name)
    source = f"policy {layer}={spec.name}"
    model = getattr(policy, "Params", None)
    if model is not None:
        with user_errors():
            return policy(validate(model, spec.params, source))
    try:
        inspect.signature(policy).bind(**spec.params)
    except TypeError as error:
        raise InputError(source, "", f"{error}; allowed: {inspect.signature(policy)}") from None
    with user_errors():
        return policy(**spec.params)


@overload
def create_live(layer: Literal["request"], spec: PolicySpec | str, seed: int = 0) -> RequestPolicy: ...
@overload
def create_live(layer: Literal["engine"], spec: PolicySpec | str, seed: int = 0) -> EnginePolicy: ...
@overload
def create_live(layer: Literal["expert"], spec: PolicySpec | str, seed: int = 0) -> ExpertPolicy: ...
def create_live(layer: Layer, spec: PolicySpec | str, seed: int = 0) -> Any:
    """Make a policy for live engines, ready to decide.

    Raises:
        InputError: as :func:`create`, or the policy needs what only a simulator can grant.
    """
    policy = create(layer, spec)
    if getattr(policy, "needs_oracle", False):
        need = "the future" if layer == "expert" else "true output lengths"
        raise InputError(f"policy {layer}={spec}", "", f"needs {need}, which live engines do not know")
    reset = getattr(policy, "reset", None)
    if reset is not None:
        reset(seed)
    return policy


def policy_class(layer: Layer, name: str) -> type[Any]:
    """Return the class of a registered name, a plugin, ``module:Class`` or ``file.py:Class``.

    Raises:
        InputError: unknown, not importable, or without the method that the layer asks for.
    """
    _load_builtin()
    source = f"policy {layer}={name}"
    if (layer, name) not in _entries and (layer, name) in _plugins():
        try:
            _load_plugin(layer, name)
        except Exception as error:
            raise InputError(source, "", _broken(error)) from error
    if (layer, name) in _entries:
        registered: type[Any] = _entries[layer, name].policy
        return registered
    if ":" not in name:
        raise InputError(source, "", f"unknown policy; {nearest(name, names(layer))}")
    policy: type[Any] = load_class(name, source)
    if problem := _unfit(layer, policy) or _wrong_arguments(layer, policy):
        raise InputError(source, "", problem)
    return policy


def describe(layer: Layer) -> list[dict[str, Any]]:
    """Return one mapping per policy of a layer, as ``servegym list`` prints it.

    Keys: ``name``, ``explanation`` (first line of the docstring), ``formula`` (the rest of it), ``parameters`` (each
    with ``name``, ``default``, ``meaning``), ``source`` and ``compiled`` (whether the simulator can run it inside its
    kernel). A plugin that cannot be imported is left out with a warning.
    """
    rows = []
    for name in names(layer):
        try:
            if (layer, name) not in _entries:
                _load_plugin(layer, name)
        except Exception as error:
            _logger.warning("policy %s=%s left out: %s", layer, name, _broken(error))
            continue
        entry = _entries[layer, name]
        explanation, _, formula = (inspect.getdoc(entry.policy) or "").partition("\n")
        rows.append(
            {
                "name": name,
                "explanation": explanation,
                "formula": formula.strip(),
                "parameters": _parameters(entry.policy),
                "source": entry.source,
                "compiled": hasattr(entry.policy, "compiled"),
            }
        )
    return rows


def _parameters(policy: type[Any]) -> list[dict[str, Any]]:
    model = getattr(policy, "Params", None)
    fields = model.model_fields if model is not None else {}
    return [
        {"name": key, "default": None if info.is_required() else info.get_default(), "meaning": info.description or ""}
        for key, info in fields.items()
    ]


def _unfit(layer: Layer, policy: Any) -> str:
    """Say why ``policy`` cannot serve the layer; empty if it can."""
    if not isinstance(policy, type):
        return f"{policy!r} is not a class"
    if not callable(getattr(policy, _METHOD[layer], None)):
        return f"class {policy.__qualname__} has no method {_METHOD[layer]}, which every {layer} policy needs"
    return ""


def _wrong_arguments(layer: Layer, policy: type[Any]) -> str:
    """Say which method cannot be called as it will be; empty if all can."""
    methods = {_METHOD[layer]: getattr(_PROTOCOL[layer], _METHOD[layer])}
    methods |= {name: function for name, function in vars(PolicyHooks).items() if not name.startswith("_")}
    for name, function in methods.items():
        own = getattr(policy, name, None)
        called_with = list(inspect.signature(function).parameters)
        if isinstance(inspect.getattr_static(policy, name, None), staticmethod | classmethod):
            called_with = called_with[1:]
        try:
            if callable(own):
                inspect.signature(own).bind(*called_with)
        except ValueError:  # a builtin without a signature
            continue
        except TypeError as error:
            wanted = ", ".join(called_with)
            return f"{defined_at(own)}: {policy.__qualname__}.{name}: {error}; allowed: {name}({wanted})"
    return ""


@cache
def _load_builtin() -> None:
    """Import the built-in policies, which register themselves."""
    for layer in LAYERS:
        import_module(f"servegym.baselines.{layer}")


@cache
def _plugins() -> dict[tuple[Layer, str], EntryPoint]:
    """Find the plugins' entry points; those that cannot be used are named in one warning each."""
    found: dict[tuple[Layer, str], EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        prefix, _, name = point.name.partition(".")
        layer = next((known for known in LAYERS if known == prefix), None)
        if layer is None or not name:
            _logger.warning("plugin %s = %s ignored: its name is not LAYER.NAME", point.name, point.value)
        elif (layer, name) in _entries or (layer, name) in found:
            _logger.warning("plugin %s = %s ignored: the name is taken", point.name, point.value)
        else:
            found[layer, name] = point
    return found


def _load_plugin(layer: Layer, name: str) -> None:
    point = _plugins()[layer, name]
    policy = point.load()  # may call `register` itself
    if (layer, name) not in _entries:
        if problem := _unfit(layer, policy):
            raise TypeError(problem)
        _entries[layer, name] = _Entry(policy, f"plugin {point.dist.name if point.dist else point.value}")


def _broken(error: Exception) -> str:
    return f"the plugin cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"
