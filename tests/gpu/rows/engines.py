"""What needs vLLM: the tests of this folder, each a row."""

from __future__ import annotations

from pathlib import Path

from gpg_megatron.host.device import Device

TESTS = Path(__file__).resolve().parents[1]


def engine(device: Device, folder: Path) -> str:
    """Publishing into an engine of vLLM, which then computes with the weights."""
    return _passes("test_bridge_gpu.py", folder)


def sleep(device: Device, folder: Path) -> str:
    """An engine gives its memory back, and wakes with the same weights."""
    return _passes("test_sleep_gpu.py", folder)


def colocated(device: Device, folder: Path) -> str:
    """A whole job whose engine and policy share one GPU."""
    return _passes("test_placement_gpu.py", folder)


def _passes(name: str, folder: Path) -> str:
    import pytest

    notes = Notes()
    code = pytest.main(
        ["-x", "-q", "--basetemp", str(folder / "tests"), str(TESTS / name)], [notes]
    )
    assert code == 0, notes.failed or f"pytest ended with {code!r}"
    return "; ".join(notes.passed)


class Notes:
    """What pytest's tests came to."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed = ""

    def pytest_runtest_logreport(self, report: object) -> None:
        """Called by pytest."""
        from pytest import TestReport

        assert isinstance(report, TestReport)
        name = report.nodeid.rpartition("::")[2]
        if report.failed:
            self.failed = f"{name}: {report.longreprtext.strip().splitlines()[-1]}"
        elif report.when == "call":
            self.passed.append(f"{name} passed in {report.duration:.0f} s")
