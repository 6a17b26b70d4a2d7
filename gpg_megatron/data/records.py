"""Raw records of a file or of a data set on Hugging Face, each with the place it stands at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gpg_megatron.errors import UserError, users_mistake
from gpg_megatron.model.json_file import IS_POINTER, POINTER

BATCH_ROWS = 256
"""Of parquet, decoded at once."""

Located = Iterator[tuple[str, Any]]
"""(location, record), for messages."""


def read_file(path: Path, columns: Sequence[str] | None = None) -> Located:
    """The records of a jsonl or parquet file, at "<file>:<line>" or "<file>: row <n>", from 1.

    Args:
        columns: of parquet; these alone are read, and all of them must be there.

    Raises:
        UserError: the file is missing, of another type or malformed.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path}: unknown file type; expected .parquet or .jsonl")
    if not path.is_file():
        raise UserError(f"data file not found: {path}")
    return _lines(path) if path.suffix == ".jsonl" else _rows(path, columns)


def read_hub(name: str, config: str | None, split: str) -> Iterable[Any]:
    """The records of one split of a data set on Hugging Face. Raises UserError."""
    # Imported here: it takes a second, and local sources need none of it.
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    names = (name,) if config is None else (name, config)
    try:
        records: Iterable[Any] = load_dataset(*names, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name}: cannot load the data set: {reason}; "
            "expected a connection to Hugging Face, or --source with a local file or folder"
        ) from None
    return records


def numbered(records: Iterable[Any], where: str) -> Located:
    """Records at "<where> row <n>", from 1."""
    return ((f"{where} row {number}", record) for number, record in enumerate(records, start=1))


def _lines(path: Path) -> Located:
    """Blank lines are counted and passed over."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1 and line.startswith(POINTER):
                    raise UserError(f"{path}: {IS_POINTER}")
                if line.strip():
                    yield f"{path}:{number}", _parsed(line, f"{path}:{number}")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected jsonl") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _parsed(line: str, where: str) -> Any:
    # Python has limits on the digits of an integer and on the depth of nested lists.
    with users_mistake(where, ValueError, RecursionError):
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None


def _rows(path: Path, columns: Sequence[str] | None) -> Located:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in columns or () if name not in names]
            if missing:
                raise UserError(f"{path}: no column {missing[0]!r}; found {', '.join(names)}")
            # Not at once: an array of texts holds 2 GiB at most.
            batches = file.iter_batches(BATCH_ROWS, columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from numbered(rows, f"{path}:")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {error}") from None
