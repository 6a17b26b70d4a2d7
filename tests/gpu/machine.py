"""What this machine has, as the kit's rows need it.

    python -m tests.gpu.machine auto|cpu|cuda      prints it as JSON

A process of its own asks: a driver that hangs does not hang the kit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from gpg_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ASK_LIMIT_S = 180
Need = Literal["a GPU", "two GPUs", "vLLM"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The device that rows run on, and what is beside it."""

    device: Literal["cpu", "cuda"]
    name: str
    """For example 2 x NVIDIA H100 80GB HBM3, or 2 CPU cores."""
    gpus: int
    """That may be used; 0 on cpu."""
    versions: str
    """Of Python, torch and what else is there, in one line."""
    has_vllm: bool


def describe(wanted: Literal["auto", "cpu", "cuda"]) -> Machine:
    """This machine. Raises UserError for cuda without a GPU."""
    import torch

    from gpg_megatron.host.device import resolve_device

    device = resolve_device(wanted)
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    name = f"{len(os.sched_getaffinity(0))} CPU cores"
    if gpus:
        name = torch.cuda.get_device_name()
        name = f"{gpus} x {name}" if gpus > 1 else name
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for module, shown in (("transformer_engine", "Transformer Engine"), ("vllm", "vLLM")):
        if importlib.util.find_spec(module):
            versions.append(f"with {shown}")
    return Machine(
        device=device,
        name=name,
        gpus=gpus,
        versions=", ".join(versions),
        has_vllm=importlib.util.find_spec("vllm") is not None,
    )


def ask_machine(wanted: str) -> Machine:
    """What describe says, from a process of its own.

    Raises:
        UserError: it cannot be told, with the last line of what was printed.
    """
    command = [sys.executable, "-m", "tests.gpu.machine", wanted]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=ASK_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"torch did not name its devices within {ASK_LIMIT_S} s") from None
    if done.returncode:
        raise UserError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return Machine(**json.loads(done.stdout.splitlines()[-1]))


def missing(need: Need, machine: Machine) -> str | None:
    """Why a row with this need cannot run here; None: it can. Two ranks need a GPU each, or none
    at all."""
    if need == "a GPU":
        return None if machine.device == "cuda" else "needs a GPU"
    if need == "two GPUs":
        return "needs two GPUs" if machine.gpus == 1 else None
    return None if machine.has_vllm else "needs vLLM"


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(describe(sys.argv[1]))))  # type: ignore[arg-type]
    except UserError as error:
        sys.exit(str(error))
