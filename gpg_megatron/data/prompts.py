"""Problems -> prompts: rendering with a tokenizer, and the length limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gpg_megatron.config.sections import DataConfig
from gpg_megatron.data.schema import Problem, read_problems
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

    A prompt's id is "<data_source>/<label of the file>/<row>", rows counted from 0; the label is
    the file's name without ending, with as many folders before it as tell equal names apart.

    Raises:
        UserError: a file or row is unusable, a file is named twice, a prompt is longer than
            data.max_prompt_length while data.overlong_prompts is "error", or no prompt is
            left (of a file, when data.train_weights gives each a share).
    """
    labels = file_labels(files)
    problems = [read_problems(file, data.custom_class) for file in files]
    return render_all(dict(zip(labels, problems, strict=True)), data, tokenizer)


def render_all(
    problems: Mapping[str, Sequence[Problem]], data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> LoadedPrompts:
    """Render lists of problems, each under the label that load_prompts gives to a file.

    Raises:
        UserError: a prompt is too long and not to be left out, or none is left.
    """
    prompts: list[Prompt] = []
    per_list = []
    n_filtered = 0
    for label, rows in problems.items():
        before = len(prompts)
        for row, problem in enumerate(rows):
            problem = _with_system_prompt(problem, data.system_prompt)
            ids = render(problem, tokenizer, data.apply_chat_template)
            if len(ids) <= data.max_prompt_length:
                prompt = Prompt(
                    id=f"{problem.data_source}/{label}/{row}",
                    token_ids=ids,
                    messages=problem.messages,
                    ground_truth=problem.ground_truth,
                    data_source=problem.data_source,
                )
                prompts.append(prompt)
            elif data.overlong_prompts == "error":
                raise UserError(
                    f"{problem.location}: the prompt has {len(ids)} tokens, more than "
                    f"data.max_prompt_length={data.max_prompt_length}; "
                    "raise it or set data.overlong_prompts=filter"
                )
            else:
                n_filtered += 1
        per_list.append(len(prompts) - before)
    if not prompts:
        raise UserError(
            f"{', '.join(problems)}: all {n_filtered} prompts are longer than "
            f"data.max_prompt_length={data.max_prompt_length}; expected at least one that fits"
        )
    return LoadedPrompts(prompts=tuple(prompts), per_file=tuple(per_list), n_filtered=n_filtered)


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
