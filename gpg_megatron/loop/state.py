"""What the loop itself has to remember, as a checkpoint keeps it: trainer.json and groups.npz."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpg_megatron.loop.group_arrays import FlatGroups, flatten, from_json, unflatten
from gpg_megatron.loop.stream import Group, State, resumed
from gpg_megatron.types import NO_ROUTING, ScoredGroup

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
    np.savez(
        directory / GROUPS,
        tokens=flat.tokens,
        logprobs=flat.logprobs,
        experts=flat.experts,
        text=text,
    )


def read_state(directory: Path, step: int) -> LoopState:
    """What write_state was given, after a step."""
    values: dict[str, Any] = json.loads((directory / VALUES).read_text())
    if not (directory / GROUPS).exists():
        return _of_earlier_version(values, step)
    with np.load(directory / GROUPS) as file:
        text = file["text"].tobytes().decode("ascii")
        flat = FlatGroups(
            text=text,
            tokens=file["tokens"],
            logprobs=file["logprobs"],
            # Earlier versions knew none.
            experts=file.get("experts", NO_ROUTING.prompt),
        )
    return LoopState(values=values, groups=unflatten(flat))


def _of_earlier_version(values: dict[str, Any], step: int) -> LoopState:
    """The groups were in trainer.json: those that were carried over, and a batch drawn ahead."""
    carried, ahead = values["carried"], values["ahead"] or {"groups": [], "redraws": 0}
    rows = carried + ahead["groups"]
    # Taken before the last publish, and one batch earlier where the last one was drawn ahead.
    first = step - 1 - bool(ahead["groups"])
    ready = [
        Group(ticket=t, weights=first if t < len(carried) else step - 1, carried=t < len(carried))
        for t in range(len(rows))
    ]
    machine = State(
        next_ticket=len(rows),
        ready=tuple(ready),
        closed=step,
        learned=step,
        published=step,
        weights=step,
        redraws=ahead["redraws"],
    )
    new = {"stream": values["stream"], "machine": machine_to_json(machine), "prompts": {}}
    seconds = ahead.get("timings", {})
    return LoopState(values=new | {"seconds": seconds}, groups=tuple(map(from_json, rows)))


def machine_to_json(state: State) -> dict[str, Any]:
    """What machine_from_json reads, as plain JSON."""
    names = ("next_ticket", "closed", "learned", "published", "weights", "redraws", "places")
    return {name: getattr(state, name) for name in names} | {
        "waiting": list(state.waiting),
        "flying": [list(pair) for pair in state.flying.items()],
        "ready": [[g.ticket, g.weights, g.live, g.carried] for g in state.ready],
    }


def machine_from_json(data: Mapping[str, Any]) -> State:
    """The state that a run goes on from."""
    groups = (
        Group(ticket=ticket, weights=weights, live=live, carried=carried)
        for ticket, weights, live, carried in data["ready"]
    )
    lists = {"waiting": tuple(data["waiting"]), "flying": dict(data["flying"])}
    return resumed(State(**{**data, **lists, "ready": tuple(groups)}))
