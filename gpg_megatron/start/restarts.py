"""Whether a run in which something died is started again, and what is said about it.

Everything of the run has been ended by then, on all hosts; it goes on from the newest complete
checkpoint, by the code that starts and resumes a run. All launchers decide by the same facts.
"""

from __future__ import annotations

from pathlib import Path

from gpg_megatron.checkpoint.store import list_saved
from gpg_megatron.config.sections import Config
from gpg_megatron.errors import UserError
from gpg_megatron.host.leaving import LeaveRequest
from gpg_megatron.loop.suspect import suspect_file
from gpg_megatron.observe.rundir import read_metrics
from gpg_megatron.start.world import Failure

_HOUR_S = 3600.0


class Restarts:
    """Those of one run."""

    def __init__(self, config: Config) -> None:
        self._most = config.trainer.max_restarts
        self._most_in_an_hour = config.trainer.max_restarts_per_hour
        self._output = Path(config.trainer.output_dir)
        self._root = config.trainer.checkpoint_root
        self._times: list[float] = []
        self._last: tuple[str, int] | None = None
        self.step = 0
        """In which the run failed last."""
        self.line = ""
        """What is said of the restart."""
        self.remark = ""
        """What is said behind the failure that ends the run."""

    @property
    def done(self) -> int:
        """How many there were."""
        return len(self._times)

    @property
    def overrides(self) -> list[str]:
        """What the next start is told besides: it goes on from this run's own checkpoints."""
        return ["checkpoint.resume=auto"] if list_saved(self._root) else []

    def allows(self, failure: Failure, now: float) -> bool:
        """Whether the run starts again after a failure at a time in seconds."""
        # Bad input, a signal and an orderly leave have codes of their own.
        if not self._most or failure.exit_code != 1 or failure.is_host:
            return False
        if LeaveRequest(self._output, None)():
            return False
        self.step = _step_in_hand(self._output)
        last, self._last = self._last, (failure.text, self.step)
        if last == self._last:
            file = suspect_file(self._output, self.step)
            batch = f"; its batch is in {file}" if file.exists() else ""
            self.remark = f" (in step {self.step} again{batch})"
        elif self.done >= self._most:
            self.remark = f" (after {self.done} restarts, trainer.max_restarts={self._most})"
        elif sum(now - time < _HOUR_S for time in self._times) >= self._most_in_an_hour:
            most = f"trainer.max_restarts_per_hour={self._most_in_an_hour}"
            self.remark = f" (after {self.done} restarts, {most})"
        if self.remark:
            return False
        self._times.append(now)
        complete = [saved.step for saved in list_saved(self._root) if saved.complete]
        origin = f"from step {max(complete)}" if complete else "from the beginning"
        self.line = f"restart {self.done} of {self._most}, {origin}: {failure.text}"
        return True


def _step_in_hand(output: Path) -> int:
    """Of a run that has failed: the one after the last that it reported."""
    try:
        return int(read_metrics(output)[-1]["step"]) + 1
    except UserError:
        return 1
