"""The data sets known by name, and the command that writes and checks them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpg_megatron.data import cli
from gpg_megatron.data.catalog import DATA_SETS, gsm8k_reference, load_split
from gpg_megatron.data.checks import SHOWN, examine
from gpg_megatron.data.schema import read_problems
from gpg_megatron.errors import UserError


def write(path: Path, *records: Mapping[str, object]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def write_gsm8k(path: Path, *answers: str) -> None:
    write(path, *({"question": f"Question {n}?", "answer": a} for n, a in enumerate(answers)))


def truths(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [row["reward_model"]["ground_truth"] for row in rows]


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("2+2=<<2+2=4>>4\n#### 4", "4"),
        ("#### 1\nno:\n####  1,234 ", "1234"),
        ("#### -3.5", "-3.5"),
        ("4", None),
        ("so ####  ", None),
        ("#### four", None),
        ("#### inf", None),
        ("", None),
    ],
)
def test_the_reference_answer_of_gsm8k(solution: str, answer: str) -> None:
    assert gsm8k_reference(solution) == answer


def test_the_command_writes_both_splits_from_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gsm8k(tmp_path / "train.jsonl", "#### 1", "#### 2", "#### 3")
    write(tmp_path / "gsm8k_test.jsonl", {"question": "Another?", "answer": "#### 4"})
    out = tmp_path / "out"
    code = cli.main(["gsm8k", "--source", str(tmp_path), "--out", str(out), "--train-size", "2"])
    assert code == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}/train.parquet: 2 rows",
        f"{out}/test.parquet: 1 rows",
        f"{out}/checks.json: nothing odd",
    ]
    train, test = (read_problems(out / f"{name}.parquet") for name in ("train", "test"))
    assert [p.ground_truth for p in train] == ["1", "2"]
    assert [p.ground_truth for p in test] == ["4"]
    assert train[1].messages[0]["content"] == (
        'Question 1? Let\'s think step by step and output the final answer after "####".'
    )
    assert train[0].data_source == "openai/gsm8k"


def test_math_rows(tmp_path: Path) -> None:
    record = {"problem": "P?", "level": "Level 3", "type": "Algebra", "solution": "\\boxed{x^2}"}
    write(tmp_path / "math_train.jsonl", record)
    (row,) = load_split("math", str(tmp_path), "train").rows
    assert row["data_source"] == "DigitalLearningGmbH/MATH-lighteval"
    assert row["prompt"][0]["content"] == (
        "P? Let's think step by step and output the final answer within \\boxed{}."
    )
    assert truths([row]) == ["x^2"]
    assert row["extra_info"] == {
        "split": "train", "index": 0, "question": "P?", "solution": "\\boxed{x^2}",
        "level": "Level 3", "type": "Algebra",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "record", "truth"),
    [
        ("math500", {"problem": "P", "solution": "so \\boxed{1}", "answer": "2"}, "2"),
        ("aime24", {"problem": "P", "answer": "025"}, "025"),
        ("aime24", {"problem": "P", "solution": "\\boxed{25}"}, "25"),
        ("amc23", {"question": "P", "answer": 27.0}, "27"),
        ("amc23", {"question": "P", "answer": 2.5}, "2.5"),
        ("minerva", {"question": "P", "answer": "1.6e-19"}, "1.6e-19"),
        ("olympiadbench", {"question": "P", "final_answer": ["$2$", "3"]}, "2, 3"),
    ],
)
def test_reference_answers_of_the_benchmarks(
    tmp_path: Path, name: str, record: dict[str, Any], truth: str
) -> None:
    write(tmp_path / "any.jsonl", record)
    assert truths(load_split(name, str(tmp_path / "any.jsonl"), "test").rows) == [truth]


def test_every_data_set_says_where_it_is() -> None:
    assert all(set(x.splits) <= {"train", "test"} and "/" in x.hub for x in DATA_SETS.values())
    assert len({x.hub for x in DATA_SETS.values()}) == len(DATA_SETS)


def test_the_data_sets_own_parquet_layout(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    table = pa.table({"question": ["Q?"], "answer": ["#### 9"]})
    pq.write_table(table, tmp_path / "main" / "test-00000-of-00001.parquet")
    assert truths(load_split("gsm8k", str(tmp_path), "test").rows) == ["9"]


def test_records_without_answer_are_left_out_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gsm8k(tmp_path / "train.jsonl", "#### 1", "none", "#### 3")
    write(tmp_path / "test.jsonl", {"question": "Another?", "answer": "#### 1"})
    out = tmp_path / "out"
    assert cli.main(["gsm8k", "--source", str(tmp_path), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{out}/train.parquet: 2 rows"
    assert lines[2] == "1 records without a usable answer were left out:"
    assert lines[3].startswith(f"  {tmp_path}/train.jsonl:2: no answer can be extracted")
    checks = json.loads((out / "checks.json").read_text())
    assert checks["counts"] == {"train": 2, "test": 1}
    assert [x["location"] for x in checks["unusable"]] == [f"{tmp_path}/train.jsonl:2"]
    # The row keeps its place in the source.
    rows = pq.read_table(out / "train.parquet").to_pylist()
    assert [row["extra_info"]["index"] for row in rows] == [0, 2]


def test_duplicates_conflicts_and_overlap_are_found(tmp_path: Path) -> None:
    write(
        tmp_path / "train.jsonl",
        {"question": "How many?", "answer": "#### 1"},
        {"question": "What?", "answer": "#### 2"},
        {"question": "how  MANY?\n", "answer": "#### 1"},
        {"question": "what?", "answer": "#### 3"},
    )
    write(tmp_path / "test.jsonl", {"question": "What?", "answer": "#### 2"})
    splits = {x: load_split("gsm8k", str(tmp_path), x) for x in ("train", "test")}
    found = examine(splits)
    assert found.duplicates == (("train/0", "train/2"), ("train/1", "train/3"))
    assert found.conflicts == (("train/1", "train/3"),)
    assert found.overlap == (("train/1", "train/3", "test/0"),)
    assert found.lines()[0] == "2 problems stand more than once in a split:"


def test_a_long_list_is_cut_on_the_screen_only(tmp_path: Path) -> None:
    write_gsm8k(tmp_path / "train.jsonl", *["none"] * (SHOWN + 3), "#### 1")
    found = examine({"train": load_split("gsm8k", str(tmp_path), "train")})
    assert len(found.lines()) == SHOWN + 2
    assert found.lines()[-1] == "  ... and 3 more"
    assert len(found.to_json()["unusable"]) == SHOWN + 3


def test_mistakes_are_one_line_and_leave_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gsm8k(tmp_path / "train.jsonl", "#### 1")
    write_gsm8k(tmp_path / "test.jsonl", "none")
    out = tmp_path / "out"
    for arguments, message in (
        ([], f"{tmp_path}/test.jsonl:1: no answer can be extracted"),
        (["--train-size", "0"], "--train-size is 0"),
        (["--source", str(tmp_path / "train.jsonl")], "expected --split train or test"),
        (["--source", str(tmp_path / "no")], "no such file or folder"),
    ):
        assert cli.main(["gsm8k", "--source", str(tmp_path), "--out", str(out), *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    assert not out.exists()


def test_one_split_from_one_file(tmp_path: Path) -> None:
    write_gsm8k(tmp_path / "mine.jsonl", "#### 1")
    arguments = ["--source", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "out")]
    assert cli.main(["gsm8k", *arguments, "--split", "test"]) == 0
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == ["checks.json", "test.parquet"]


def test_a_missing_split_and_a_missing_field(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no train split; expected one of gsm8k_train.jsonl"):
        load_split("gsm8k", str(tmp_path), "train")
    (tmp_path / "train.jsonl").write_text('{"answer": "#### 1"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="train.jsonl:1: no text under 'question'"):
        load_split("gsm8k", str(tmp_path), "train")


def test_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((args, kwargs))
        record = {"question": "Q?", "problem": "Q?", "answer": "#### 5", "solution": "\\boxed{5}"}
        return datasets.Dataset.from_list([record] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert truths(load_split("gsm8k", None, "train", limit=2).rows) == ["5", "5"]
    assert truths(load_split("math", None, "test").rows) == ["5", "5", "5"]
    assert asked == [
        (("openai/gsm8k", "main"), {"split": "train"}),
        (("DigitalLearningGmbH/MATH-lighteval",), {"split": "test"}),
    ]


def test_hugging_face_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="cannot load the data set: no route; .* --source"):
        load_split("gsm8k", None, "train")


def test_the_arithmetic_command_is_reproducible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--train-size", "20", "--test-size", "5"]
    for name in ("a", "b"):
        out = str(tmp_path / name)
        assert cli.main(["arithmetic", "--task", "max3", "--out", out, "--seed", "4", *sizes]) == 0
    assert "train.parquet: 20 rows" in capsys.readouterr().out
    for name in ("train", "test"):
        first, second = (read_problems(tmp_path / x / f"{name}.parquet") for x in ("a", "b"))
        assert [p.messages for p in first] == [p.messages for p in second]
    assert cli.main(["arithmetic", "--out", str(tmp_path / "c"), "--train-size", "9999"]) == 2
    assert "has 5050 problems" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "sizes", "duplicates", "overlap"),
    [
        ("gsm8k", {"train": 7473, "test": 1319}, (), ()),
        (
            "math",
            {"train": 7498, "test": 5000},
            (("train/1434", "train/1666"),),
            (("train/3192", "test/4997"),),
        ),
    ],
)
def test_the_whole_training_sets(
    development_data: Path,
    name: str,
    sizes: dict[str, int],
    duplicates: tuple[tuple[str, ...], ...],
    overlap: tuple[tuple[str, ...], ...],
) -> None:
    """The oddities of MATH are its own: two empty boxes, one problem twice, one in both splits."""
    splits = {x: load_split(name, str(development_data), x) for x in sizes}
    found = examine(splits)
    assert found.counts == sizes
    empty_boxes = [where.rpartition("/")[2] for where, _ in found.unusable]
    assert empty_boxes == (["math_train.jsonl:5530", "math_train.jsonl:5532"] * (name == "math"))
    assert (found.duplicates, found.overlap) == (duplicates, overlap)
    if name == "gsm8k":
        everything = truths(splits["train"].rows + splits["test"].rows)
        assert all(isfinite(float(truth)) for truth in everything)


@pytest.mark.parametrize(("name", "size"), [("math500", 500), ("aime24", 30)])
def test_the_whole_benchmarks(development_data: Path, name: str, size: int) -> None:
    found = examine({"test": load_split(name, str(development_data), "test")})
    assert (found.counts, found.unusable, found.duplicates) == ({"test": size}, (), ())
