"""Shared by all tests: marks by folder, and the optional development data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).resolve().parent
DEVELOPMENT_DATA = Path(
    os.environ.get("GPG_DEVELOPMENT_DATA", TESTS.parent.parent / "shared" / "data")
)

# A busy machine makes single examples slow; pytest's own time limit covers real hangs.
settings.register_profile("gpg_megatron", deadline=None)
settings.load_profile("gpg_megatron")


class _ByFolder(LoadScopeScheduling):  # type: ignore[misc]
    """With two workers (tests/run.sh) one has all tests that start engines, one after the other,
    the other all that start ranks and then the rest, file by file: fixtures are made once."""

    def _split_scope(self, nodeid: str) -> str:
        path = Path(nodeid.partition("::")[0])
        return str(path) if "unit" in path.parts else str(path.parent)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return _ByFolder(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """tests/dist, tests/stack and tests/gpu mark their tests; gpu ones need a device."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in ("dist", "stack", "gpu"):
            item.add_marker(getattr(pytest.mark, folder))
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
