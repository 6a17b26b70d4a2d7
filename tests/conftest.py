"""Shared by all tests: marks by folder, and the optional development data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).resolve().parent
DEVELOPMENT_DATA = Path(
    os.environ.get("GPG_DEVELOPMENT_DATA", TESTS.parent.parent / "shared" / "data")
)

# A busy machine makes single examples slow; pytest's own time limit covers real hangs.
settings.register_profile("gpg_megatron", deadline=None)
settings.load_profile("gpg_megatron")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """tests/dist, tests/stack and tests/gpu mark their tests; gpu ones need a device.

    With two workers (tests/run.sh) one has all tests that start engines, one after the other, and
    the other all that start ranks, then the rest, file by file: fixtures are made once.
    """
    for item in items:
        path = item.path.relative_to(TESTS)
        if (folder := path.parts[0]) in ("dist", "stack", "gpu"):
            item.add_marker(getattr(pytest.mark, folder))
        group = str(path) if folder == "unit" else folder
        item.add_marker(pytest.mark.xdist_group(group))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_cuda():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def development_data() -> Path:
    """The folder with gsm8k_*.jsonl, math_*.jsonl, ... beside the repository."""
    if not DEVELOPMENT_DATA.is_dir():
        pytest.skip(
            "no development data: neither ../shared/data nor the folder GPG_DEVELOPMENT_DATA"
        )
    return DEVELOPMENT_DATA
