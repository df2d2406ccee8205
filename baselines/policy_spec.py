"""Naming a policy: the layer, the name and the parameters, from a config, a string or a command-line option."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from servegym.configuration import Config, explain
from servegym.errors import InputError

Layer = Literal["request", "engine", "expert"]
LAYERS: tuple[Layer, ...] = get_args(Layer)


class PolicySpec(Config):
    """Which policy, with which parameters; a config may write a plain string in its place.

    >>> PolicySpec.parse("spf_aging,gamma=50")
    PolicySpec(name='spf_aging', params={'gamma': 50})
    >>> str(PolicySpec(name="spf_aging", params={"gamma": 50}))
    'spf_aging,gamma=50'
    """

    name: str = Field(min_length=1, description="registered name, module:Class, file.py:Class, or a policy bundle")
    params: dict[str, Any] = Field(
        default_factory=dict, description="parameters by name; the others keep their defaults"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return _split(value) if isinstance(value, str) else value

    @classmethod
    def parse(cls, text: str, source: str = "policy") -> PolicySpec:
        """Read ``NAME`` or ``NAME,key=value,key=value``.

        Args:
            text: what to read.
            source: where it comes from, for errors.

        Raises:
            InputError: no name, a part that is not ``key=value``, or a key twice.
        """
        try:
            return cls.model_validate(text)
        except ValidationError as error:
            raise explain(error, cls, source) from None

    def located(self) -> PolicySpec:
        """Return the same policy for processes with another working directory: paths of files become absolute."""
        file, colon, attribute = self.name.partition(".py:")
        path = Path(f"{file}.py") if colon else Path(self.name)
        if not path.exists():
            return self
        return self.model_copy(update={"name": f"{path.resolve()}{f':{attribute}' if colon else ''}"})

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{key}={value}" for key, value in self.params.items())])


def parse_layer(text: str, source: str = "--policy") -> Layer:
    """Return ``text`` as a layer; an error names the source.

    Raises:
        InputError: not one of ``request``, ``engine``, ``expert``.
    """
    for layer in LAYERS:
        if text == layer:
            return layer
    raise InputError(source, text, f"unknown layer; allowed: {', '.join(LAYERS)}")


def parse_policy_option(option: str, source: str = "--policy") -> tuple[Layer, PolicySpec]:
    """Read the value of ``--policy``: ``LAYER=NAME`` or ``LAYER=NAME,key=value``.

    Args:
        option: the value.
        source: the option's name, for errors.

    Raises:
        InputError: no ``=``, an unknown layer, no name, a part that is not ``key=value``, or a key twice.

    >>> parse_policy_option("engine=session_sticky,max_gap=8")
    ('engine', PolicySpec(name='session_sticky', params={'max_gap': 8}))
    """
    layer, equals, text = option.partition("=")
    if not equals:
        raise InputError(source, option, "allowed: LAYER=NAME or LAYER=NAME,key=value, such as engine=lmetric")
    return parse_layer(layer.strip(), source), PolicySpec.parse(text, source)


def _split(text: str) -> dict[str, Any]:
    name, *assignments = (part.strip() for part in text.split(","))
    pairs = [tuple(part.strip() for part in assignment.partition("=")) for assignment in assignments]
    params = {key: _scalar(value) for key, equals, value in pairs if key and equals}
    if not name or len(params) < len(pairs):
        raise ValueError("NAME or NAME,key=value,..., each key once")
    return {"name": name, "params": params}


def _scalar(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), text)
