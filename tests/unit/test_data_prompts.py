"""Rendering, ids and the length limit."""

from __future__ import annotations

import json

import pytest

from gpg_megatron.config import DataConfig
from gpg_megatron.data.prompts import load_prompts
from gpg_megatron.data.schema import make_row
from gpg_megatron.demo_model import build_tokenizer
from gpg_megatron.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["Say "], 300)


def write(path, contents, data_source="demo/say"):
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


def test_the_chat_template_opens_the_answer(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", ["Say 12"])
    (prompt,) = load_prompts([file], DataConfig(), tokenizer).prompts
    text = tokenizer.decode(prompt.token_ids)
    assert text == "<|begin|><|user|>Say 12<|assistant|>"
    assert prompt.token_ids.count(tokenizer.bos_token_id) == 1
    assert all(type(i) is int for i in prompt.token_ids)
    assert prompt.messages == ({"role": "user", "content": "Say 12"},)
    assert (prompt.ground_truth, prompt.data_source) == ("2", "demo/say")


def test_without_template_the_contents_are_joined_without_special_tokens(tmp_path, tokenizer):
    row = make_row(data_source="d", content="3 + ", ability="x", ground_truth="7", extra_info={})
    row["prompt"].append({"role": "user", "content": "4 ="})
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    data = DataConfig(apply_chat_template=False)
    (prompt,) = load_prompts([str(path)], data, tokenizer).prompts
    assert tokenizer.decode(prompt.token_ids) == "3 + 4 ="
    assert not set(prompt.token_ids) & set(tokenizer.all_special_ids)


def test_ids_are_source_file_and_row_also_after_filtering(tmp_path, tokenizer):
    # Digits are single tokens: the template's 3 + "Say" + " " + the digits.
    first = write(tmp_path / "a.jsonl", ["Say 1", "Say 12345", "Say 3"])
    second = write(tmp_path / "b.jsonl", ["Say 4"], data_source="other")
    data = DataConfig(max_prompt_length=6, overlong_prompts="filter")
    loaded = load_prompts([first, second], data, tokenizer)
    assert [p.id for p in loaded.prompts] == ["demo/say/a/0", "demo/say/a/2", "other/b/0"]
    assert loaded.n_filtered == 1


def test_an_overlong_prompt_is_an_error_with_row_and_lengths(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", ["Say 1", "Say 12345"])
    with pytest.raises(UserError, match=r"a.jsonl:2: the prompt has 10 tokens, .*_length=8"):
        load_prompts([file], DataConfig(max_prompt_length=8), tokenizer)
    assert len(load_prompts([file], DataConfig(max_prompt_length=10), tokenizer).prompts) == 2


def test_nothing_left_after_filtering(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", ["Say 1"])
    data = DataConfig(max_prompt_length=2, overlong_prompts="filter")
    with pytest.raises(UserError, match="all 1 prompts are longer"):
        load_prompts([file], data, tokenizer)


def test_a_tokenizer_without_template_and_equal_file_names(tmp_path):
    bare = build_tokenizer(["Say "], 300)
    bare.chat_template = None
    file = write(tmp_path / "a.jsonl", ["Say 1"])
    with pytest.raises(UserError, match="no chat template; .*apply_chat_template=false"):
        load_prompts([file], DataConfig(), bare)
    (tmp_path / "more").mkdir()
    twin = write(tmp_path / "more" / "a.jsonl", ["Say 1"])
    with pytest.raises(UserError, match="have the same name"):
        load_prompts([file, twin], DataConfig(apply_chat_template=False), bare)
