"""Every trace format on a few lines, and what it makes of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.envs.workloads.table import RequestTable
from servegym.envs.workloads.traces import FORMATS, Trace, TraceConfig, load_trace, read_trace


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def load(path: Path, **options: Any) -> RequestTable:
    return load_trace(TraceConfig(path=path, **options))


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def shares_prefix(table: RequestTable, one: int, other: int) -> int:
    """Number of leading block hashes that two requests share."""
    rows = [table.prefix_ids[table.prefix_start[row] : table.prefix_start[row + 1]].tolist() for row in (one, other)]
    return next((i for i, (a, b) in enumerate(zip(*rows, strict=False)) if a != b), min(map(len, rows)))


def test_native_minimal(tmp_path: Path) -> None:
    table = load(write(tmp_path / "a.csv", "arrival_s,prompt_tokens,output_tokens\n0.5,10,2\n2,20,3\n"))
    assert table.arrival_s.tolist() == [0.0, 1.5]
    assert table.prompt_tokens.tolist() == [10, 20]
    assert table.output_tokens.tolist() == [2, 3]
    assert table.session.tolist() == [-1, -1]
    assert table.stream.tolist() == [0, 1]
    assert table.prefix_block_tokens == 0


NATIVE_FULL = (
    "extra,user,session,turn,arrival_s,prompt_tokens,output_tokens,priority,deadline_s\r\n"
    "x,bob,s1,0,1.0,10,2,1,0.5\r\n"
    "x,ann,,0,0.0,5,1,,\r\n"
    "\r\n"
    '"a,b",bob,s1,1,3.0,20,4,0,inf\r\n'
    "y,bob,s1,2,4.0,10,4,0,2\r\n"
)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_native_full(tmp_path: Path, name: str) -> None:
    table = load(write(tmp_path / name, "\ufeff" + NATIVE_FULL))
    assert table.arrival_s.tolist() == [0, 1, 3, 4]
    assert table.user.tolist() == [1, 0, 0, 0]
    assert table.session.tolist() == [-1, 0, 0, 0]
    assert table.turn.tolist() == [0, 0, 1, 2]
    assert table.priority.tolist() == [0, 1, 0, 0]
    assert table.deadline_s.tolist() == [np.inf, 0.5, np.inf, 2]
    # The second turn may repeat the first; the third is too short to repeat the second.
    assert (table.stream[1] == table.stream[2], table.stream[2] == table.stream[3]) == (True, False)
    assert not table.closed_loop


def test_native_closed_loop(tmp_path: Path) -> None:
    table = load(write(tmp_path / "a.csv", NATIVE_FULL), closed_loop=True, time_scale=0.5)
    assert table.parent.tolist() == [-1, -1, 1, 2]
    assert table.think_s.tolist() == [0, 0, 2, 1]
    assert table.arrival_s.tolist() == [0, 0.5, 1.5, 2]


def test_native_turns_are_counted_where_not_given(tmp_path: Path) -> None:
    text = "arrival_s,prompt_tokens,output_tokens,session\n0,1,1,a\n1,1,1,b\n2,1,1,a\n3,1,1,\n4,1,1,\n"
    assert load(write(tmp_path / "a.csv", text)).turn.tolist() == [0, 0, 1, 0, 0]


def test_native_prefix_blocks(tmp_path: Path) -> None:
    text = 'arrival_s,prompt_tokens,output_tokens,prefix_blocks\n2,33,1,"[1, 2, 3]"\n0,40,1,1 2 4\n1,31,1,9 2 3\n'
    table = load(write(tmp_path / "a.csv", text), prefix_block_tokens=10)
    assert table.prefix_block_tokens == 10
    assert np.diff(table.prefix_start).tolist() == [3, 3, 3]
    assert shares_prefix(table, 0, 2) == 2
    # The same block after another beginning is another prefix.
    assert shares_prefix(table, 1, 2) == 0
    assert len(np.unique(table.prefix_ids)) == 7


def test_partial_blocks_are_left_out(tmp_path: Path) -> None:
    text = "arrival_s,prompt_tokens,output_tokens,prefix_blocks\n0,39,1,1 2 3\n1,15,1,1\n2,16,1,1\n"
    table = load(write(tmp_path / "a.csv", text))
    assert np.diff(table.prefix_start).tolist() == [2, 0, 1]


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_azure_original(tmp_path: Path) -> None:
    rows = "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
    table = load(write(tmp_path / "a.csv", AZURE + rows))
    assert table.arrival_s == pytest.approx([0, 0.052], abs=1e-9)
    assert table.prompt_tokens.tolist() == [4808, 3180]


def test_azure_2024_with_time_zone(tmp_path: Path) -> None:
    rows = "2024-05-10 00:00:01.500000+00:00,7,1\n2024-05-10 00:00:00.009930+00:00,5,0\n2024-05-10 00:00:00+00:00,5,3\n"
    trace = read_trace(TraceConfig(path=write(tmp_path / "a.csv.gz", AZURE + rows)))
    assert trace.table.arrival_s.tolist() == [0, 1.5]
    assert trace.dropped == {"zero tokens": 1}


def test_azure_renamed(tmp_path: Path) -> None:
    table = load(write(tmp_path / "a.csv", "t_s,prompt_tokens,output_tokens\n0.0,374,44\n4.3,396,109\n"))
    assert table.arrival_s.tolist() == [0, 4.3]


BURST_1 = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURST_3 = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def test_burstgpt_reads_columns_by_name(tmp_path: Path) -> None:
    first = load(write(tmp_path / "1.csv", BURST_1 + "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1,2,3,API log\n"))
    third = load(
        write(tmp_path / "3.csv", BURST_3 + "5,c1,0.5,ChatGPT,472,18,490,Conversation log\n45,,,GPT-4,1,2,3,API log\n")
    )
    for table in (first, third):
        assert table.arrival_s.tolist() == [0, 40]
        assert table.prompt_tokens.tolist() == [472, 1]
        assert table.output_tokens.tolist() == [18, 2]
    assert third.session.tolist() == [0, -1]


def test_burstgpt_counts_failed_requests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "5,ChatGPT,472,0,472,API log\n6,ChatGPT,0,18,18,API log\n7,ChatGPT,3,4,7,API log\n"
    path = write(tmp_path / "1.csv", BURST_1 + rows)
    trace = read_trace(TraceConfig(path=path))
    assert len(trace.table) == 1
    assert trace.dropped == {"zero tokens (failed requests)": 2}
    load(path)
    assert "left out 2 requests: zero tokens" in caplog.text


def mooncake(*rows: tuple[int, int, int, list[int]]) -> str:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    return jsonl([dict(zip(names, row, strict=True)) for row in rows])


def test_mooncake(tmp_path: Path) -> None:
    text = mooncake(
        (0, 1100, 50, [0, 1, 2]),
        (1000, 1100, 50, [0, 7, 8]),
        (30_000, 1700, 60, [0, 1, 9, 10]),
        (31_000, 600, 5, [0, 11]),
        (60_000, 1800, 60, [0, 1, 9, 12]),
    )
    table = load(write(tmp_path / "m.jsonl", text))
    assert table.arrival_s.tolist() == [0, 1, 30, 31, 60]
    assert table.prefix_block_tokens == 512
    assert np.diff(table.prefix_start).tolist() == [2, 2, 3, 1, 3]
    assert shares_prefix(table, 0, 2) == 2
    assert shares_prefix(table, 0, 1) == 1
    # Rows 2 and 4 hold the two full blocks of what went before; one shared block is a template.
    assert table.session.tolist() == [0, 1, 0, 2, 0]
    assert table.turn.tolist() == [0, 0, 1, 0, 2]
    closed = load(tmp_path / "m.jsonl", closed_loop=True)
    assert closed.parent.tolist() == [-1, -1, 0, -1, 2]
    assert closed.think_s.tolist() == [0, 0, 30, 0, 30]


def test_mooncake_undoes_a_coarse_clock(tmp_path: Path) -> None:
    text = mooncake(*[(3000 * (i // 10), 10, 1, [i]) for i in range(400)])
    path = write(tmp_path / "m.jsonl", text)
    table = load(path)
    assert len(np.unique(table.arrival_s)) == 400
    assert table.arrival_s.max() < 120
    np.testing.assert_array_equal(table.arrival_s, load(path).arrival_s)
    assert (load(path, seed=1).arrival_s != table.arrival_s).any()
    assert len(np.unique(load(path, jitter_s=0).arrival_s)) == 40
    # Each request stays within its tick.
    assert (np.diff(np.bincount((table.arrival_s + load_offset(path) + 1e-9).astype(int) // 3)) == 0).all()


def load_offset(path: Path) -> float:
    """Jitter of the first request, which the loader shifts to 0."""
    jitter = np.random.default_rng(np.random.SeedSequence([0, 0])).uniform(0, 3.0, 400)
    return float(jitter[:10].min())


def bailian(*rows: tuple[int, int, float, int, int, list[int]]) -> str:
    names = ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids")
    return jsonl([dict(zip(names, row, strict=True)) | {"type": "text", "turn": 1} for row in rows])


def test_bailian(tmp_path: Path) -> None:
    text = bailian(
        (5, -1, 1.0, 40, 9, [1, 2, 3]),
        (6, -1, 2.0, 20, 9, [1, 9]),
        (7, 5, 10.0, 64, 9, [1, 2, 4, 5]),
        (9, 7, 30.0, 80, 9, [1, 2, 4, 5, 6]),
        (8, 99, 31.0, 16, 9, [1]),
        (10, -1, 32.0, 16, 0, [1]),
    )
    path = write(tmp_path / "b.jsonl", text)
    trace = read_trace(TraceConfig(path=path))
    table = trace.table
    assert trace.dropped == {"zero tokens": 1}
    assert table.prefix_block_tokens == 16
    assert table.turn.tolist() == [0, 0, 1, 2, 0]
    assert table.session[0] == table.session[2] == table.session[3]
    assert len(np.unique(table.session)) == 3
    assert shares_prefix(table, 0, 2) == 2
    assert not table.closed_loop
    closed = load(path, closed_loop=True)
    assert closed.parent.tolist() == [-1, -1, 0, 2, -1]
    assert closed.think_s.tolist() == [0, 0, 9, 20, 0]


def test_tracelab(tmp_path: Path) -> None:
    text = (
        "session_id,arrival_time,round_idx,prefix_len,input_len,output_len,tool_wait_after_ms\n"
        "0,117,0,0,2318,200,300\n0,117,1,2518,348,131,154\n0,117,2,2997,812,104,0\n1,393,0,0,861,107,273\n"
    )
    table = load(write(tmp_path / "t.csv", text))
    assert table.arrival_s.tolist() == pytest.approx([0, 0, 0, 0.276])
    assert table.prompt_tokens.tolist() == [2318, 2866, 3809, 861]
    assert table.parent.tolist() == [-1, 0, 1, -1]
    assert table.think_s.tolist() == pytest.approx([0, 0.3, 0.154, 0])
    assert table.stream[0] == table.stream[1] == table.stream[2] != table.stream[3]


@pytest.mark.parametrize("kind", ["native", "mooncake"])
def test_parquet(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    import pyarrow.parquet as pq

    if kind == "native":
        columns = {
            "arrival_s": [0.0, 1.0],
            "prompt_tokens": [5, 6],
            "output_tokens": [1, 2],
            "user": ["a", None],
            "deadline_s": [None, 2.0],
        }
    else:
        columns = {
            "timestamp": [0, 1000],
            "input_length": [600, 601],
            "output_length": [1, 2],
            "hash_ids": [[1, 2], [1, 3]],
        }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    table = load(tmp_path / "a.parquet")
    assert table.arrival_s.tolist() == [0, 1]
    assert table.output_tokens.tolist() == [1, 2]
    if kind == "native":
        assert table.user.tolist() == [0, -1]
        assert table.deadline_s.tolist() == [np.inf, 2.0]
    else:
        assert shares_prefix(table, 0, 1) == 1


def test_formats_are_told_apart(tmp_path: Path) -> None:
    public = {"azure", "burstgpt", "mooncake", "bailian", "servegen", "tracelab"}
    assert set(FORMATS) == public | {"native", "decisions"}
    for entry in FORMATS.values():
        assert entry.description
        assert entry.source


def test_a_given_format_is_used(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "t_s,prompt_tokens,output_tokens,arrival_s\n1,1,1,7\n2,1,1,9\n")
    assert load(path).arrival_s.tolist() == [0, 2]
    assert load(path, format="azure").arrival_s.tolist() == [0, 1]
    assert isinstance(read_trace(TraceConfig(path=path, format="native")), Trace)
