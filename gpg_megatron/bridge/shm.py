"""Shared memory between a policy rank and engine workers on the same host.

The file's name exists only until every reader has attached; after that the memory lives as
long as the processes that map it, so nothing is left behind whatever dies.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

_ROOT = Path("/dev/shm")


class Segment:
    """A mapped run of bytes, seen by its writer and its readers."""

    def __init__(self, name: str, n_bytes: int, *, create: bool) -> None:
        """Map /dev/shm/<name>; the creator makes the file, readers must find it."""
        self.path = _ROOT / name
        if create:
            # O_EXCL: a name of another run is an error, not a segment to share.
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            os.posix_fallocate(descriptor, 0, n_bytes)
            os.close(descriptor)
        elif not self.path.exists():
            raise RuntimeError(
                f"shared-memory segment {self.path} is not on this host; engines must run on "
                f"the host of the policy ranks"
            )
        self.data = torch.from_file(str(self.path), shared=True, size=n_bytes, dtype=torch.uint8)

    def unlink(self) -> None:
        """Remove the name; the mappings stay valid."""
        self.path.unlink(missing_ok=True)
