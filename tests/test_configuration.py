"""Bad configuration is one line that names source, field, value and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from servegym.configuration import Config, apply_overrides, find_config, load_config, load_mapping, validate
from servegym.envs.workloads.workload import WorkloadConfig
from servegym.errors import InputError


class Inner(Config):
    rate_rps: Annotated[float, Field(gt=0)] = 1.0


class Outer(Config):
    name: str
    kind: Literal["a", "b"] = "a"
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"name": "x", "innner": {}}, "f.yaml: innner: unknown key; did you mean inner?"),
        ({"name": "x", "inner": {"rate": 1}}, "f.yaml: inner.rate: unknown key; did you mean rate_rps?"),
        ({}, "f.yaml: name: missing; this field is required"),
        ({"name": 3}, "f.yaml: name: got 3; allowed: a valid string"),
        ({"name": "x", "inner": {"rate_rps": -2.0}}, "f.yaml: inner.rate_rps: got -2.0; allowed: greater than 0"),
        (
            {"name": "x", "inner": {"rate_rps": float("nan")}},
            "f.yaml: inner.rate_rps: got nan; allowed: a finite number",
        ),
        ({"name": "x", "kind": "c"}, "f.yaml: kind: got 'c'; allowed: 'a' or 'b'"),
        ({"name": "x", "many": [{}, {"rate_rps": 0}]}, "f.yaml: many.1.rate_rps: got 0; allowed: greater than 0"),
        ({"name": "x", "inner": [1]}, "f.yaml: inner: got a list; allowed: a mapping"),
    ],
)
def test_violations(content: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        validate(Outer, content, "f.yaml")
    assert str(caught.value) == expected


def test_a_choice_among_kinds_names_the_key_that_chooses() -> None:
    content = {"name": "w", "description": "d", "source": "s", "prompt_tokens": {"kind": "fixed", "value": 5}}
    content |= {"output_tokens": {"kind": "fixed", "value": 5}}
    for arrivals, line in (
        ({"rate": 5}, "f.yaml: arrivals.process: missing; this field is required"),
        ({"process": "poison"}, "f.yaml: arrivals.process: got 'poison'; allowed: 'constant', 'poisson', 'gamma'"),
    ):
        with pytest.raises(InputError) as caught:
            validate(WorkloadConfig, content | {"arrivals": arrivals}, "f.yaml")
        assert str(caught.value).startswith(line)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: 2", encoding="utf-8")
    with pytest.raises(InputError, match=r"broken.yaml:2:2: not valid YAML"):
        load_mapping(broken)
    broken.write_text("- 1", encoding="utf-8")
    with pytest.raises(InputError, match="top level is list"):
        load_mapping(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8 text"):
        load_mapping(broken)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_mapping(tmp_path / "absent.yaml")


def test_shipped_configs_are_found_by_name_and_paths_by_path(tmp_path: Path) -> None:
    assert find_config("cpu-tiny-moe", "profiles").name == "cpu-tiny-moe.yaml"
    with pytest.raises(InputError, match="did you mean cpu-tiny-moe"):
        find_config("cpu-tiny-mo", "profiles")
    with pytest.raises(InputError, match="no such file"):
        find_config(tmp_path / "x.yaml", "profiles")


def test_overrides_are_read_as_yaml_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: x", encoding="utf-8")
    assert load_config(Outer, path, "train", ["inner.rate_rps=2.5"]).inner.rate_rps == 2.5
    with pytest.raises(InputError, match=r"inner\.rate_rps: got 'fast'"):
        load_config(Outer, path, "train", ["inner.rate_rps=fast"])
    with pytest.raises(InputError, match=r"allowed: key\.subkey=value"):
        apply_overrides({}, ["nothing"])
    with pytest.raises(InputError, match="which has no keys of its own"):
        apply_overrides({"a": 1}, ["a.b=2"])
