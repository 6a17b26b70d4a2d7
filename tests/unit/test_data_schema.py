"""Reading and writing the row schema; every bad file names file and line or row."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpg_megatron.data import records
from gpg_megatron.data.schema import make_row, read_problems, write_parquets
from gpg_megatron.errors import UserError


def row(**changes: object) -> dict[str, object]:
    good = make_row(
        data_source="demo/add",
        content="1 + 1?",
        ability="arithmetic",
        ground_truth="2",
        extra_info={"index": 0},
    )
    return {**good, **changes}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_jsonl_and_parquet_give_the_same_problems(tmp_path: Path) -> None:
    rows = [row(), row(data_source="demo/max", reward_model={"style": "rule", "ground_truth": "7"})]
    lines = read_problems(jsonl(tmp_path / "a.jsonl", *rows))
    write_parquets({tmp_path / "a.parquet": rows})
    table = read_problems(tmp_path / "a.parquet")
    for problems in (lines, table):
        assert [p.data_source for p in problems] == ["demo/add", "demo/max"]
        assert [p.ground_truth for p in problems] == ["2", "7"]
        assert problems[0].messages == ({"role": "user", "content": "1 + 1?"},)
    assert lines[1].location == f"{tmp_path / 'a.jsonl'}:2"
    assert table[1].location == f"{tmp_path / 'a.parquet'}: row 2"


def test_blank_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{json.dumps(row())}\n\n", encoding="utf-8")
    (problem,) = read_problems(path)
    assert problem.location == f"{path}:2"


def test_further_columns_and_a_numeric_answer_are_accepted(tmp_path: Path) -> None:
    extra = row(reward_model={"style": "rule", "ground_truth": 42}, agent_name="x")
    (problem,) = read_problems(jsonl(tmp_path / "a.jsonl", extra))
    assert problem.ground_truth == "42"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1], "a.jsonl:2: expected an object, found list"),
        (row(data_source=3), "a.jsonl:2: data_source is a int; expected a string"),
        (row(data_source=None), "a.jsonl:2: data_source is missing"),
        (row(prompt="hi"), "a.jsonl:2: prompt is a string; expected a list of messages"),
        (row(prompt=[]), "a.jsonl:2: prompt is an empty list"),
        (row(prompt=["hi"]), r"a.jsonl:2: prompt\[0\] is a string; expected role and content"),
        (row(prompt=[{"role": "user"}]), r"a.jsonl:2: prompt\[0\]: content is missing"),
        (row(reward_model="x"), "a.jsonl:2: reward_model is a string; expected an object"),
        (row(reward_model={"style": "rule"}), "ground_truth is missing; expected a string"),
        (row(reward_model={"ground_truth": True}), "ground_truth is a boolean"),
    ],
)
def test_a_malformed_row_names_its_line(tmp_path: Path, bad: object, message: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", row(), bad)
    with pytest.raises(UserError, match=message):
        read_problems(path)


def test_a_malformed_parquet_row_names_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquets({path: [row(), row(data_source=None)]})
    with pytest.raises(UserError, match="a.parquet: row 2: data_source is missing"):
        read_problems(path)


def test_a_line_that_is_not_json_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row()) + "\n{oops\n", encoding="utf-8")
    with pytest.raises(UserError, match="a.jsonl:2: not JSON: .* at column 2"):
        read_problems(path)


def test_unusable_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}\n')
    (tmp_path / "a.csv").write_text("x\n", encoding="utf-8")
    pq.write_table(pa.table({"question": ["?"]}), tmp_path / "other.parquet")
    empty = pa.Table.from_pylist([row()]).slice(0, 0)
    pq.write_table(empty, tmp_path / "none.parquet")
    for name, message in {
        "absent.jsonl": "data file not found: .*absent.jsonl",
        "absent.parquet": "data file not found: .*absent.parquet",
        "empty.jsonl": "the file has no rows",
        "none.parquet": "the file has no rows",
        "broken.parquet": "broken.parquet: not a readable parquet file",
        "latin.jsonl": "latin.jsonl: not UTF-8",
        "a.csv": "a.csv: unknown file type; expected .parquet or .jsonl",
        "other.parquet": "no column 'data_source'; found question",
    }.items():
        with pytest.raises(UserError, match=message) as raised:
            read_problems(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "b.parquet").write_text("old", encoding="utf-8")
    blocked = tmp_path / "b.parquet" / "c.parquet"
    with pytest.raises(UserError, match="cannot write"):
        write_parquets({tmp_path / "a.parquet": [row()], blocked: [row()]})
    assert [p.name for p in tmp_path.iterdir()] == ["b.parquet"]


def test_rows_keep_their_numbers_over_batches_and_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BATCH_ROWS", 3)
    rows = [pa.table({"a": [f"{i}{j}" for j in range(4)]}) for i in range(3)]
    with pq.ParquetWriter(tmp_path / "x.parquet", rows[0].schema) as writer:
        for group in rows:
            writer.write_table(group)
    found = list(records.read_file(tmp_path / "x.parquet"))
    assert [row["a"] for _, row in found] == [f"{i}{j}" for i in range(3) for j in range(4)]
    assert found[7][0] == f"{tmp_path}/x.parquet: row 8"


@pytest.mark.slow
def test_a_column_may_hold_more_than_2_gib(tmp_path: Path) -> None:
    """One row group with 2.2 GiB of nested text, which no single array can hold."""
    path, text = tmp_path / "large.parquet", "x" * 2**20
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    part = pa.table({"prompt": pa.array([[{"role": "user", "content": text}]] * 550, kind)})
    table = pa.concat_tables([part] * 4)
    pq.write_table(table, path, row_group_size=2200)
    assert pq.ParquetFile(path).num_row_groups == 1
    del table, part
    n_rows = 0
    for _, row in records.read_file(path):
        assert row["prompt"][0]["content"] == text
        n_rows += 1
    assert n_rows == 2200
