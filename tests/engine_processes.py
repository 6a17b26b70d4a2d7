"""The processes of vLLM engines that a private Ray started."""

from __future__ import annotations

import os

import psutil


def engine_processes(owner: int | None = None) -> list[psutil.Process]:
    """Actors, cores and workers below a process, this one where none is named."""
    below = psutil.Process(owner or os.getpid()).children(recursive=True)
    actors = [process for process in below if process.name().startswith("ray::Engine")]
    return [*actors, *(child for actor in actors for child in actor.children(recursive=True))]
