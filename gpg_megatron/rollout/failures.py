"""What can go wrong with an engine; user mistakes are UserError instead."""

from __future__ import annotations

from pathlib import Path

from gpg_megatron.errors import EngineLost, RunError

_TAIL_LINES = 15
_TAIL_BYTES = 16384


class EngineError(RunError):
    """A call to an engine failed; the engine may still live."""


class EngineDied(EngineError, EngineLost):
    """An engine's actor, core or worker process is gone; nothing can be asked of it again."""


def with_log(message: str, log: Path) -> str:
    """The message followed by the last lines of an engine's log, when there are any."""
    if not log.exists():
        return message
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    tail = [line.rstrip() for line in lines if line.strip()][-_TAIL_LINES:]
    if not tail:
        return message
    return "\n".join([message, f"last lines of {log}:", *(f"  {line}" for line in tail)])
