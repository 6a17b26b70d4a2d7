"""Kill a saving run at random moments and let it resume, many times.

    python -m tests.dist.checkpoint_kills FOLDER KILLS

FOLDER/kills.json says what happened. A life is two forked ranks, so that imports are paid once.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpg_megatron.checkpoint.marker import MARKER, read_marker
from gpg_megatron.checkpoint.store import list_saved
from gpg_megatron.config.sections import CheckpointConfig, Config
from gpg_megatron.policy.on_cpu import quiet_megatron
from tests.dist.checkpoint_problem import problem_of, run_config
from tests.dist.problem import Layout, make_samples

quiet_megatron()
from tests.dist.checkpoint_run import PolicyRun, digest  # noqa: E402

LAYOUT = Layout(dp=2)
LIFE_LIMIT_S = 60.0
N_STEPS = 10_000


def main() -> None:
    folder, n_kills = Path(sys.argv[1]), int(sys.argv[2])
    random.seed(5)
    config = _config(folder)
    root = config.trainer.checkpoint_root
    notes = folder / "notes"
    notes.mkdir()
    resumed = incomplete = 0
    period = 0.0
    wrong: list[str] = []
    for life in range(n_kills):
        before = [s for s in list_saved(root) if s.complete]
        ranks, session = _start(config, notes, life)
        begun = _wait_for(notes / f"life{life}.json", ranks)
        expected = before[-1].step if before else 0
        if begun["step"] != expected:
            wrong.append(f"life {life} began at {begun['step']}; newest complete: {expected}")
        resumed += begun["step"] > 0
        if life == 0:
            begin = time.monotonic()
            _wait_for(root / "step_1" / MARKER, ranks)
            period = time.monotonic() - begin
        # Within about the next save, and at any moment of it.
        time.sleep(random.uniform(0.0, 1.2 * period))
        _kill(ranks, session)
        # A checkpoint that says it is complete must be, whenever the kill came.
        for saved in list_saved(root):
            incomplete += not saved.complete
            if saved.complete:
                read_marker(saved.path)
    wrong += _contradictions(notes)
    seen = {"kills": n_kills, "resumed": resumed, "incomplete": incomplete, "wrong": wrong}
    (folder / "kills.json").write_text(json.dumps(seen))


def _config(folder: Path) -> Config:
    problem = problem_of(LAYOUT)
    config = run_config((LAYOUT, True), problem, folder, "killed")
    return dataclasses.replace(
        config,
        trainer=dataclasses.replace(config.trainer, total_training_steps=N_STEPS),
        checkpoint=CheckpointConfig(save_freq=1, keep_last=2),
    )


def _start(config: Config, notes: Path, life: int) -> tuple[list[Any], Path]:
    context = multiprocessing.get_context("fork")
    meeting = Path(tempfile.mkdtemp())
    ranks = [
        context.Process(target=_live, args=(config, notes, life, rank, meeting / "store"))
        for rank in range(LAYOUT.world_size)
    ]
    for process in ranks:
        process.start()
    return ranks, meeting


def _live(config: Config, notes: Path, life: int, rank: int, store: Path) -> None:
    """One rank: resume, then train and save until killed. Rank 0 notes every state it has."""
    os.setsid()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=LAYOUT.world_size
    )
    run = PolicyRun(config, make_samples(problem_of(LAYOUT)))

    def note(run: PolicyRun) -> None:
        with (notes / f"states{rank}.txt").open("a") as file:
            file.write(f"{run.step} {digest(run.state())}\n")

    note(run)
    if rank == 0:
        part = notes / f"life{life}.part"
        part.write_text(json.dumps({"step": run.step}))
        part.rename(part.with_suffix(".json"))
    run.advance(N_STEPS, note)


def _wait_for(path: Path, ranks: list[Any]) -> dict[str, Any]:
    deadline = time.monotonic() + LIFE_LIMIT_S
    while not path.exists():
        for process in ranks:
            assert process.is_alive(), f"a rank ended by itself: {process.exitcode}"
        assert time.monotonic() < deadline, f"no {path.name} after {LIFE_LIMIT_S} s"
        time.sleep(0.01)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _kill(ranks: list[Any], meeting: Path) -> None:
    """The ranks and the processes that write for them."""
    for process in ranks:
        os.killpg(process.pid, signal.SIGKILL)
    for process in ranks:
        process.join()
    shutil.rmtree(meeting)


def _contradictions(notes: Path) -> list[str]:
    """Steps that different lives saw in different states: training is deterministic, so a resume
    from anything but the exact state of its step would show here."""
    wrong = []
    for path in sorted(notes.glob("states*.txt")):
        seen: dict[str, str] = {}
        for line in path.read_text().splitlines():
            step, _, state = line.partition(" ")
            if len(state) == 64 and seen.setdefault(step, state) != state:
                wrong.append(f"{path.name}: step {step} has two states")
    return wrong


if __name__ == "__main__":
    main()
