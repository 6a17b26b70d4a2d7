"""A model's tokenizer, and problems as token ids.

problem -> text (chat template, or the contents joined) -> token ids, compared with the text
"""

from __future__ import annotations

import inspect
import re
import unicodedata
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gpg_megatron.config.sections import DataConfig
from gpg_megatron.data.schema import Problem
from gpg_megatron.errors import UserError, users_mistake
from gpg_megatron.model.json_file import read_object

SETTINGS = "tokenizer_config.json"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""Any of them is enough."""
JSON_FILES = (SETTINGS, "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
SHOWN = 20
"""Characters of a difference that are printed."""


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory.

    Raises:
        UserError: a file is missing or unreadable, or holds no tokens.
    """
    path = Path(directory)
    if not (path / SETTINGS).is_file():
        raise UserError(f"model.path: {path} has no {SETTINGS}")
    if not any((path / name).is_file() for name in VOCABULARIES):
        raise UserError(f"model.path: {path} has no tokenizer.json")
    with users_mistake(f"{path}: the tokenizer cannot be loaded", Exception):
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except Exception:
            # The library does not say which file it is: the first that is no JSON object.
            for file in filter(Path.is_file, (path / name for name in JSON_FILES)):
                read_object(file)
            raise
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise UserError(f"{path}: the tokenizer has no tokens but special ones")
    return tokenizer


def check_template(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    """Whether the tokenizer can render chats as the section wants them. Raises UserError."""
    if not data.apply_chat_template:
        return
    template = tokenizer.chat_template
    if not template:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; "
            "expected one, or data.apply_chat_template=false"
        )
    own = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in data.chat_template_kwargs:
        key = f"data.chat_template_kwargs.{name}"
        if name in own - {"tools", "documents"}:
            raise UserError(f"{key} is set by the run itself; expected an argument of the template")
        if not re.search(rf"\b{re.escape(name)}\b", str(template)):
            raise UserError(f"{key}: the chat template of {tokenizer.name_or_path} reads no {name}")


def check_stop(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
    """Whether each stop string can occur: special tokens are left out of a response's text, so one
    of them ends a response by itself or not at all.

    Raises:
        UserError
    """
    special = [x.content for x in tokenizer.added_tokens_decoder.values() if x.special]
    for text in stop:
        for token in special:
            if token in text and token != text:
                raise UserError(
                    f"rollout.stop: {text!r} holds the special token {token!r}, which is no part "
                    "of a response's text; expected the token alone, or a text without it"
                )


def text_of(problem: Problem, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str:
    """What is tokenised: the chat up to where the answer begins, or, without a template, the
    contents of the messages one after the other.

    Raises:
        UserError: the problem is empty, or the template refuses it.
    """
    contents = "".join(message["content"] for message in problem.messages)
    if not contents.strip():
        raise UserError(f"{problem.location}: the prompt is empty")
    if not data.apply_chat_template:
        return contents
    with users_mistake(
        f"{problem.location}: the chat template of {tokenizer.name_or_path}", Exception
    ):
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in problem.messages],
            tokenize=False,
            add_generation_prompt=True,
            **data.chat_template_kwargs,
        )
    assert isinstance(rendered, str), type(rendered)
    return rendered


def encode(
    text: str, location: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[int, ...]:
    """Token ids of a text, without special tokens that it does not hold itself.

    Args:
        location: of its row, for messages.
        vocab_size: of the model.

    Raises:
        UserError: there are no tokens, an unknown one, or one that the model does not have.
    """
    with users_mistake(f"{location}: the tokenizer", Exception):
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise UserError(f"{location}: the prompt has no tokens")
    if (largest := max(ids)) >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{location}: token {token!r} has the id {largest}, and the model's vocab_size is "
            f"{vocab_size}; expected the tokenizer of this model"
        )
    # Where a family has no token for the unknown, it is named as one that texts may hold.
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids and str(tokenizer.unk_token) not in text:
        raise UserError(
            f"{location}: the tokenizer does not know {_unknown_part(text, tokenizer)!r}; expected "
            "the tokenizer of this model, or another text"
        )
    return ids


def difference(text: str, ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Where the tokens say something else than the text, Unicode normalisation and white space
    aside; None: nowhere."""
    decoded = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(decoded, str), type(decoded)
    if decoded == text:
        return None
    wanted, found = _squeezed(text), _squeezed(decoded)
    if wanted == found:
        return None
    pairs = enumerate(zip_longest(wanted, found))
    at = next(i for i, (a, b) in pairs if a != b)
    start = max(0, at - SHOWN // 2)
    return f"{wanted[start : start + SHOWN]!r} became {found[start : start + SHOWN]!r}"


def _squeezed(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _unknown_part(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.is_fast:
        return f"a part of {text[:SHOWN]}"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    start, end = next(span for i, span in spans if i == tokenizer.unk_token_id)
    return text[start:end]
