"""torch's profiler over single steps of single ranks: trainer.profile_steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from gpg_megatron.config.sections import TrainerConfig

Trace = Callable[[int], AbstractContextManager[None]]


def trace_of(config: TrainerConfig, rank: int) -> Trace:
    """step -> what its body runs in: the profiler, where step and rank are asked for."""
    folder = Path(config.output_dir) / "profile"

    def trace(step: int) -> AbstractContextManager[None]:
        if step not in config.profile_steps or rank not in config.profile_ranks:
            return nullcontext()
        return traced(folder / f"step_{step}_rank_{rank}.json.gz")

    return trace


@contextmanager
def traced(file: Path) -> Iterator[None]:
    """What this process computes in the body, for Perfetto or chrome://tracing: operations with
    their shapes and, on a GPU, kernels."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_initialized():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as found:
        yield
    file.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(file))
