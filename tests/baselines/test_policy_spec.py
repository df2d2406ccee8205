"""Specs from strings, options and configs."""

from __future__ import annotations

import pytest

from servegym.baselines.policy_spec import PolicySpec, parse_policy_option
from servegym.configuration import Config, validate
from servegym.errors import InputError


@pytest.mark.parametrize(
    ("text", "name", "params"),
    [
        ("lmetric", "lmetric", {}),
        (" spf_aging , gamma = 100 , x = 1e-3 ", "spf_aging", {"gamma": 100, "x": 0.001}),
        ("my.module:Cls,a=true,b=None,c=word", "my.module:Cls", {"a": True, "b": None, "c": "word"}),
        ("runs/a=b/policy", "runs/a=b/policy", {}),
    ],
)
def test_parse(text, name, params) -> None:
    spec = PolicySpec.parse(text)
    assert (spec.name, spec.params) == (name, params)
    assert PolicySpec.parse(str(spec)) == spec


@pytest.mark.parametrize("text", ["", " ,gamma=1", "x,gamma", "x,=1", "x,a=1,a=2", "x,"])
def test_bad_text_is_one_line(text) -> None:
    with pytest.raises(InputError) as caught:
        PolicySpec.parse(text)
    assert str(caught.value) == f"policy: got {text!r}; allowed: NAME or NAME,key=value,..., each key once"


def test_option() -> None:
    assert parse_policy_option("engine=lmetric") == ("engine", PolicySpec(name="lmetric"))
    assert parse_policy_option("request=spf_aging,gamma=5")[1].params == {"gamma": 5}


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("lmetric", "--policy: lmetric: allowed: LAYER=NAME or LAYER=NAME,key=value, such as engine=lmetric"),
        ("engin=lmetric", "--policy: engin: unknown layer; allowed: request, engine, expert"),
        ("engine=", "--policy: got ''; allowed: NAME or NAME,key=value,..., each key once"),
    ],
)
def test_bad_option_is_one_line(option, line) -> None:
    with pytest.raises(InputError) as caught:
        parse_policy_option(option)
    assert str(caught.value) == line


class Section(Config):
    engine: PolicySpec


def test_a_config_may_write_a_string_or_a_mapping() -> None:
    plain = validate(Section, {"engine": "load_aware,theta_k=0.8"}, "a.yaml")
    mapping = validate(Section, {"engine": {"name": "load_aware", "params": {"theta_k": 0.8}}}, "a.yaml")
    assert plain == mapping


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("x,y", "a.yaml: engine: got 'x,y'; allowed: NAME or NAME,key=value,..., each key once"),
        ({"name": "x", "parms": {}}, "a.yaml: engine.parms: unknown key; did you mean params?"),
        ({"params": {}}, "a.yaml: engine.name: missing; this field is required"),
    ],
)
def test_errors_in_a_config_name_file_and_field(value, line) -> None:
    with pytest.raises(InputError) as caught:
        validate(Section, {"engine": value}, "a.yaml")
    assert str(caught.value) == line
