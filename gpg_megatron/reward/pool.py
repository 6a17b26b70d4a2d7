"""Scoring in a pool of killable processes.

An answer whose scorer hangs or takes the process down costs that one answer: it scores 0,
the process is replaced and the rest of its chunk is scored by another.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from gpg_megatron.config import RewardConfig
from gpg_megatron.reward.sources import scorer_name
from gpg_megatron.types import Completion, Prompt, Reward, ScoredGroup

MAX_CHUNK = 64
"""Answers per message."""
STARTUP_TIMEOUT_S = 60.0
MAX_CRASHES_IN_A_ROW = 64
"""So many crashes without one verdict between them mean that the scorer itself is broken."""


@dataclass(frozen=True, slots=True)
class _Task:
    index: int
    scorer: str
    response: str
    ground_truth: str


class _Worker:
    """One scoring process and the answers that it owes."""

    def __init__(self, scorers_module: str) -> None:
        self.connection, theirs = Pipe()
        root = str(Path(__file__).resolve().parents[2])
        inherited = os.environ.get("PYTHONPATH")
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "gpg_megatron.reward.worker", str(theirs.fileno())],
                # The worker's lifeline: nothing is ever written, it closes with this process.
                stdin=subprocess.PIPE,
                # What a scorer prints must not mix with this process's own output.
                stdout=2,
                pass_fds=[theirs.fileno()],
                env={
                    **os.environ,
                    "PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root,
                },
            )
        self.owed: deque[_Task] = deque()
        self.deadline = 0.0
        self.connection.send((sys.path, scorers_module))

    def wait_ready(self) -> None:
        try:
            if not self.connection.poll(STARTUP_TIMEOUT_S):
                raise TimeoutError(
                    f"a scoring process did not start within {STARTUP_TIMEOUT_S:.0f} s"
                )
            ready = self.connection.recv()
        except (EOFError, ConnectionResetError):
            code = self.process.wait(timeout=STARTUP_TIMEOUT_S)
            raise RuntimeError(
                f"a scoring process ended with exit code {code} while it started; "
                "its error is above"
            ) from None
        assert ready == "ready", ready

    def assign(self, chunk: Sequence[_Task], timeout_s: float) -> None:
        self.connection.send([(t.scorer, t.response, t.ground_truth) for t in chunk])
        self.owed = deque(chunk)
        self.deadline = time.monotonic() + timeout_s

    def kill(self) -> int:
        """End the process; its exit code, negative for a signal."""
        self.connection.close()
        self.process.kill()
        code = self.process.wait(timeout=STARTUP_TIMEOUT_S)
        assert self.process.stdin is not None
        self.process.stdin.close()
        return code


class RewardPool:
    """Scores completions in config.num_workers processes; close() or leave the context to
    end them. They also end by themselves when this process dies, however it dies.

    Args:
        config: reward.scorer, reward.num_workers, reward.timeout_s.
        scorers_module: module whose SCORERS table the processes use.
    """

    def __init__(
        self, config: RewardConfig, *, scorers_module: str = "gpg_megatron.reward.scorers"
    ) -> None:
        self._config = config
        self._scorers_module = scorers_module
        self._crashes_in_a_row = 0
        self._workers: list[_Worker] = []
        try:
            for _ in range(config.num_workers):
                self._workers.append(_Worker(scorers_module))
            for worker in self._workers:
                worker.wait_ready()
        except BaseException:
            self.close()
            raise

    def score(self, items: Sequence[tuple[Prompt, Sequence[Completion]]]) -> list[ScoredGroup]:
        """Score every completion of every prompt; the groups keep their order.

        An answer over reward.timeout_s scores 0 with parts {"timeout": 1.0}; one whose
        scorer raises or ends its process scores 0 with parts {"crash": 1.0}.

        Raises:
            UserError: a data source without a scorer.
            RuntimeError: the scoring processes crash on one answer after the other.
        """
        assert self._workers, "the pool is closed"
        tasks = [
            (scorer_name(prompt.data_source, self._config), completion.text, prompt.ground_truth)
            for prompt, completions in items
            for completion in completions
        ]
        try:
            rewards = iter(self._run([_Task(i, *task) for i, task in enumerate(tasks)]))
        except BaseException:
            # Replies may still be under way: the processes cannot be used again.
            self.close()
            raise
        return [
            ScoredGroup(
                prompt=prompt,
                completions=tuple(completions),
                rewards=tuple(next(rewards) for _ in completions),
            )
            for prompt, completions in items
        ]

    def close(self) -> None:
        """End the processes. Calling it again does nothing."""
        while self._workers:
            self._workers.pop().kill()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, tasks: Sequence[_Task]) -> list[Reward]:
        # Several chunks per process even out answers of unequal cost.
        size = min(MAX_CHUNK, max(1, len(tasks) // (4 * len(self._workers))))
        chunks = deque(tasks[i : i + size] for i in range(0, len(tasks), size))
        rewards: dict[int, Reward] = {}
        while len(rewards) < len(tasks):
            for slot, worker in enumerate(self._workers):
                if not worker.owed and chunks:
                    self._assign(slot, chunks.popleft())
            busy = [(slot, worker) for slot, worker in enumerate(self._workers) if worker.owed]
            patience = min(worker.deadline for _, worker in busy) - time.monotonic()
            ready = wait([worker.connection for _, worker in busy], max(0.0, patience))
            for slot, worker in busy:
                if worker.connection in ready:
                    failure = self._receive(worker, rewards)
                else:
                    failure = "timeout" if time.monotonic() >= worker.deadline else None
                if failure:
                    rest = self._replace(slot, failure, rewards)
                    if rest:
                        chunks.appendleft(rest)
        return [rewards[i] for i in range(len(tasks))]

    def _assign(self, slot: int, chunk: Sequence[_Task]) -> None:
        try:
            self._workers[slot].assign(chunk, self._config.timeout_s)
        except (BrokenPipeError, ConnectionResetError):
            # It died between two batches, on nobody's answer.
            self._restart(slot)
            self._workers[slot].assign(chunk, self._config.timeout_s)

    def _receive(self, worker: _Worker, rewards: dict[int, Reward]) -> str | None:
        """Take the verdicts that have arrived; "crash" when the process is gone."""
        try:
            while worker.owed and worker.connection.poll():
                score, accuracy, parts = _verdict(worker.connection)
                task = worker.owed.popleft()
                rewards[task.index] = Reward(score=score, accuracy=accuracy, parts=parts)
                worker.deadline = time.monotonic() + self._config.timeout_s
                self._crashes_in_a_row = 0
        except (EOFError, ConnectionResetError):
            return "crash"
        return None

    def _replace(self, slot: int, failure: str, rewards: dict[int, Reward]) -> Sequence[_Task]:
        """Charge the failure to the answer at work; the rest of the chunk is returned."""
        task, *rest = self._workers[slot].owed
        rewards[task.index] = Reward(score=0.0, accuracy=0.0, parts={failure: 1.0})
        code = self._restart(slot)
        if failure == "crash":
            self._crashes_in_a_row += 1
        if self._crashes_in_a_row >= MAX_CRASHES_IN_A_ROW:
            raise RuntimeError(
                f"scorer {task.scorer!r} took its process down on {self._crashes_in_a_row} "
                f"answers in a row (last exit code {code}); its errors are above"
            )
        return rest

    def _restart(self, slot: int) -> int:
        code = self._workers[slot].kill()
        self._workers[slot] = _Worker(self._scorers_module)
        self._workers[slot].wait_ready()
        return code


def _verdict(connection: Connection[Any, Any]) -> tuple[float, float, dict[str, float]]:
    score, accuracy, parts = connection.recv()
    return float(score), float(accuracy), dict(parts)
