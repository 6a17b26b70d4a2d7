"""Calls to the engines' Ray actors: sent at once, answered in time, or failed by name.

Every wait has a time-out that names what was waited for, and ends at once when an engine dies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpg_megatron.rollout.failures import EngineDied, EngineError, with_log

CONTROL_TIMEOUT_S = 120.0
"""For calls that only tell an engine something."""


class PendingCalls:
    """Calls of one kind that have been sent and not answered."""

    def __init__(
        self,
        what: str,
        logs: Sequence[Path],
        sent: Mapping[Any, int],
        lose: Callable[[int, str], None] = lambda engine, why: None,
    ) -> None:
        """
        Args:
            what: for messages, as in "engine 0 died while loading the model".
            logs: by engine number; a message ends with the last lines of one.
            sent: Ray's reference to an answer -> the id of the engine that was asked, whose number
                is the remainder by the count of logs.
            lose: called with the id and the message, when an engine has gone.
        """
        self._what = what
        self._logs = logs
        self._pending = dict(sent)
        self._lose = lose

    def add(self, ref: Any, engine: int) -> None:
        """One more call has been sent."""
        self._pending[ref] = engine

    def __len__(self) -> int:
        return len(self._pending)

    def failure(self) -> EngineError | None:
        """Why an engine failed so far, that of one that has gone before others; None: none has."""
        import ray

        found: EngineError | None = None
        for ref in ray.wait(list(self._pending), num_returns=len(self), timeout=0)[0]:
            try:
                self._get(ref)
            except EngineDied as error:
                return error
            except EngineError as error:
                found = found or error
        return found

    def settle(self, timeout_s: float) -> None:
        """Return when all engines have answered, whatever; one that does not in time is lost."""
        import ray

        if not self._pending:
            return
        for ref in ray.wait(list(self._pending), num_returns=len(self), timeout=timeout_s)[1]:
            engine = self._pending[ref]
            late = f"engine {self._number(engine)} hung while {self._what}"
            self._lose(engine, f"{late}: no answer within {timeout_s:g} s")

    def wait(self, timeout_s: float) -> None:
        """Return when all engines have answered.

        Raises:
            EngineDied, EngineError, TimeoutError: the first failure of any engine, at once.
        """
        self.answers(timeout_s)

    def answers(self, timeout_s: float) -> list[Any]:
        """[engine], for one call to each of some engines; the same when it is asked again. Raises
        as wait does."""
        open_calls = PendingCalls(self._what, self._logs, self._pending, self._lose)
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        while open_calls:
            for ref, answer in open_calls.next_answers(deadline, timeout_s).items():
                answers[self._pending[ref]] = answer
        return [answers[engine] for engine in sorted(answers)]

    def next_answers(self, deadline: float, timeout_s: float) -> dict[Any, Any]:
        """Reference -> answer for at least one call, which is pending no longer.

        Args:
            deadline: on the monotonic clock.
            timeout_s: how long it was away in the beginning, for the message.

        Raises:
            EngineDied, EngineError, TimeoutError
        """
        import ray

        left = max(0.0, deadline - time.monotonic())
        ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=left)
        if not ready:
            late = sorted({self._number(engine) for engine in self._pending.values()})
            message = f"{self._what}: no answer from engine {late[0]} within {timeout_s:g} s"
            message += f" (waiting for engines {late})" if len(late) > 1 else ""
            raise TimeoutError(with_log(message, self._logs[late[0]]))
        answers = {ref: self._get(ref) for ref in ready}
        for ref in ready:
            del self._pending[ref]
        return answers

    def _get(self, ref: Any) -> Any:
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        engine, what = self._number(self._pending[ref]), self._what
        log = self._logs[engine]
        try:
            return ray.get(ref, timeout=CONTROL_TIMEOUT_S)
        except (EngineDied, RayActorError, OutOfMemoryError) as error:
            part = "core" if isinstance(error, EngineDied) else "actor"
            message = f"engine {engine} died while {what}: its {part} process is gone"
            self._lose(self._pending[ref], message := with_log(message, log))
            raise EngineDied(message) from None
        except RayTaskError as error:
            reason = str(error.cause) or repr(error.cause)
            message = f"engine {engine} failed while {what}: {reason}"
            raise EngineError(with_log(message, log)) from error

    def _number(self, engine: int) -> int:
        return engine % len(self._logs)
