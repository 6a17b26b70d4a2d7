"""GSM8K from local folders, and the command that writes the files."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpg_megatron.data import cli, gsm8k
from gpg_megatron.data.schema import read_problems
from gpg_megatron.errors import UserError

DEVELOPMENT_DATA = Path(__file__).parents[3] / "shared" / "data"


def write(path: Path, *answers: str) -> None:
    records = [{"question": f"Question {n}?", "answer": a} for n, a in enumerate(answers)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("2+2=<<2+2=4>>4\n#### 4", "4"),
        ("#### 1\nno:\n####  1,234 ", "1234"),
        ("#### -3.5", "-3.5"),
    ],
)
def test_final_answer(solution, answer):
    assert gsm8k.final_answer(solution, "here") == answer


@pytest.mark.parametrize("solution", ["4", "so ####  ", ""])
def test_no_final_answer(solution):
    with pytest.raises(UserError, match='here: the answer has no "#### number"'):
        gsm8k.final_answer(solution, "here")


def test_the_command_writes_both_splits_from_a_folder(tmp_path, capsys):
    write(tmp_path / "train.jsonl", "#### 1", "#### 2", "#### 3")
    write(tmp_path / "gsm8k_test.jsonl", "#### 4")
    out = tmp_path / "out"
    code = cli.main(["gsm8k", "--source", str(tmp_path), "--out", str(out), "--train-size", "2"])
    assert code == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}/train.parquet: 2 rows",
        f"{out}/test.parquet: 1 rows",
    ]
    train, test = (read_problems(out / f"{name}.parquet") for name in ("train", "test"))
    assert [p.ground_truth for p in train] == ["1", "2"]
    assert [p.ground_truth for p in test] == ["4"]
    assert train[1].messages[0]["content"] == (
        'Question 1? Let\'s think step by step and output the final answer after "####".'
    )
    assert train[0].data_source == "openai/gsm8k"


def test_the_data_sets_own_parquet_layout(tmp_path):
    (tmp_path / "main").mkdir()
    table = pa.table({"question": ["Q?"], "answer": ["#### 9"]})
    pq.write_table(table, tmp_path / "main" / "test-00000-of-00001.parquet")
    (row,) = gsm8k.load_rows(str(tmp_path), "test")
    assert row["reward_model"] == {"style": "rule", "ground_truth": "9"}


def test_a_bad_line_ends_the_command_with_one_line_and_no_file(tmp_path, capsys):
    write(tmp_path / "train.jsonl", "#### 1")
    write(tmp_path / "test.jsonl", "#### 1", "none")
    code = cli.main(["gsm8k", "--source", str(tmp_path), "--out", str(tmp_path / "out")])
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/test.jsonl:2: the answer has no")
    assert not (tmp_path / "out").exists()


def test_a_missing_split_and_a_missing_field(tmp_path):
    with pytest.raises(UserError, match="no train split; expected one of gsm8k_train.jsonl"):
        gsm8k.load_rows(str(tmp_path), "train")
    (tmp_path / "train.jsonl").write_text('{"question": "?"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="train.jsonl:1: no text under 'answer'"):
        gsm8k.load_rows(str(tmp_path), "train")


def test_hugging_face(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "Q?", "answer": "#### 5"}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = gsm8k.load_rows(None, "train", limit=2)
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["5", "5"]


def test_hugging_face_out_of_reach_is_one_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="cannot load the data set: no route; .* --source"):
        gsm8k.load_rows(None, "train")


def test_the_arithmetic_command_is_reproducible(tmp_path, capsys):
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


@pytest.mark.skipif(
    not (DEVELOPMENT_DATA / "gsm8k_test.jsonl").is_file(), reason="no local copy of GSM8K"
)
def test_the_whole_of_gsm8k():
    train, test = (gsm8k.load_rows(str(DEVELOPMENT_DATA), split) for split in gsm8k.SPLITS)
    assert (len(train), len(test)) == (7473, 1319)
    assert test[0]["reward_model"]["ground_truth"] == "18"
    assert all(isfinite(float(row["reward_model"]["ground_truth"])) for row in train + test)
