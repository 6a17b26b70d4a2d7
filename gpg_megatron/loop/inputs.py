"""Everything that can be found wrong before a process or an engine is started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gpg_megatron.checkpoint.marker import HF_FILES
from gpg_megatron.checkpoint.resume import check_marker
from gpg_megatron.config.sections import Config
from gpg_megatron.errors import UserError
from gpg_megatron.host.lock import check_free
from gpg_megatron.layout.hf_io import check_checkpoint
from gpg_megatron.model.hub import local_directory
from gpg_megatron.model.layout_rules import check_engine_packages, check_engine_type, check_layout
from gpg_megatron.model.shape import load_model_shape
from gpg_megatron.observe.loggers import check_logging
from gpg_megatron.reward.sources import check_prompts
from gpg_megatron.reward.trial import try_custom_function
from gpg_megatron.rollout.engine_args import check_engine_args
from gpg_megatron.shapes import ModelShape
from gpg_megatron.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The problems of a run, tokenised."""

    train_prompts: tuple[Prompt, ...]
    val_prompts: tuple[Prompt, ...]
    per_file: tuple[int, ...]
    """How many training prompts each file gave."""
    n_filtered: int
    """Training rows left out because their prompt was too long."""
    warnings: tuple[str, ...]
    """What is legal and yet likely not meant, one line each."""


def check_output(config: Config) -> None:
    """The run directory can be made, and no other run is in it. Nothing is written yet.

    Raises:
        UserError
    """
    path = Path(config.trainer.output_dir).absolute()
    parent = next(p for p in (path, *path.parents) if p.exists())
    if not parent.is_dir():
        raise UserError(f"trainer.output_dir {path}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"trainer.output_dir {path}: {parent} is not writable")
    check_free(path)


def is_converted(config: Config) -> bool:
    """Whether model.path is a Megatron checkpoint and not a Hugging Face directory."""
    return (local_directory(config.model) / HF_FILES / "config.json").is_file()


def model_files(config: Config) -> Path:
    """The directory with config.json and the tokenizer."""
    path = local_directory(config.model)
    return path / HF_FILES if is_converted(config) else path


def check_model(config: Config) -> ModelShape:
    """The model's shape, checked against the parallel layout and the checkpoint's tensors; and
    what vLLM is to be told.

    Raises:
        UserError
    """
    from gpg_megatron.host.device import resolve_device

    path, converted = local_directory(config.model), is_converted(config)
    shape = load_model_shape(model_files(config), need_weights=not converted)
    check_layout(config, shape)
    check_engine_type(config, shape, resolve_device(config.trainer.device))
    check_engine_args(config.rollout)
    check_engine_packages(shape)
    if converted:
        check_marker(path, shape)
    else:
        check_checkpoint(path, shape)
    return shape


def load_inputs(config: Config, shape: ModelShape) -> Inputs:
    """Read and tokenise the data, and check that every row can be scored.

    Raises:
        UserError
    """
    # Importing transformers takes seconds, and only rank 0 and the launcher need it.
    from gpg_megatron.data.prompts import load_prompts
    from gpg_megatron.data.tokenizer import check_stop, load_tokenizer

    check_logging(config.logging)
    tokenizer, data = load_tokenizer(model_files(config)), config.data
    check_stop(tokenizer, config.rollout.stop)
    train = load_prompts(data.train_files, data, tokenizer, shape.vocab_size)
    val: tuple[Prompt, ...] = ()
    warnings = train.warnings
    if data.val_files:
        held_out = load_prompts(data.val_files, data, tokenizer, shape.vocab_size)
        val = held_out.prompts[: data.val_max_rows]
        warnings += held_out.warnings
    check_prompts((*train.prompts, *val), config.reward)
    try_custom_function((*train.prompts, *val), config.reward)
    return Inputs(
        train_prompts=train.prompts,
        val_prompts=val,
        per_file=train.per_file,
        n_filtered=train.n_filtered,
        warnings=warnings,
    )
