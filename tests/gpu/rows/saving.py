"""A run that is cut in half and resumed, against one that is not."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gpg_megatron.host.device import Device
from tests.dist.checkpoint_problem import HALF, problem_of
from tests.dist.checkpoint_worker import exact
from tests.dist.problem import Layout, make_model
from tests.gpu.rows.world import one_rank


def resume(device: Device, folder: Path) -> str:
    """Weights, moments, results and random numbers, bit by bit, with either optimizer."""
    # Some of CUDA's kernels add in any order, unless they are told not to.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    layout = Layout()
    make_model(problem_of(layout), folder / problem_of(layout).name)
    with one_rank(device):
        for distributed in (False, True):
            verdict = exact(folder, (layout, distributed), device)
            assert verdict["resumed_at"] == HALF and verdict["moments"] >= 3, verdict
            assert not verdict["restored"], f"not restored: {verdict['restored']}"
            wrong = [key for key in ("results", "draws") if not verdict[key]] + verdict["end"]
            assert not wrong, f"distributed optimizer {distributed}: other {wrong[:5]}"
    return "weights, moments, results and random numbers are the same, with either optimizer"
