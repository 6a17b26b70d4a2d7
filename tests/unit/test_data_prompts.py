"""Rendering, ids and the length limit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from gpg_megatron.config.sections import DataConfig
from gpg_megatron.data.prompts import file_labels, load_prompts
from gpg_megatron.data.schema import make_row
from gpg_megatron.demo.model import build_tokenizer
from gpg_megatron.errors import UserError
from gpg_megatron.types import Prompt


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(["Say "], 300)


def write(path: Path, contents: Sequence[str], data_source: str = "demo/say") -> str:
    rows = [
        make_row(
            data_source=data_source,
            content=content,
            ability="speech",
            ground_truth=content[-1],
            extra_info={},
        )
        for content in contents
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def test_the_chat_template_opens_the_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = write(tmp_path / "a.jsonl", ["Say 12"])
    (prompt,) = load_prompts([file], DataConfig(), tokenizer, 300).prompts
    text = tokenizer.decode(prompt.token_ids.tolist())
    assert text == "<|begin|><|user|>Say 12<|assistant|>"
    assert prompt.token_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert prompt.token_ids.dtype == np.int32
    assert prompt.messages == ({"role": "user", "content": "Say 12"},)
    assert (prompt.ground_truth, prompt.data_source) == ("2", "demo/say")


def test_without_template_the_contents_are_joined_without_special_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = make_row(data_source="d", content="3 + ", ability="x", ground_truth="7", extra_info={})
    row["prompt"].append({"role": "user", "content": "4 ="})
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    data = DataConfig(apply_chat_template=False)
    (prompt,) = load_prompts([str(path)], data, tokenizer, 300).prompts
    assert tokenizer.decode(prompt.token_ids.tolist()) == "3 + 4 ="
    assert not set(prompt.token_ids.tolist()) & set(tokenizer.all_special_ids)


def test_ids_are_source_file_and_row_also_after_filtering(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    # Digits are single tokens: the template's 3 + "Say" + " " + the digits.
    first = write(tmp_path / "a.jsonl", ["Say 1", "Say 12345", "Say 3"])
    second = write(tmp_path / "b.jsonl", ["Say 4"], data_source="other")
    data = DataConfig(max_prompt_length=6, overlong_prompts="filter")
    loaded = load_prompts([first, second], data, tokenizer, 300)
    assert [p.id for p in loaded.prompts] == ["demo/say/a/0", "demo/say/a/2", "other/b/0"]
    assert loaded.n_filtered == 1


def test_an_overlong_prompt_is_an_error_with_row_and_lengths(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = write(tmp_path / "a.jsonl", ["Say 1", "Say 12345"])
    with pytest.raises(UserError, match=r"a.jsonl:2: the prompt has 10 tokens, .*_length=8"):
        load_prompts([file], DataConfig(max_prompt_length=8), tokenizer, 300)
    assert len(load_prompts([file], DataConfig(max_prompt_length=10), tokenizer, 300).prompts) == 2


def test_nothing_left_after_filtering(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "a.jsonl", ["Say 1"])
    data = DataConfig(max_prompt_length=2, overlong_prompts="filter")
    with pytest.raises(UserError, match="all 1 prompts are longer"):
        load_prompts([file], data, tokenizer, 300)


def test_a_tokenizer_without_template(tmp_path: Path) -> None:
    bare = build_tokenizer(["Say "], 300)
    bare.chat_template = None
    file = write(tmp_path / "a.jsonl", ["Say 1"])
    with pytest.raises(UserError, match="no chat template; .*apply_chat_template=false"):
        load_prompts([file], DataConfig(), bare, 300)


def test_files_with_equal_names_are_told_apart_by_their_folders(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for name in ("gsm8k", "math"):
        (tmp_path / name).mkdir()
    files = [write(tmp_path / name / "train.jsonl", ["Say 1"]) for name in ("gsm8k", "math")]
    loaded = load_prompts(files, DataConfig(), tokenizer, 300)
    assert [p.id for p in loaded.prompts] == ["demo/say/gsm8k/train/0", "demo/say/math/train/0"]
    assert loaded.per_file == (1, 1)
    with pytest.raises(UserError, match="have the same name"):
        load_prompts([files[0], files[0]], DataConfig(), tokenizer, 300)


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=6))
def test_labels_are_distinct_and_as_short_as_can_be(folders: list[list[str]]) -> None:
    files = sorted({"/at/some/place/" + "/".join(parts) + ".jsonl" for parts in folders})
    labels = file_labels(files)
    assert len(set(labels)) == len(files)
    assert all(f.removesuffix(".jsonl").endswith(x) for f, x in zip(files, labels, strict=True))
    if len({f.rpartition("/")[2] for f in files}) == len(files):
        assert all("/" not in label for label in labels)


def test_the_system_prompt_goes_where_there_is_none(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = make_row(data_source="d", content="Say 1", ability="x", ground_truth="1", extra_info={})
    own = {**row, "prompt": [{"role": "system", "content": "Say "}, *row["prompt"]]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(own) + "\n", encoding="utf-8")
    data = DataConfig(system_prompt="12", apply_chat_template=False)
    first, second = load_prompts([str(path)], data, tokenizer, 300).prompts
    assert tokenizer.decode(first.token_ids.tolist()) == "12Say 1"
    assert first.messages[0] == {"role": "system", "content": "12"}
    assert tokenizer.decode(second.token_ids.tolist()) == "Say Say 1"


def test_a_class_of_the_users_reads_the_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "lines.txt").write_text("1 one\n2 two\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text(
        "class Lines:\n"
        "    def __init__(self, file):\n"
        "        self.file = file\n"
        "    def __iter__(self):\n"
        "        for line in open(self.file):\n"
        "            number, word = line.split()\n"
        "            prompt = [{'role': 'user', 'content': word}]\n"
        "            yield {'data_source': 'words', 'prompt': prompt,\n"
        "                   'reward_model': {'ground_truth': number}}\n"
        "class Broken(Lines):\n"
        "    def __iter__(self):\n"
        "        yield {}\n"
        "class Failing(Lines):\n"
        "    def __iter__(self):\n"
        "        raise KeyError('word')\n"
    )
    file = str(tmp_path / "lines.txt")

    def load(name: str) -> tuple[Prompt, ...]:
        data = DataConfig(custom_class=f"{tmp_path}/mine.py:{name}")
        return load_prompts([file], data, tokenizer, 300).prompts

    assert [(p.id, p.ground_truth) for p in load("Lines")] == [
        ("words/lines/0", "1"),
        ("words/lines/1", "2"),
    ]
    with pytest.raises(UserError, match=r"lines.txt: row 1: reward_model is missing"):
        load("Broken")
    with pytest.raises(UserError, match=r"Failing on .*lines.txt: KeyError: 'word'"):
        load("Failing")
