"""Bytes between files and tensors, without a copy in between."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO

import torch

from gpg_megatron.errors import UserError

_LARGEST_WRITE = 1 << 30


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any element type."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_exactly(file: BinaryIO, out: torch.Tensor, offset: int) -> None:
    """Fill a contiguous tensor from a position in a buffered file.

    Raises:
        UserError: the file ends before, or cannot be read.
    """
    try:
        file.seek(offset)
        done = file.readinto(as_bytes(out))  # type: ignore[attr-defined]
    except OSError as error:
        raise UserError(f"{file.name}: {error.strerror}") from None
    if done < out.nbytes:
        raise UserError(
            f"{file.name} is truncated: it ends at byte {offset + done}, "
            f"and {out.nbytes - done} more are needed"
        )


def write_exactly(file: BinaryIO, data: torch.Tensor, offset: int) -> None:
    """Write a contiguous tensor at a position in a file. Raises OSError."""
    left = as_bytes(data)
    while left:
        done = os.pwrite(file.fileno(), left[:_LARGEST_WRITE], offset)
        left, offset = left[done:], offset + done


@contextmanager
def flushed(files: Callable[[], Iterable[BinaryIO]]) -> Iterator[None]:
    """Files that are filled in the block are on the disk, and closed, at its end.

    A thread begins early: the kernel would begin late, and the end of a large conversion would
    wait for all of it.

    Args:
        files: gives those that are open now.

    Raises:
        OSError: a file could not be written.
    """
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.05):
            for file in list(files()):
                os.fdatasync(file.fileno())

    try:
        with ThreadPoolExecutor(1) as pool:
            runs = pool.submit(run)
            try:
                yield
            finally:
                stop.set()
        runs.result()
        for file in files():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files():
            file.close()
