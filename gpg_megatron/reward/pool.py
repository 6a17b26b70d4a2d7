"""Scoring in a pool of killable processes.

An answer whose scorer hangs, outgrows its memory or takes the process down costs that one answer:
it scores reward.timeout_score, the process is replaced and the rest of its chunk is scored by
another.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path

from gpg_megatron.config.reward import RewardConfig
from gpg_megatron.errors import RunError
from gpg_megatron.reward import shaping
from gpg_megatron.reward.retries import Retries
from gpg_megatron.reward.sources import scorer_name
from gpg_megatron.reward.worker import OUT_OF_MEMORY, Question, Setup
from gpg_megatron.types import Completion, Prompt, Reward, ScoredGroup

MAX_CHUNK = 64
"""Answers per message."""
STARTUP_TIMEOUT_S = 60.0
MAX_CRASHES_IN_A_ROW = 64
"""So many crashes without one verdict between them mean that the scorer itself is broken. Running
out of time or memory is no crash."""
FAILURES = frozenset({"timeout", "memory", "crash"})
"""Parts of answers without a verdict."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class _Task:
    index: int
    question: Question


class _Worker:
    """One scoring process and the answers that it owes."""

    def __init__(self, setup: Setup, prepared: Sequence[str]) -> None:
        """prepared: the scorers that it makes ready before wait_ready returns."""
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
        self.connection.send(tuple(setup))
        self.prepare(prepared)

    def prepare(self, scorers: Sequence[str]) -> None:
        self.connection.send(("prepare", list(scorers)))

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
        self.connection.send(("score", [tuple(task.question) for task in chunk]))
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
        config: the section.
        max_response_length: tokens; what reward.overlong_buffer is measured from.
        scorers_module: module whose SCORERS table the processes use.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        max_response_length: int | None = None,
        scorers_module: str = "gpg_megatron.reward.scorers",
    ) -> None:
        assert max_response_length or not config.weights.get("overlong"), "it has nothing to end at"
        self._config = config
        self._max_tokens = max_response_length
        self._format = re.compile(config.format_pattern) if config.format_pattern else None
        limit = config.memory_limit_mb
        self._setup = Setup(
            sys_path=list(sys.path),
            scorers_module=scorers_module,
            custom_function=config.custom_function,
            memory_bytes=None if limit is None else limit * MIB,
            tolerance=config.tolerance,
        )
        self._retries = Retries(config=config, say=_say)
        self._prepared: list[str] = []
        self._crashes_in_a_row = 0
        self._error = ""
        self._turn = threading.Lock()
        """A stream of groups and an evaluation beside it share the workers."""
        self._workers: list[_Worker] = []
        try:
            for _ in range(config.num_workers):
                self._workers.append(_Worker(self._setup, ()))
            for worker in self._workers:
                worker.wait_ready()
        except BaseException:
            self.close()
            raise

    def score(self, items: Sequence[tuple[Prompt, Sequence[Completion]]]) -> list[ScoredGroup]:
        """Score every completion of every prompt; the groups keep their order.

        An answer over reward.timeout_s scores reward.timeout_score with accuracy 0 and parts
        {"timeout": 1.0}; so does one over reward.memory_limit_mb, with {"memory": 1.0}, and one
        whose scorer raises or ends its process, with {"crash": 1.0}.

        Raises:
            UserError: a data source without a scorer.
            RunError: the scorer fails on one answer after the other, or is out for too long.
        """
        assert self._workers, "the pool is closed"
        questions = [
            self._question(prompt, completion.text)
            for prompt, completions in items
            for completion in completions
        ]
        silent_before = not self._error
        rewards = self._retries(self._judged, questions)
        if silent_before and self._error:
            is_final = any("crash" in reward.parts for reward in rewards)
            then = "its answer scores 0" if is_final else "its answer was judged again"
            _say(f"a scorer failed, {then}: {self._error}")
        of_all = iter(rewards)
        return [self._group(prompt, completions, of_all) for prompt, completions in items]

    def attempt(self, prompt: Prompt, response: str) -> tuple[Reward, str]:
        """The reward of one answer, and what its scorer raised or ended with; "": nothing."""
        (reward,) = self._judged([self._question(prompt, response)])
        return reward, self._error

    def _question(self, prompt: Prompt, response: str) -> Question:
        scorer = scorer_name(prompt.data_source, self._config)
        return Question(
            scorer=scorer,
            response=response,
            ground_truth=prompt.ground_truth,
            data_source=prompt.data_source,
            extra_info=prompt.extra_info if scorer == "custom" else None,
        )

    def _judged(self, questions: Sequence[Question]) -> list[Reward]:
        try:
            with self._turn:
                self._prepare(sorted({question.scorer for question in questions}))
                return self._run([_Task(i, x) for i, x in enumerate(questions)])
        except BaseException:
            # Replies may still be under way: the processes cannot be used again.
            self.close()
            raise

    def _group(
        self, prompt: Prompt, completions: Sequence[Completion], rewards: Iterator[Reward]
    ) -> ScoredGroup:
        """Take the group's rewards and add what depends on format, length and the group."""
        mine = [next(rewards) for _ in completions]
        if self._config.weights != {"answer": 1.0} and mine:
            mine = self._shaped(completions, mine)
        return ScoredGroup(prompt=prompt, completions=tuple(completions), rewards=tuple(mine))

    def _shaped(self, completions: Sequence[Completion], rewards: list[Reward]) -> list[Reward]:
        weights, max_tokens = self._config.weights, self._max_tokens
        n_tokens_G = [len(c.token_ids) for c in completions]
        length_G = shaping.length_G(n_tokens_G, [r.accuracy for r in rewards])
        shaped = []
        for completion, reward, length in zip(completions, rewards, length_G, strict=True):
            if FAILURES & reward.parts.keys():
                shaped.append(reward)
                continue
            parts = {**reward.parts, "answer": reward.score, "length": length}
            if self._format is not None:
                parts["format"] = float(self._format.search(completion.text) is not None)
            if weights.get("overlong"):
                assert max_tokens is not None
                n, buffer = len(completion.token_ids), self._config.overlong_buffer
                parts["overlong"] = shaping.overlong(n, max_tokens, buffer)
            parts = {k: v for k, v in parts.items() if weights.get(k) or k in reward.parts}
            shaped.append(replace(reward, score=shaping.weighted(parts, weights), parts=parts))
        return shaped

    def _prepare(self, scorers: Sequence[str]) -> None:
        """Let every process import what these scorers need, outside of the time limits."""
        new = [name for name in scorers if name not in self._prepared]
        if not new:
            return
        self._prepared += new
        for slot, worker in enumerate(self._workers):
            try:
                worker.prepare(new)
            except (BrokenPipeError, ConnectionResetError):
                self._restart(slot)
            else:
                worker.wait_ready()

    def close(self) -> None:
        """End the processes. Calling it again does nothing."""
        while self._workers:
            self._workers.pop().kill()

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
                reply = worker.connection.recv()
                task = worker.owed.popleft()
                worker.deadline = time.monotonic() + self._config.timeout_s
                if isinstance(reply, str):
                    rewards[task.index] = self._failed(task, "crash", reply)
                else:
                    rewards[task.index] = _reward(*reply)
                    self._crashes_in_a_row = 0
        except (EOFError, ConnectionResetError):
            return "crash"
        return None

    def _replace(self, slot: int, failure: str, rewards: dict[int, Reward]) -> Sequence[_Task]:
        """Charge the failure to the answer at work; the rest of the chunk is returned."""
        task, *rest = self._workers[slot].owed
        code = self._restart(slot)
        if failure == "crash" and code == OUT_OF_MEMORY:
            failure = "memory"
        rewards[task.index] = self._failed(task, failure, f"its process ended with code {code}")
        return rest

    def _failed(self, task: _Task, failure: str, error: str) -> Reward:
        """The reward of an answer without a verdict. Raises RunError: too many of them."""
        if failure == "crash":
            self._error = f"{task.question.scorer}: {error}"
            self._crashes_in_a_row += 1
            if self._crashes_in_a_row >= MAX_CRASHES_IN_A_ROW and not self._config.retries:
                raise RunError(
                    f"the scorer failed on {self._crashes_in_a_row} answers in a row: {self._error}"
                )
        score = self._config.timeout_score
        return Reward(score=score, accuracy=0.0, parts={failure: 1.0}, answer=None)

    def _restart(self, slot: int) -> int:
        code = self._workers[slot].kill()
        self._workers[slot] = _Worker(self._setup, self._prepared)
        self._workers[slot].wait_ready()
        return code


def _say(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def _reward(
    score: float, accuracy: float, parts: Mapping[str, float], answer: str | None
) -> Reward:
    return Reward(score=float(score), accuracy=float(accuracy), parts=dict(parts), answer=answer)
