"""A job as a user starts it, and what it must not leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from gpg_megatron.host.reaper import RUN_ID_VARIABLE, open_segments, scratch_directory
from tests.shared_memory import all_segments
from tests.tiny import make_tiny_model, write_problems

START_LIMIT_S = 480.0
END_LIMIT_S = 20.0
LOOK_S = 0.5
"""Between two looks at all processes: ten looks a second took a fifth of a core from the job."""
STEP_KEYS = {
    "reward/mean",
    "reward/accuracy",
    "group/live_fraction",
    "group/alpha",
    "group/redraws",
    "policy/loss",
    "policy/grad_norm",
    "policy/lr",
    "policy/tokens",
    "policy/tokens_skipped",
    "policy/tokens_shared",
    "policy/flops",
    "response/length_mean",
    "response/clipped_fraction",
    "timing/rollout_s",
    "timing/reward_s",
    "timing/policy_s",
    "timing/sync_s",
    "timing/step_s",
    "throughput/rollout_tokens_per_s",
    "throughput/policy_tokens_per_s",
    "throughput/policy_flops_per_s",
    "throughput/policy_mfu",
    "memory/rss_gb",
}
"""Of every step in metrics.jsonl."""


class Job:
    """A running command that trains."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        output: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """output: its run directory. environment: in place of this process's own."""
        self.output = output
        self.log = log
        self.below: set[psutil.Process] = set()
        self.run_ids: set[str] = set()
        """Their marks; daemons that are no descendants any more carry them too."""
        self.segments: set[str] = set()
        env = dict(os.environ if environment is None else environment)
        with log.open("w") as file:
            # A session of its own: the terminal's Ctrl-C goes to a whole process group.
            self.process = subprocess.Popen(
                command, env=env, stdout=file, stderr=file, start_new_session=True
            )

    def metrics(self) -> list[dict[str, Any]]:
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while not any(row["step"] >= step for row in self.metrics()):
            assert self.is_running(), self.log.read_text()
            assert time.monotonic() < deadline, f"no step {step}: {self.log.read_text()}"
            time.sleep(LOOK_S)

    def is_running(self) -> bool:
        """Also remembers the processes below and their segments, which must end with it."""
        if self.process.poll() is not None:
            return False
        now = set(psutil.Process(self.process.pid).children(recursive=True))
        for process in now - self.below:
            with suppress(psutil.NoSuchProcess):
                self.run_ids.add(process.environ().get(RUN_ID_VARIABLE, ""))
        self.below |= now
        self.segments |= open_segments(p.pid for p in self.below)
        return True

    def ranks(self) -> dict[int, psutil.Process]:
        """The policy ranks; what they start inherits RANK, so parenthood decides."""
        children = psutil.Process(self.process.pid).children()
        return {int(p.environ()["RANK"]): p for p in children if "RANK" in p.environ()}

    def ends(self, code: int, limit_s: float = END_LIMIT_S) -> str:
        """Wait for the end and check that nothing is left; returns what was printed."""
        deadline = time.monotonic() + limit_s
        while self.is_running():
            assert time.monotonic() < deadline, f"still running: {self.log.read_text()}"
            time.sleep(LOOK_S)
        ended = self.process.returncode
        assert ended == code, f"{ended}: {self.log.read_text()}"
        deadline = time.monotonic() + END_LIMIT_S
        while left := self.living():
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
        assert not self.segments & all_segments()
        assert not [mark for mark in self._marks() if scratch_directory(mark).exists()]
        return self.log.read_text()

    def _marks(self) -> set[str]:
        return self.run_ids - {""}

    def living(self) -> list[psutil.Process]:
        """What it started and has not ended; daemons too."""
        marks = self._marks()
        living = [p for p in self.below if p.is_running() and p.status() != "zombie"]
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(RUN_ID_VARIABLE) in marks:
                    living.append(process)
        return living


def processes_with(wanted: Mapping[str, str]) -> list[psutil.Process]:
    """Those whose environment has all of this."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if wanted.items() <= process.environ().items():
                found.append(process)
    return found


def write_tiny_run(folder: Path, **sections: Mapping[str, Any]) -> Path:
    """A tiny model, its problems and config.yaml of a run of two steps on one rank; where sections
    are given, their keys are added."""
    make_tiny_model(folder / "model")
    write_problems(folder / "train.jsonl", [f"{i}+1=" for i in range(9)])
    config: dict[str, dict[str, Any]] = {
        "data": {
            "train_files": [str(folder / "train.jsonl")],
            "apply_chat_template": False,
            "max_prompt_length": 8,
        },
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "algorithm": {"preset": "paper"},
        "rollout": {
            "n": 2,
            "max_response_length": 2,
            "dtype": "fp32",
            "kv_cache_gb": 0.125,
            "enforce_eager": True,
        },
        "trainer": {"train_batch_size": 4, "device": "cpu", "total_training_steps": 2},
    }
    for name, keys in sections.items():
        config.setdefault(name, {}).update(keys)
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


@contextmanager
def running_job(
    command: Sequence[str | Path],
    *,
    output: Path,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Job]:
    """A job that is stopped at the end, whatever the test found."""
    job = Job(command, output=output, log=log, environment=environment)
    try:
        yield job
    finally:
        if job.process.poll() is None:
            job.process.send_signal(signal.SIGTERM)
            job.process.wait(timeout=60)
