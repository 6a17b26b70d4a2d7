"""What the loop itself has to remember, as a checkpoint keeps it: trainer.json and groups.npz."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpg_megatron.loop.group_arrays import FlatGroups, flatten, from_json, unflatten
from gpg_megatron.types import ScoredGroup

VALUES, GROUPS = "trainer.json", "groups.npz"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoopState:
    """On rank 0."""

    values: Mapping[str, Any]
    """Plain JSON."""
    groups: tuple[ScoredGroup, ...]
    """Scored and not yet trained on."""


def write_state(directory: Path, state: LoopState) -> None:
    """Raises OSError."""
    (directory / VALUES).write_text(json.dumps(state.values))
    flat = flatten(state.groups)
    text = np.frombuffer(flat.text.encode("ascii"), np.uint8)
    np.savez(directory / GROUPS, tokens=flat.tokens, logprobs=flat.logprobs, text=text)


def read_state(directory: Path) -> LoopState:
    """What write_state was given."""
    values: dict[str, Any] = json.loads((directory / VALUES).read_text())
    if not (directory / GROUPS).exists():
        return _of_earlier_version(values)
    with np.load(directory / GROUPS) as file:
        text = file["text"].tobytes().decode("ascii")
        flat = FlatGroups(text=text, tokens=file["tokens"], logprobs=file["logprobs"])
    return LoopState(values=values, groups=unflatten(flat))


def _of_earlier_version(values: dict[str, Any]) -> LoopState:
    """The groups were in trainer.json."""
    carried, ahead = values["carried"], values["ahead"]
    drawn = ahead.pop("groups") if ahead else []
    return LoopState(
        values=values | {"carried": len(carried)}, groups=tuple(map(from_json, carried + drawn))
    )
