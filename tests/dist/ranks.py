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
LIMIT_S = 900.0  # a busy machine
Device = Literal["cpu", "cuda"]
OWN = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
# Without a visible GPU the CPU path is what runs, on every machine.
ON_CPU = {**OWN, "CUDA_VISIBLE_DEVICES": ""}


def run_ranks(
    folder: Path, module: str, world_size: int, *arguments: str, device: Device = "cpu"
) -> str:
    """Run a module's main with FOLDER and arguments on every rank to its end; what was printed."""
    log = folder / f"{'-'.join(('world', str(world_size), *arguments))}.log"
    start = fork_ranks if device == "cpu" else torchrun
    codes = start(module, (str(folder), *arguments), world_size, log)
    return f"exit codes {codes}\n{log.read_text()}"


def fork_ranks(
    module: str, arguments: tuple[str, ...], world_size: int, log: Path, limit_s: float = LIMIT_S
) -> list[int]:
    """Ranks on CPU, from a process that has imported what they need; the exit codes, that of a
    signal negative. No rank outlives another one that fails, nor the limit."""
    job = Job(
        module=module,
        arguments=arguments,
        world_size=world_size,
        environment=dict(os.environ) | ON_CPU,
        log=str(log),
        limit_s=limit_s,
    )
    log.touch()
    forker = _forker()
    assert forker.stdin and forker.stdout
    forker.stdin.write(job.line)
    forker.stdin.flush()
    answer = forker.stdout.readline()
    assert answer, f"the process that forks ranks has ended with code {forker.wait(timeout=60)}"
    codes: list[int] = json.loads(answer)
    return codes


def _forker() -> subprocess.Popen[str]:
    """A new one in place of one that has ended: that fails one test, not all that follow."""
    if _started().poll() is not None:
        _started.cache_clear()
    return _started()


@functools.cache
def _started() -> subprocess.Popen[str]:
    """Of this process, with whose end its input ends; of no run, whose end would be its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.dist.forker"],
        cwd=ROOT,
        env={k: x for k, x in (os.environ | ON_CPU).items() if k != RUN_ID_VARIABLE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def torchrun(
    module: str, arguments: tuple[str, ...], world_size: int, log: Path, limit_s: float = LIMIT_S
) -> list[int]:
    """Ranks on GPUs, which a process that was forked cannot use; the launcher's exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world_size}", "-m", module, *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | OWN, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            print(f"no end after {limit_s} s", file=file)
        finally:
            # Each rank has a session of its own: only the launcher can end them all.
            process.terminate()
            process.wait(timeout=60)
    return [process.returncode]
