"""Problems -> prompts: rendering with a tokenizer, and the length limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from gpg_megatron.config.sections import DataConfig
from gpg_megatron.data.schema import Problem, read_problems
from gpg_megatron.data.tokenizer import check_template, difference, encode, text_of
from gpg_megatron.errors import UserError
from gpg_megatron.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPrompts:
    """What a list of files holds."""

    prompts: tuple[Prompt, ...]
    """In file order, then row order."""
    per_file: tuple[int, ...]
    """How many of them each file, or list of problems, gave."""
    n_filtered: int
    """Rows left out because their prompt was longer than max_prompt_length."""
    warnings: tuple[str, ...]
    """What is legal and yet likely not meant, one line each."""


def load_prompts(
    files: Sequence[str], data: DataConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> LoadedPrompts:
    """Read the files and render every row for a model with vocab_size tokens.

    A prompt's id is "<data_source>/<label of the file>/<row>", rows counted from 0; the label is
    the file's name without ending, with as many folders before it as tell equal names apart.

    Raises:
        UserError: a file or row is unusable, a file is named twice, or as render_all.
    """
    labels = file_labels(files)
    problems = [read_problems(file, data.custom_class) for file in files]
    return render_all(dict(zip(labels, problems, strict=True)), data, tokenizer, vocab_size)


def render_all(
    problems: Mapping[str, Sequence[Problem]],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
) -> LoadedPrompts:
    """Render lists of problems, each under the label that load_prompts gives to a file.

    Raises:
        UserError: a prompt cannot be rendered or tokenised, is longer than
            data.max_prompt_length while data.overlong_prompts is "error", or none is left.
    """
    check_template(tokenizer, data)
    prompts: list[Prompt] = []
    per_list = []
    n_filtered = 0
    differences: list[str] = []
    for label, rows in problems.items():
        before = len(prompts)
        for row, problem in enumerate(rows):
            problem = _with_system_prompt(problem, data.system_prompt)
            text = text_of(problem, tokenizer, data)
            ids = encode(text, problem.location, tokenizer, vocab_size)
            if changed := difference(text, ids, tokenizer):
                differences.append(f"{problem.location}: {changed}")
            if _fits(len(ids), problem.location, data):
                prompt = Prompt(
                    id=f"{problem.data_source}/{label}/{row}",
                    token_ids=np.array(ids, np.int32),
                    messages=problem.messages,
                    ground_truth=problem.ground_truth,
                    data_source=problem.data_source,
                    extra_info=problem.extra_info,
                )
                prompts.append(prompt)
            else:
                n_filtered += 1
        per_list.append(len(prompts) - before)
    if not prompts:
        raise UserError(
            f"{', '.join(problems)}: all {n_filtered} prompts are longer than "
            f"data.max_prompt_length={data.max_prompt_length}; expected at least one that fits"
        )
    warnings: tuple[str, ...] = ()
    if differences:
        warnings = (
            f"the tokens of {len(differences)} prompts do not decode to their text: "
            f"{differences[0]}",
        )
    return LoadedPrompts(
        prompts=tuple(prompts),
        per_file=tuple(per_list),
        n_filtered=n_filtered,
        warnings=warnings,
    )


def _fits(n_tokens: int, location: str, data: DataConfig) -> bool:
    if n_tokens > data.max_prompt_length and data.overlong_prompts == "error":
        raise UserError(
            f"{location}: the prompt has {n_tokens} tokens, more than "
            f"data.max_prompt_length={data.max_prompt_length}; "
            "raise it or set data.overlong_prompts=filter"
        )
    return n_tokens <= data.max_prompt_length


def _with_system_prompt(problem: Problem, text: str | None) -> Problem:
    """The problem with a system message in front, unless it has one or text is None."""
    if text is None or problem.messages[0]["role"] == "system":
        return problem
    system = {"role": "system", "content": text}
    return replace(problem, messages=(system, *problem.messages))


def file_labels(files: Sequence[str]) -> list[str]:
    """A short name for each file, different for all of them.

    Raises:
        UserError: a file is named twice.
    """
    paths = [Path(file).resolve().with_suffix("") for file in files]
    twice = next((i for i, path in enumerate(paths) if path in paths[:i]), None)
    if twice is not None:
        first = files[paths.index(paths[twice])]
        raise UserError(
            f"data files {first} and {files[twice]} have the same name; expected different "
            f"files, since their names become part of the prompt ids"
        )
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
