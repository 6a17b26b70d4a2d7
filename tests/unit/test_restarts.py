"""When a run is started again, from facts alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gpg_megatron.config.sections import Config, TrainerConfig
from gpg_megatron.host.leaving import ask_to_leave
from gpg_megatron.loop.suspect import suspect_file, write_suspect
from gpg_megatron.start.restarts import Restarts
from gpg_megatron.start.world import Failure

KILLED = Failure(text="policy rank 1 ended: killed by SIGKILL", exit_code=1, is_cause=True)
ANOTHER = replace(KILLED, text="policy rank 0 ended: killed by SIGKILL")


def restarts(folder: Path, most: int = 3, in_an_hour: int = 9) -> Restarts:
    return Restarts(
        Config(
            trainer=TrainerConfig(
                output_dir=str(folder), max_restarts=most, max_restarts_per_hour=in_an_hour
            )
        )
    )


def report(folder: Path, step: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")


def test_it_goes_on_from_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    mine = restarts(tmp_path)
    assert mine.allows(KILLED, 0.0) and mine.step == 1 and mine.overrides == []
    assert mine.line == f"restart 1 of 3, from the beginning: {KILLED.text}"
    for step, name in ((2, "complete.json"), (4, "cut.off")):
        folder = tmp_path / "checkpoints" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / name).touch()
    report(tmp_path, 4)
    assert mine.allows(KILLED, 1.0) and mine.step == 5 and mine.done == 2
    assert mine.line == f"restart 2 of 3, from step 2: {KILLED.text}"
    assert mine.overrides == ["checkpoint.resume=auto"]


def test_the_same_failure_in_the_same_step_ends_the_run(tmp_path: Path) -> None:
    mine = restarts(tmp_path)
    report(tmp_path, 11)
    assert mine.allows(KILLED, 0.0) and mine.allows(ANOTHER, 1.0), "another one in that step"
    write_suspect(tmp_path, 12, ())
    assert not mine.allows(ANOTHER, 2.0)
    assert mine.remark == f" (in step 12 again; its batch is in {suspect_file(tmp_path, 12)})"


def test_so_many_and_no_more(tmp_path: Path) -> None:
    mine = restarts(tmp_path, most=2)
    assert [mine.allows(f, 0.0) for f in (KILLED, ANOTHER, KILLED)] == [True, True, False]
    assert mine.remark == " (after 2 restarts, trainer.max_restarts=2)"
    hourly = restarts(tmp_path, in_an_hour=1)
    assert hourly.allows(KILLED, 0.0) and hourly.allows(ANOTHER, 3601.0)
    assert not hourly.allows(KILLED, 3700.0)
    assert hourly.remark == " (after 2 restarts, trainer.max_restarts_per_hour=1)"


@pytest.mark.parametrize(
    "failure",
    [replace(KILLED, exit_code=code) for code in (2, 75, 130, 143)]
    + [replace(KILLED, is_host=True)],
)
def test_what_starts_nothing_again(tmp_path: Path, failure: Failure) -> None:
    mine = restarts(tmp_path)
    assert not mine.allows(failure, 0.0) and not mine.remark
    assert not restarts(tmp_path, most=0).allows(KILLED, 0.0)
    ask_to_leave(tmp_path, "asked by SIGTERM")
    assert not mine.allows(KILLED, 0.0), "it was to leave anyway"
