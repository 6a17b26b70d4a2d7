"""Where the model of the configuration lies.

model.path is a directory            that one
... a Hugging Face Hub id, ORG/NAME  the snapshot in the local cache, fetched by gpg-train and
                                     gpg-eval when it is not whole
only the shape is wanted             also config.json alone, that of the package or the Hub's
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from gpg_megatron.config.sections import ModelConfig
from gpg_megatron.errors import UserError
from gpg_megatron.model.json_file import read_object

SHAPES = Path(__file__).parent / "shapes"
"""<model.path>/config.json for those of the shipped configurations."""
INDEX = "model.safetensors.index.json"
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "*.md")
"""What is fetched: no weights of other formats."""


def local_directory(model: ModelConfig) -> Path:
    """The directory of the model on this host; nothing is fetched, and it may not exist.

    Raises:
        UserError: a revision of something that has none.
    """
    if _is_hub_id(model):
        return _cached(model) or Path(model.path)
    return Path(model.path)


def fetched(model: ModelConfig) -> ModelConfig:
    """With a model of the Hub in the local cache, and its revision named by the commit.

    Raises:
        UserError: it is not there and cannot be fetched.
    """
    if not _is_hub_id(model):
        return model
    directory = _cached(model)
    if directory is None or _missing(directory):
        directory = _fetch(model, FILES)
    if missing := _missing(directory):  # offline, a part of a model is all that is found
        raise UserError(
            f"model.path: {model.path} has no {missing} in {directory}; where there is a network, "
            f"{_way_out(model)}"
        )
    return replace(model, revision=directory.name)


def shape_directory(model: ModelConfig) -> Path:
    """A directory with the model's config.json, if there is one; the package has some.

    Raises:
        UserError: it cannot be fetched.
    """
    directory = local_directory(model)
    packaged = SHAPES / model.path
    if directory.is_dir() or Path(model.path).is_absolute():
        return directory
    if (packaged / "config.json").is_file():
        return packaged
    return _fetch(model, ("config.json",)) if _is_hub_id(model) else directory


def _is_hub_id(model: ModelConfig) -> bool:
    """Raises UserError."""
    is_id = not Path(model.path).is_dir() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model.path)
    if model.revision and not is_id:
        raise UserError(
            f"model.revision is {model.revision}, but model.path {model.path} is no model of the "
            "Hugging Face Hub; expected ORG/NAME, or no revision"
        )
    return bool(is_id)


def _cached(model: ModelConfig) -> Path | None:
    """The snapshot, whole or not, in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
    )

    try:
        found = snapshot_download(model.path, revision=model.revision, local_files_only=True)
    except IncompleteSnapshotError as error:  # by the list of files; only some are needed here
        return Path(error.snapshot_path)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(found)


def _missing(directory: Path) -> str | None:
    """The first file that a run needs and has not. Raises UserError: the index is damaged."""
    needed = ["config.json", "tokenizer_config.json"]
    if (directory / INDEX).is_file():
        weight_map = read_object(directory / INDEX).get("weight_map")
        needed += sorted(map(str, weight_map.values())) if isinstance(weight_map, dict) else []
    elif not any(directory.glob("*.safetensors")):
        needed.append("*.safetensors")
    return next((name for name in needed if not (directory / name).is_file()), None)


def _fetch(model: ModelConfig, files: tuple[str, ...]) -> Path:
    """Progress is shown on stderr. Raises UserError."""
    from huggingface_hub import is_offline_mode, snapshot_download

    try:
        found = snapshot_download(model.path, revision=model.revision, allow_patterns=[*files])
    except Exception as error:  # of many libraries: HTTP, TLS, the disk, the Hub's own answers
        said = "HF_HUB_OFFLINE is set" if is_offline_mode() else str(error) or repr(error)
        reason = said.splitlines()[0].removeprefix("Got: ").partition(". ")[0].rstrip(".")
        raise UserError(
            f"model.path: {model.path} is no directory, not in the Hugging Face cache, and cannot "
            f"be fetched ({reason}); where there is a network, {_way_out(model)}"
        ) from None
    return Path(found)


def _way_out(model: ModelConfig) -> str:
    revision = f" --revision {model.revision}" if model.revision else ""
    command = f"`hf download {model.path}{revision} --local-dir DIR`"
    return f"{command} gets it, and model.path=DIR takes it"
