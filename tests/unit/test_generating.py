"""Waiting for engines while all ranks can publish to them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from gpg_megatron.loop.generating import Generating


class Fleet:
    waits_for_weights = False


def test_engines_that_wait_for_weights_get_them_and_then_the_action_ends() -> None:
    fleet: Any = Fleet()
    there = threading.Event()
    said: list[str] = []

    def on_rank0(action: Callable[[], Any]) -> Any:
        answer = action()
        said.append("not yet" if answer is None else "done")
        return answer

    def publish() -> None:
        said.append("publish")
        fleet.waits_for_weights = False
        there.set()

    generating = Generating(fleet, on_rank0)
    generating.publish = publish

    def action() -> str:
        fleet.waits_for_weights = True
        assert there.wait(20)
        return "answers"

    assert generating(action) == "answers"
    assert said == ["not yet", "publish", "done"]


def test_what_the_action_raises_is_raised() -> None:
    def fail() -> None:
        raise ValueError("no engine is left")

    fleet: Any = Fleet()
    with pytest.raises(ValueError, match="no engine is left"):
        Generating(fleet, lambda action: action())(fail)


def test_another_rank_publishes_as_often_as_it_is_told() -> None:
    told: list[Any] = [None, None, ("answers",)]
    published: list[None] = []
    generating = Generating(None, lambda action: told.pop(0))
    generating.publish = lambda: published.append(None)
    assert generating(lambda: "never called") == "answers"
    assert len(published) == 2 and not told
