"""Problems -> prompts: rendering with a tokenizer, and the length limit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gpg_megatron.config import DataConfig
from gpg_megatron.data.schema import Problem, read_problems
from gpg_megatron.errors import UserError
from gpg_megatron.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPrompts:
    """What a list of files holds."""

    prompts: tuple[Prompt, ...]
    """In file order, then row order."""
    n_filtered: int
    """Rows left out because their prompt was longer than max_prompt_length."""


def render(
    problem: Problem, tokenizer: PreTrainedTokenizerBase, apply_chat_template: bool
) -> tuple[int, ...]:
    """Token ids of one problem, up to where the answer begins.

    With apply_chat_template the tokenizer's template is applied with the generation prompt;
    without, the contents of the messages are joined as they are and tokenised without special
    tokens.

    Raises:
        UserError: the tokenizer has no chat template, or the prompt is empty.
    """
    if apply_chat_template:
        if not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; "
                "expected one, or data.apply_chat_template=false"
            )
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in problem.messages],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
        )
    else:
        text = "".join(message["content"] for message in problem.messages)
        ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise UserError(f"{problem.location}: the prompt has no tokens")
    return tuple(ids)


def load_prompts(
    files: Sequence[str], data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> LoadedPrompts:
    """Read the files and render every row.

    A prompt's id is "<data_source>/<file stem>/<row>", rows counted from 0.

    Raises:
        UserError: a file or row is unusable, two files give the same ids, a prompt is longer
            than data.max_prompt_length while data.overlong_prompts is "error", or no prompt
            is left.
    """
    _require_distinct_stems(files)
    prompts: list[Prompt] = []
    n_filtered = 0
    for file in files:
        for row, problem in enumerate(read_problems(file)):
            ids = render(problem, tokenizer, data.apply_chat_template)
            if len(ids) > data.max_prompt_length:
                _refuse_unless_filtered(problem, len(ids), data)
                n_filtered += 1
                continue
            prompts.append(_prompt(problem, ids, f"{Path(file).stem}/{row}"))
    if not prompts:
        raise UserError(
            f"{', '.join(files)}: all {n_filtered} prompts are longer than "
            f"data.max_prompt_length={data.max_prompt_length}; expected at least one that fits"
        )
    return LoadedPrompts(prompts=tuple(prompts), n_filtered=n_filtered)


def _prompt(problem: Problem, ids: tuple[int, ...], row_id: str) -> Prompt:
    return Prompt(
        id=f"{problem.data_source}/{row_id}",
        token_ids=ids,
        messages=problem.messages,
        ground_truth=problem.ground_truth,
        data_source=problem.data_source,
    )


def _refuse_unless_filtered(problem: Problem, length: int, data: DataConfig) -> None:
    if data.overlong_prompts == "error":
        raise UserError(
            f"{problem.location}: the prompt has {length} tokens, more than "
            f"data.max_prompt_length={data.max_prompt_length}; "
            "raise it or set data.overlong_prompts=filter"
        )


def _require_distinct_stems(files: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for file in files:
        stem = Path(file).stem
        if stem in seen:
            raise UserError(
                f"data files {seen[stem]} and {file} have the same name; "
                "expected different names, since they become part of the prompt ids"
            )
        seen[stem] = file
