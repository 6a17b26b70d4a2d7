"""How a launcher answers signals, what rank 0 asks between two steps, what is said at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from gpg_megatron.config.sections import CheckpointConfig, Config, TrainerConfig
from gpg_megatron.errors import EXIT_STOPPED, UserError
from gpg_megatron.host.leaving import (
    BEGAN_VARIABLE,
    STOP_FILE,
    LeaveRequest,
    ask_to_leave,
    forget_request,
)
from gpg_megatron.host.lock import locked
from gpg_megatron.host.words import WORDS_FILE, leave_words
from gpg_megatron.start.leaving import leaving_in_order
from gpg_megatron.start.preflight import may_start
from gpg_megatron.start.world import Failure, what_ended


def config(folder: Path, *, save_freq: int = 1, grace_s: int = 60) -> Config:
    return Config(
        trainer=TrainerConfig(output_dir=str(folder / "run"), grace_s=grace_s),
        checkpoint=CheckpointConfig(save_freq=save_freq),
    )


INTERRUPTED = """
import os, signal, sys, time
from gpg_megatron.errors import exit_codes

@exit_codes
def main(argv=None):
    exec("os.kill(os.getpid(), signal.SIGINT); time.sleep(5)")

sys.exit(main())
"""


def test_ctrl_c_in_the_making_of_a_dataclass_is_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(INTERRUPTED)
    path = os.pathsep.join((str(tmp_path), *sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "command"],
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "stopped by SIGINT\n")


RANK = """
import time
from gpg_megatron.start.rank import die_with_parent
die_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
AGENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def test_a_rank_dies_with_the_agent_that_started_it() -> None:
    command = [sys.executable, "-c", AGENT, RANK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None and agent.stdout.readline() == "ready\n"
        began = time.monotonic()
        agent.kill()
        assert agent.stdout.read() == "", "nobody holds it open any more"
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_asks_and_the_second_ends_at_once(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(number)
    asks = LeaveRequest(tmp_path / "run", None)
    with pytest.raises(SignalException) as caught, leaving_in_order(config(tmp_path)):
        assert asks() == ""
        os.kill(os.getpid(), number)
        assert asks() == f"asked by {number.name}"
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.sigval == signal.SIGTERM
    assert signal.getsignal(number) is handler
    assert f"{number.name}: the run ends after this step" in capfd.readouterr().err


def test_grace_is_limited(tmp_path: Path) -> None:
    with pytest.raises(SignalException), leaving_in_order(config(tmp_path, grace_s=1)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_a_run_that_saves_nothing_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(SignalException), leaving_in_order(config(tmp_path, save_freq=0)):
        os.kill(os.getpid(), signal.SIGINT)
    assert not (tmp_path / "run").exists()


def test_a_request_by_hand_and_the_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BEGAN_VARIABLE, raising=False)
    asks = LeaveRequest(tmp_path, 2.0)
    assert asks() == ""
    (tmp_path / STOP_FILE).touch()
    assert asks() == f"{tmp_path / STOP_FILE} is there"
    forget_request(tmp_path)
    forget_request(tmp_path)  # once is enough
    assert asks() == ""
    monkeypatch.setenv(BEGAN_VARIABLE, str(time.time() - 7201))
    assert LeaveRequest(tmp_path, 2.0)() == "trainer.max_hours=2 are over"
    ask_to_leave(tmp_path / "new", "asked by a person")
    assert LeaveRequest(tmp_path / "new", None)() == "asked by a person"


def test_a_run_that_is_refused_forgets_no_request_to_the_one_that_is_there(tmp_path: Path) -> None:
    mine = config(tmp_path)
    with locked(mine.trainer.output_dir):
        ask_to_leave(mine.trainer.output_dir, "asked by a person")
        with pytest.raises(UserError, match="in use by"):
            may_start(mine, 1, attempt=0)
        assert LeaveRequest(mine.trainer.output_dir, None)() == "asked by a person"


def ended(folder: Path, codes: dict[int, int], words: dict[int, str]) -> Failure:
    """What the launcher makes of ranks that ended with these codes and last words."""
    failures = {}
    for rank, code in codes.items():
        file = folder / f"{rank}.json"
        if rank in words:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(WORDS_FILE, str(file))
                leave_words(words[rank])
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(file))
    return what_ended(failures)


@pytest.mark.parametrize(
    ("codes", "words", "text"),
    [
        # The others lose their connection, or the agent ends them.
        ({0: 1, 1: -9, 2: -15}, {}, "policy rank 1 ended: killed by SIGKILL"),
        ({0: 1, 1: -9}, {0: "a transfer failed"}, "policy rank 1 ended: killed by SIGKILL"),
        ({0: -15, 1: 1}, {1: "engine 0 died"}, "engine 0 died"),
        ({0: -6, 1: 1}, {1: "engine 0 died"}, "engine 0 died"),
        ({0: -15, 1: 1}, {}, "policy rank 1 ended: exit code 1"),
        ({0: -6, 1: -15}, {}, "policy rank 0 ended: killed by SIGABRT"),
    ],
)
def test_the_last_line_is_what_began_it(
    tmp_path: Path, codes: dict[int, int], words: dict[int, str], text: str
) -> None:
    failure = ended(tmp_path, codes, words)
    assert failure.text == text and failure.exit_code == 1
    assert failure.is_cause == ("exit code" not in text)
    assert failure.line(0) == f"error: {text}"


def test_leaving_in_order_is_no_failure_to_speak_of(tmp_path: Path) -> None:
    failure = ended(tmp_path, {0: -15, 1: EXIT_STOPPED}, {})
    assert failure.exit_code == EXIT_STOPPED
    assert failure.line(0) == failure.line(1) == ""
    assert ended(tmp_path, {0: 2, 1: -15}, {}).exit_code == 2


def test_nobody_reads_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(WORDS_FILE, raising=False)
    leave_words("nothing happens")
    monkeypatch.setenv(WORDS_FILE, str(tmp_path / "words"))
    leave_words("one")
    assert json.loads((tmp_path / "words").read_text())["message"] == "one"
