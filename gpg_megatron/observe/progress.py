"""What a person sees while a run goes on: a bar on a terminal, one line a step elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import rich.progress

Value = float | int | None


@dataclass(frozen=True, slots=True)
class _Field:
    before: str
    key: str
    """In metrics.jsonl."""
    spec: str
    width: int
    after: str = ""
    on_bar: bool = False

    def text(self, metrics: Mapping[str, Value], *, aligned: bool) -> str:
        value = metrics.get(self.key)
        text = "-" if value is None else format(value, self.spec)
        return f"{self.before}{text:>{self.width if aligned else 0}}{self.after}"


_FIELDS = (
    _Field("acc ", "reward/accuracy", ".3f", 5, on_bar=True),
    _Field("reward ", "reward/mean", ".3f", 6, on_bar=True),
    _Field("live ", "group/live_fraction", ".2f", 4, on_bar=True),
    _Field("alpha ", "group/alpha", ".2f", 5),
    _Field("loss ", "policy/loss", ".4f", 7),
    _Field("gnorm ", "policy/grad_norm", ".2f", 5),
    _Field("mismatch ", "mismatch/logprob_max", ".0e", 5),
    _Field("len ", "response/length_mean", ".1f", 6),
    _Field("", "throughput/rollout_tokens_per_s", ".0f", 6, " tok/s", on_bar=True),
    _Field("", "timing/step_s", ".1f", 5, " s"),
)


def step_line(step: int, total_steps: int, metrics: Mapping[str, Value]) -> str:
    """One compact line; the columns stay in place from step to step. A metric that is
    missing, or null, is shown as "-"."""
    width = len(str(total_steps))
    fields = (field.text(metrics, aligned=True) for field in _FIELDS)
    return "  ".join((f"step {step:>{width}}/{total_steps}", *fields))


class Progress:
    """Prints the progress of a run; close() puts the bar away.

    Args:
        total_steps: steps of the whole run.
        stream: where it is printed; None: stdout.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._stream = stream or sys.stdout
        self._bar = _make_bar(self._stream) if self._stream.isatty() else None
        self._task: rich.progress.TaskID | None = None

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def step(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Show that `step` (1 .. total_steps) is done."""
        if self._bar is None:
            self.message(step_line(step, self._total_steps, metrics))
            return
        fields = (field.text(metrics, aligned=False) for field in _FIELDS if field.on_bar)
        figures = "  ".join(fields)
        if self._task is None:
            # Only now: before the first step there is nothing to show but messages.
            self._task = self._bar.add_task("step", total=self._total_steps, figures=figures)
            self._bar.start()
        self._bar.update(self._task, completed=step, figures=figures)

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None and self._task is not None:
            self._bar.stop()


def _make_bar(stream: TextIO) -> rich.progress.Progress:
    from rich import console, progress

    return progress.Progress(
        "{task.description}",
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=20),
        progress.TextColumn("{task.fields[figures]}", markup=False),
        progress.TimeRemainingColumn(compact=True),
        console=console.Console(file=stream, force_terminal=True),
    )
