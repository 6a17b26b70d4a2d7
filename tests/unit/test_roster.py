"""Which engines there are when some are lost. Ray is a stand-in: its actors do as they are told."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gpg_megatron.config.sections import RolloutConfig
from gpg_megatron.rollout import roster as roster_module
from gpg_megatron.rollout.failures import EngineError
from gpg_megatron.rollout.roster import Roster
from gpg_megatron.rollout.spec import EngineSpec


class RayActorError(Exception):
    """Of a call to an actor that is gone."""


class Ref:
    """To an answer that has come, has failed, or has not."""

    def __init__(self) -> None:
        self.done = False
        self.answer: Any = None
        self.error: Exception | None = None

    def has(self, answer: Any = None, error: Exception | None = None) -> None:
        if not self.done:
            self.done, self.answer, self.error = True, answer, error


class Actor:
    """Starts when it is told to; answers pulses until it hangs or is killed."""

    def __init__(self) -> None:
        self.hangs = False
        self.killed = False
        self.started = Ref()
        self._calls = [self.started]

    def __getattr__(self, method: str) -> Any:
        class Method:
            remote = staticmethod(lambda: self._call(method))

        return Method

    def _call(self, method: str) -> Ref:
        ref = self.started if method == "start" else Ref()
        self._calls.append(ref)
        if self.killed:
            ref.has(error=RayActorError())
        elif method != "start" and not self.hangs:
            ref.has()
        return ref

    def starts(self) -> None:
        self.started.has((os.uname().nodename, []))

    def dies(self) -> None:
        self.killed = True
        for ref in self._calls:
            ref.has(error=RayActorError())


class Ray(ModuleType):
    """What the roster and its calls use of it."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.actors: list[Actor] = []
        self.has_nodes = True

    def remote(self, **_: Any) -> Callable[[type], Ray]:
        return lambda _: self

    def options(self, **_: Any) -> Any:
        class Class:
            @staticmethod
            def remote(*_: Any) -> Actor:
                self.actors.append(Actor())
                return self.actors[-1]

        return Class

    def wait(self, refs: Sequence[Ref], timeout: float, num_returns: int = 1) -> Any:
        done = [ref for ref in refs if ref.done]
        return done, [ref for ref in refs if not ref.done]

    def get(self, ref: Ref, timeout: float) -> Any:
        if ref.error is not None:
            raise ref.error
        return ref.answer

    def kill(self, actor: Actor) -> None:
        actor.dies()

    def nodes(self) -> list[dict[str, bool]]:
        return [{"Alive": self.has_nodes}]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    fake: Any = Ray()
    errors: Any = ModuleType("ray.exceptions")
    errors.RayActorError = RayActorError
    errors.OutOfMemoryError = type("OutOfMemoryError", (Exception,), {})
    errors.RayTaskError = type("RayTaskError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.exceptions", errors)
    monkeypatch.setattr(roster_module, "PULSE_S", 0.01)
    return fake  # type: ignore[no-any-return]


Make = Callable[..., Roster]


@pytest.fixture
def make(ray: Ray, tmp_path: Path) -> Iterator[Make]:
    opened: list[Roster] = []

    def build(*, replaces: bool = True, **rollout: int) -> Roster:
        """All engines have started."""
        spec = EngineSpec(
            rollout=RolloutConfig(**{"num_engines": 2, **rollout}),  # type: ignore[arg-type]
            model_path="m",
            device="cpu",
            max_model_len=8,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            replaces_lost=replaces,
            worker_extension="w",
            scratch=tmp_path,
        )
        opened.append(roster := Roster(spec, tmp_path))
        roster.begin()
        for actor in ray.actors:
            actor.starts()
        roster.wait_ready()
        return roster

    yield build
    for roster in opened:
        roster.close()


def until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_that_dies_is_found_and_its_replacement_waits_for_a_publish(
    ray: Ray, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    roster = make()
    changes = roster.renew()
    ray.actors[0].dies()
    until(lambda: roster.ready() == [1])
    assert roster.members == [1] and roster.changes == changes + 1
    assert len(ray.actors) == 3 and not roster.waits_for_weights
    assert roster.renew() == changes + 1, "the new one has not loaded: nobody else is there"
    ray.actors[2].starts()
    until(lambda: roster.renew() == changes + 2)
    assert roster.members == [1, 2] and roster.ready() == [1]
    roster.are_ready()
    assert roster.ready() == [1, 2]
    assert capsys.readouterr().err.splitlines() == [
        "warning: engine 0 died while nothing was asked of it: its actor process is gone; "
        "it is replaced",
        "engine 0 is there again",
    ]


def test_too_few_are_none_and_one_that_has_loaded_is_waited_for(ray: Ray, make: Make) -> None:
    roster = make(min_engines=2)
    ray.actors[1].dies()
    until(lambda: roster.ready() == [])
    assert roster.members == [0] and not roster.waits_for_weights
    ray.actors[2].starts()
    until(lambda: roster.waits_for_weights)
    roster.renew()
    assert roster.members == [0, 3], "the id of engine 1's place"
    roster.are_ready()
    assert roster.ready() == [0, 3] and not roster.waits_for_weights


def test_one_that_is_silent_is_ended(
    ray: Ray, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    roster = make(stall_timeout_s=1)
    ray.actors[1].hangs = True
    until(lambda: roster.ready() == [0])
    assert ray.actors[1].killed and not ray.actors[0].killed
    assert "engine 1 has answered nothing for 1 s; it is replaced" in capsys.readouterr().err


def test_a_replacement_that_dies_or_never_loads_is_lost_too(ray: Ray, make: Make) -> None:
    roster = make(num_engines=1, startup_timeout_s=1, max_losses_per_hour=2)
    ray.actors[0].dies()
    until(lambda: len(ray.actors) == 2)
    ray.actors[1].dies()
    until(lambda: len(ray.actors) == 3)
    why = (
        r"engine 0 did not start within 1 s "
        r"\(3 engines were lost within an hour, rollout.max_losses_per_hour=2\)"
    )
    with pytest.raises(EngineError, match=why):
        roster.renew()
    with pytest.raises(EngineError, match=why):
        roster.ready()
    assert len(ray.actors) == 3 and all(actor.killed for actor in ray.actors)


def test_without_a_node_there_is_nothing_to_wait_for(ray: Ray, make: Make) -> None:
    roster = make(num_engines=1)
    ray.has_nodes = False
    ray.actors[0].dies()
    until(lambda: not roster.members)
    with pytest.raises(EngineError, match="Ray has no node left"):
        roster.renew()


def test_where_nothing_is_replaced_an_engine_stays_what_it_is(ray: Ray, make: Make) -> None:
    roster = make(replaces=False)
    ray.actors[0].dies()
    roster.lose(0, "it is gone")
    assert roster.ready() == roster.members == [0, 1] and len(ray.actors) == 2
