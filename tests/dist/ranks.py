"""Start a test's ranks."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

from gpg_megatron.host.reaper import RUN_ID_VARIABLE
from tests.dist.forker import Job

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 400
Device = Literal["cpu", "cuda"]
# Without a visible GPU the CPU path is what runs, on every machine.
CPU_ONLY = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}


def run_ranks(
    folder: Path, module: str, world_size: int, *arguments: str, device: Device = "cpu"
) -> str:
    """Run a module's main on every rank to its end, with FOLDER and arguments in sys.argv; what
    they printed. On CPU the ranks are forked, on a GPU torchrun starts them."""
    log = folder / f"{'-'.join(('world', str(world_size), *arguments))}.log"
    if device == "cpu":
        codes = fork_ranks(module, (str(folder), *arguments), world_size, log)
        return f"exit codes {codes}\n{log.read_text()}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world_size}", "-m", module, str(folder), *arguments]
    own = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
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


def fork_ranks(
    module: str, arguments: tuple[str, ...], world_size: int, log: Path, limit_s: float = LIMIT_S
) -> list[int]:
    """The ranks' exit codes; negative: the signal that ended a rank."""
    job = Job(
        module=module,
        arguments=arguments,
        world_size=world_size,
        environment=dict(os.environ) | CPU_ONLY,
        log=str(log),
        limit_s=limit_s,
    )
    log.touch()
    forker = _forker()
    assert forker.stdin and forker.stdout
    forker.stdin.write(job.line)
    forker.stdin.flush()
    codes: list[int] = json.loads(forker.stdout.readline())
    return codes


@functools.cache
def _forker() -> subprocess.Popen[str]:
    """Of this process, with whose end its input ends; of no run, whose end would be its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.dist.forker"],
        cwd=ROOT,
        env={k: x for k, x in (os.environ | CPU_ONLY).items() if k != RUN_ID_VARIABLE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
