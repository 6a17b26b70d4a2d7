"""Bytes between files and tensors, without a copy in between."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import BinaryIO

import torch

from gpg_megatron.errors import UserError

_LARGEST_READ = 1 << 30


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any element type; valid while the tensor lives."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(memory).cast("B")


def read_exactly(file: BinaryIO, out: memoryview, offset: int) -> None:
    """Fill out from a position in a file.

    Raises:
        UserError: the file ends before, or cannot be read.
    """
    done = 0
    while done < len(out):
        try:
            n = os.preadv(file.fileno(), [out[done : done + _LARGEST_READ]], offset + done)
        except OSError as error:
            raise UserError(f"{file.name}: {error.strerror}") from None
        if n == 0:
            raise UserError(
                f"{file.name} is truncated: it ends at byte {offset + done}, "
                f"and {len(out) - done} more are needed"
            )
        done += n


def write_exactly(file: BinaryIO, data: memoryview, offset: int) -> None:
    """Write all of data at a position in a file. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(file.fileno(), data[done : done + _LARGEST_READ], offset + done)


class Scratch:
    """Memory for one tensor at a time. It is used again: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, alone in its storage; valid until the next call."""
        n_bytes = math.prod(shape) * dtype.itemsize
        if n_bytes > len(self._memory):
            self._memory = mmap.mmap(-1, n_bytes)
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(self._memory)[:n_bytes]
        return torch.frombuffer(view, dtype=dtype).view(tuple(shape))


class Flusher:
    """Writes files to the disk while they are still being filled, in a thread of its own.

    The kernel would begin late, and the end of a large conversion would wait for all of it.
    """

    def __init__(self, files: Callable[[], Iterable[BinaryIO]]) -> None:
        self._files = files
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._failure: OSError | None = None

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.05):
                for file in list(self._files()):
                    os.fdatasync(file.fileno())
        except OSError as error:
            self._failure = error

    def __enter__(self) -> Flusher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Raises OSError: a file could not be written."""
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        for file in self._files():
            os.fsync(file.fileno())
