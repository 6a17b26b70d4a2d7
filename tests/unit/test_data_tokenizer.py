"""Tokens against their text, and the arguments of chat templates."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gpg_megatron.config.sections import DataConfig
from gpg_megatron.data.prompts import render_all
from gpg_megatron.data.schema import Problem
from gpg_megatron.errors import UserError
from tests.tiny import _byte_tokenizer


def problem(content: str) -> Problem:
    return Problem(
        data_source="d",
        messages=({"role": "user", "content": content},),
        ground_truth="1",
        extra_info={},
        location="a.jsonl:1",
    )


def words(*known: str, **options: Any) -> PreTrainedTokenizerBase:
    """A tokenizer that knows these words."""
    vocab = {word: i for i, word in enumerate(["<unk>", *known])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **options)


def warnings(tokenizer: PreTrainedTokenizerBase, *contents: str, **data: Any) -> tuple[str, ...]:
    config = DataConfig(**{"apply_chat_template": False, **data})
    return render_all({"a": [problem(x) for x in contents]}, config, tokenizer, 400).warnings


def test_a_word_that_the_tokenizer_does_not_know_is_named() -> None:
    tokenizer = words("one", "two", unk_token="<unk>")
    assert warnings(tokenizer, "one two") == ()
    with pytest.raises(UserError, match=r"a\.jsonl:1: the tokenizer does not know 'three'"):
        warnings(tokenizer, "one three two")
    # Whoever writes it means it.
    assert warnings(tokenizer, "one<unk>two") == ()


def test_only_another_text_is_a_warning() -> None:
    """Fuse leaves white space out, NFKC makes one letter of the ligature."""
    assert warnings(words("one", "fish"), "one  \n ﬁsh") == ()
    assert warnings(_byte_tokenizer(), "naïve  \n ﬁsh 魚") == ()
    lost = "the tokens of 1 prompts do not decode to their text: a.jsonl:1: 'onethreetwo' became "
    (line,) = warnings(words("one", "two"), "one two", "one three two")
    assert line == lost + "'one<unk>two'"


def test_arguments_of_the_template_reach_it() -> None:
    tokenizer = _byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{% if not thinking %}!{% endif %}{{ tail }}"

    def text(**arguments: Any) -> str:
        data = DataConfig(chat_template_kwargs=arguments)
        (prompt,) = render_all({"a": [problem("1+1")]}, data, tokenizer, 400).prompts
        return str(tokenizer.decode(prompt.token_ids.tolist()))

    assert text() == "1+1!"
    assert text(thinking=True) == "1+1"
    assert text(thinking=True, tail="?") == "1+1?"
    with pytest.raises(UserError, match="chat_template_kwargs.thinkin: the chat template of .* no"):
        text(thinkin=True)
