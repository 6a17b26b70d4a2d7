"""What the faults of benchmarks.chaos do, on processes and files that stand for the demo's."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks.chaos_faults import FAULTS, Strike
from gpg_megatron.checkpoint.marker import damaged_file, read_marker
from tests.unit.test_checkpoint_store import save

LISTEN = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    with server.accept()[0] as one:
        print(one.recv(1), flush=True)
"""
CALL = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as one:
    print("there", flush=True)
    print(one.recv(1), flush=True)
"""


def strike_of(name: str) -> Strike:
    return next(fault.strike for fault in FAULTS if fault.name == name)


def test_a_cut_connection_ends_on_both_sides() -> None:
    started = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", LISTEN], **started) as worker:  # type: ignore[call-overload]
        port = worker.stdout.readline().strip()
        command = [sys.executable, "-c", CALL, port]
        with subprocess.Popen(command, **started) as rank:  # type: ignore[call-overload]
            assert rank.stdout.readline() == "there\n"
            pids = {"rank": rank.pid, "VLLM::": worker.pid}
            demo: Any = SimpleNamespace(find=lambda kind: [psutil.Process(pids[kind])])
            strike_of("bridge sender cut off")(demo, random.Random(0))
            assert rank.stdout.read() == worker.stdout.read() == "b''\n"


def test_one_bit_is_changed_where_the_digest_looks(tmp_path: Path) -> None:
    class Rank:
        def kill(self) -> None:
            killed.append(self)

    killed: list[Rank] = []
    folders = [save(tmp_path, step) for step in (2, 4)]
    (tmp_path / "step_6").mkdir()
    demo: Any = SimpleNamespace(checkpoints=tmp_path, find=lambda kind: [Rank()])
    fault = next(fault for fault in FAULTS if fault.name == "newest checkpoint damaged")
    fault.strike(demo, random.Random(0))
    older, newest = (damaged_file(x, read_marker(x), ["data.distcp"]) for x in folders)
    assert older is None and newest is not None
    assert "is damaged: its bytes are not those that were saved" in newest
    assert len(killed) == 1
    fault.mend(demo)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_6"]


FULL = """
import random, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
from benchmarks.chaos_faults import FAULTS
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], check=True)
fault = next(fault for fault in FAULTS if fault.name == "full disk while saving")
demo = SimpleNamespace(checkpoints=folder)
fault.strike(demo, random.Random(0))
try:
    (folder / "x").write_bytes(b"1")
except OSError as error:
    print(error.strerror)
fault.mend(demo)
print((folder / "x").write_bytes(b"1"))
"""


def test_a_disk_is_filled_and_emptied(tmp_path: Path) -> None:
    inside = ["unshare", "--map-root-user", "--mount", "--"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this user may make no namespaces")
    command = [*inside, sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "No space left on device\n1\n", done.stderr
