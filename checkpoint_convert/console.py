"""What the commands share: the progress bar, the last line, names of types."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from gpg_megatron.checkpoint.conversion import Converted
from gpg_megatron.types import DTYPES

CASTS = {**DTYPES, "fp16": torch.float16}
"""--dtype -> what tensors are cast to."""


@contextmanager
def progress_bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr for the block; yields what is to be called with the bytes just done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda n: bar.advance(task, n)


def say_done(result: Converted, target: Path, begin: float) -> None:
    """One line on stdout: what was written, how large, how fast."""
    seconds = time.perf_counter() - begin
    print(
        f"{target}: {result.n_tensors} tensors, {result.n_bytes / 1e9:.2f} GB in {seconds:.1f} s "
        f"({result.n_bytes / 1e9 / seconds:.2f} GB/s)"
    )
