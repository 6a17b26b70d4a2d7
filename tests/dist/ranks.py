"""Start a test's ranks under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 400
Device = Literal["cpu", "cuda"]


def run_ranks(
    folder: Path, module: str, world_size: int, *arguments: str, device: Device = "cpu"
) -> str:
    """Run `python -m module FOLDER arguments` on every rank to its end; what they printed."""
    log = folder / f"{'-'.join(('world', str(world_size), *arguments))}.log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world_size}", "-m", module, str(folder), *arguments]
    own = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if device == "cpu":
        # Without a visible GPU the CPU path is what runs, on every machine.
        own["CUDA_VISIBLE_DEVICES"] = ""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | own, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            print(f"no end after {LIMIT_S} s", file=file)
        finally:
            # Each rank has a session of its own: only the launcher can end them all.
            process.terminate()
            process.wait(timeout=60)
    return f"exit code {process.returncode}\n{log.read_text()}"
