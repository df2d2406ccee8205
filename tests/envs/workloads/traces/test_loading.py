"""Selecting part of a trace, rescaling it, and every kind of bad file."""

from __future__ import annotations

import builtins
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.configuration import validate
from servegym.envs.workloads.table import RequestTable
from servegym.envs.workloads.traces import TraceConfig, load_trace
from servegym.errors import InputError

HEADER = "arrival_s,prompt_tokens,output_tokens\n"


def load(path: Path, **options: Any) -> RequestTable:
    return load_trace(TraceConfig(path=path, **options))


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Ten requests, a second apart from second 100 on; prompt lengths 1 to 10."""
    path = tmp_path / "ten.csv"
    path.write_text(HEADER + "".join(f"{100 + i},{i + 1},1\n" for i in range(10)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("options", "prompts", "first", "last"),
    [
        ({}, range(1, 11), 0, 9),
        ({"start_s": 3}, range(4, 11), 0, 6),
        ({"start_s": 2.5, "duration_s": 3}, (4, 5, 6), 0, 2),
        ({"duration_s": 1}, (1,), 0, 0),
        ({"limit": 4}, (1, 2, 3, 4), 0, 3),
        ({"max_tokens": 4}, (1, 2, 3), 0, 2),
        ({"time_scale": 0.5}, range(1, 11), 0, 4.5),
        ({"rate_rps": 9.0}, range(1, 11), 0, 1.0),
        ({"start_s": 5, "limit": 3, "rate_rps": 4.0}, (6, 7, 8), 0, 0.5),
    ],
)
def test_selection(ten: Path, options: dict[str, Any], prompts: Any, first: float, last: float) -> None:
    table = load(ten, **options)
    assert table.prompt_tokens.tolist() == list(prompts)
    assert (table.arrival_s[0], table.arrival_s[-1]) == pytest.approx((first, last))


def test_rows_are_sorted_and_ties_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(HEADER + "3,1,1\n1,2,1\n3,3,1\n1,4,1\n", encoding="utf-8")
    assert load(path).prompt_tokens.tolist() == [2, 4, 1, 3]


def test_thinning_keeps_sessions_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = "".join(f"{i},1,1,s{i % 200}\n" for i in range(1000)) + "".join(f"{i},2,1,\n" for i in range(1000, 3000))
    path.write_text(HEADER.strip() + ",session\n" + rows, encoding="utf-8")
    table = load(path, share=0.3, seed=1)
    sizes = np.bincount(table.session[table.session >= 0])
    assert set(sizes[sizes > 0].tolist()) == {5}
    assert (sizes > 0).sum() == pytest.approx(60, abs=25)
    assert (table.session < 0).sum() == pytest.approx(600, abs=90)
    np.testing.assert_array_equal(table.arrival_s, load(path, share=0.3, seed=1).arrival_s)
    assert len(table) != len(load(path, share=0.3, seed=2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.csv: empty file; allowed: a header line and a line per request"),
        (HEADER, "a.csv: no requests; allowed: at least 1"),
        (HEADER + "\n\n", "a.csv: no requests; allowed: at least 1"),
        (HEADER + "0,1,1\n1,abc,1\n", "a.csv:3: prompt_tokens: got 'abc'; allowed: an integer of at least 1"),
        (HEADER + "0,1,1\n\n1,0,1\n", "a.csv:4: prompt_tokens: got '0'; allowed: an integer of at least 1"),
        (HEADER + "0,1.5,1\n", "a.csv:2: prompt_tokens: got '1.5'; allowed: an integer of at least 1"),
        (HEADER + "0,1,-2\n", "a.csv:2: output_tokens: got '-2'; allowed: an integer of at least 1"),
        (HEADER + "0,1,99999999999\n", "a.csv:2: output_tokens: got '99999999999'; allowed: an integer of at least 1"),
        (HEADER + "0,,2\n", "a.csv:2: prompt_tokens: got ''; allowed: an integer of at least 1"),
        (HEADER + "nan,1,1\n", "a.csv:2: arrival_s: got 'nan'; allowed: a finite number of at least 0"),
        (HEADER + "0,1,1\ninf,1,1\n", "a.csv:3: arrival_s: got 'inf'; allowed: a finite number of at least 0"),
        (HEADER + "-1,1,1\n", "a.csv:2: arrival_s: got '-1'; allowed: a finite number of at least 0"),
        (HEADER + "0,1,1\n5,5\n", "a.csv:3: got 2 columns; allowed: 3 as in the header"),
        (
            "arrival_s,prompt_token,output_tokens\n0,1,1\n",
            "a.csv:1: prompt_tokens: missing column; did you mean prompt_token?",
        ),
        ("x,y\n0,1\n", "a.csv:1: arrival_s: missing column; known: x, y"),
        ("TIMESTAMP,ContextTokens,Generated\n0,1,1\n", "a.csv:1: GeneratedTokens: missing column"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,1,1\n12/05/2024,1,1\n",
            "a.csv:3: TIMESTAMP: got '12/05/2024'; allowed: a time such as 2023-11-16 18:15:46.680",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n,1,1\n",
            "a.csv:2: TIMESTAMP: got ''; allowed: a time such as",
        ),
        (
            HEADER.strip() + ",prefix_blocks\n0,1,1,1 x\n",
            "a.csv:2: prefix_blocks: got '1 x'; allowed: a list of integers",
        ),
        (HEADER.strip() + ",deadline_s\n0,1,1,0\n", "a.csv: deadline_s[0]: got 0.0; allowed: a number > 0, or inf"),
        (HEADER.strip() + ",priority\n0,1,1,high\n", "a.csv:2: priority: got 'high'; allowed: an integer"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10,0,1\n", "a.csv: no requests are left"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(caught.value)


def test_the_line_counts_quoted_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(HEADER.strip() + ',note\n0,1,1,"two\nlines"\n1,x,1,z\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"a.csv:4: prompt_tokens: got 'x'"):
        load(path)


def test_a_bad_value_far_down(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(HEADER + "0,1,1\n" * 70_000 + "0,1,\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"a.csv:70002: output_tokens: got ''"):
        load(path)


MOONCAKE = '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "m.jsonl: no requests; allowed: a JSON object per line"),
        (MOONCAKE + "{oops}\n", "m.jsonl:2:2: not valid JSON: "),
        (MOONCAKE + "\n[1]\n", "m.jsonl:3: got '[1]'; allowed: a JSON object"),
        (MOONCAKE + MOONCAKE.replace("input_length", "inputs"), "m.jsonl:2: input_length: missing"),
        (MOONCAKE + "\n" + MOONCAKE.replace("5", '"x"'), "m.jsonl:3: input_length: got 'x'; allowed: an integer"),
        (MOONCAKE + MOONCAKE.replace("5", "null"), "m.jsonl:2: input_length: got None; allowed: an integer"),
        (MOONCAKE.replace("[1]", '["a"]'), "m.jsonl:1: hash_ids: got ['a']; allowed: a list of integers"),
        (MOONCAKE.replace("[1]", "[1.5]"), "m.jsonl:1: hash_ids: got [1.5]; allowed: a list of integers"),
        (MOONCAKE.replace("[1]", "[[1]]"), "m.jsonl:1: hash_ids: got [[1]]; allowed: a list of integers"),
        (MOONCAKE.replace("[1]", "3"), "m.jsonl:1: hash_ids: got 3; allowed: a list of integers"),
        (MOONCAKE.replace("output_length", "output"), "m.jsonl:1: output_length: missing column; did you mean output?"),
    ],
)
def test_bad_json_lines(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.csv: no such file"):
        load(tmp_path / "none.csv")
    other = tmp_path / "a.txt"
    other.write_text(HEADER, encoding="utf-8")
    with pytest.raises(InputError, match=r"unknown kind of file; allowed: .csv, .jsonl, .parquet"):
        load(other)
    (tmp_path / "b.csv.gz").write_bytes(b"not gzip at all")
    with pytest.raises(InputError, match=r"b.csv.gz: cannot be read"):
        load(tmp_path / "b.csv.gz")
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress((HEADER + "0,1,1\n" * 5000).encode())[:-60])
    with pytest.raises(InputError, match=r"c.csv.gz: cannot be read"):
        load(tmp_path / "c.csv.gz")
    (tmp_path / "d.csv").write_bytes(b"arrival_s\xff\xfe,b\n")
    with pytest.raises(InputError, match=r"d.csv: cannot be read: not UTF-8 text"):
        load(tmp_path / "d.csv")
    (tmp_path / "e.parquet").write_bytes(b"PAR0")
    with pytest.raises(InputError, match=r"e.parquet: (cannot be read as Parquet|Parquet needs pyarrow)"):
        load(tmp_path / "e.parquet")


def test_bad_parquet_names_row_and_column(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    import pyarrow.parquet as pq

    columns = {"arrival_s": [0.0, float("nan")], "prompt_tokens": [5, 6], "output_tokens": [1, 2]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet:row 2: arrival_s: got nan; allowed: a finite number"):
        load(tmp_path / "a.parquet")
    pq.write_table(pa.table(columns | {"arrival_s": [0.0, None]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b.parquet:row 2: arrival_s: got None"):
        load(tmp_path / "b.parquet")
    pq.write_table(pa.table({"arrival_s": [0.0]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c.parquet: prompt_tokens: missing column; known: arrival_s"):
        load(tmp_path / "c.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"Parquet needs pyarrow; install servegym\[train\], or use CSV"):
        load(tmp_path / "a.parquet")


def test_nothing_left(ten: Path) -> None:
    with pytest.raises(InputError, match=r"ten.csv: no requests are left of the trace; check start_s 50"):
        load(ten, start_s=50)
    with pytest.raises(InputError, match=r"no requests are left of the trace; check 10 with more than 1 tokens"):
        load(ten, max_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "azur"}, "format: got 'azur'; allowed: auto or a known format; did you mean azure?"),
        ({"share": 0}, "share: got 0; allowed: greater than 0"),
        ({"rate_rps": float("inf")}, "rate_rps: got inf; allowed: a finite number"),
        ({"rate_rps": 1, "time_scale": 2}, "at most one of time_scale and rate_rps"),
        ({"limit": 0}, "limit: got 0; allowed: greater than or equal to 1"),
        ({"speed": 2}, "speed: unknown key"),
    ],
)
def test_bad_config(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        validate(TraceConfig, {"path": "a.csv"} | options, "x.yaml")
    assert message in str(caught.value)
