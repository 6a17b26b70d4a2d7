"""One run in a directory: refused while it lives, free however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpg_megatron.errors import UserError
from gpg_megatron.host.lock import check_free, locked

HOLD = """
import sys, time
from gpg_megatron.host.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_named_and_its_death_frees_the_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        owner = f"host {os.uname().nodename}, process {other.pid}"
        with pytest.raises(UserError, match=f"in use by {owner}; expected another"), locked(run):
            pass
        with pytest.raises(UserError, match=owner):
            check_free(run)
        other.kill()
    check_free(run)
    with locked(run):
        assert f"process {os.getpid()}" in (run / "lock").read_text()


def test_looking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_free(tmp_path / "run")
    assert not (tmp_path / "run").exists()
