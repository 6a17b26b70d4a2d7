"""Two hosts on this machine: network namespaces with names and addresses of their own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

ADDRESSES = ("10.213.0.1", "10.213.0.2")
_HOLD = "echo host-{} > /proc/sys/kernel/hostname && echo $$ && exec sleep infinity"


class TwoHosts:
    """What they have, and the cable between them."""

    def __init__(self, pids: Sequence[str]) -> None:
        """pids: of a process in each; none: both are this host as it is."""
        self._pids = pids
        self.address = ADDRESSES[0] if pids else "127.0.0.1"
        """Of the first."""
        if not pids:
            return
        self.run(0, f"ip link add eth type veth peer name eth netns {pids[1]}")
        for host, address in enumerate(ADDRESSES):
            self.run(host, "ip link set lo up")
            self.run(host, f"ip address add {address}/24 dev eth")
            self.run(host, "ip link set eth up")

    def enter(self, host: int) -> list[str]:
        """What stands before a command that runs there; it becomes that command."""
        kinds = ("--user", "--preserve-credentials", "--net", "--uts")
        return ["nsenter", *kinds, "--target", self._pids[host], "--"] if self._pids else []

    def run(self, host: int, command: str) -> None:
        subprocess.run([*self.enter(host), *command.split()], check=True)

    def cut(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        self.run(0, "ip link set eth down")


@contextmanager
def two_hosts_here(*, apart: bool = False) -> Iterator[TwoHosts]:
    """apart: skips where this user may make no namespaces; else both are this host then."""
    with ExitStack() as stack:
        found: list[str] = []
        before: tuple[str, ...] = ("unshare", "--map-root-user")
        for host in range(2 if shutil.which("ip") else 0):
            command = [*before, "--net", "--uts", "sh", "-c", _HOLD.format(host)]
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            if not (pid := process.stdout.readline().strip()):
                found.clear()
                break
            found.append(pid)
            before = (
                "nsenter",
                "--user",
                "--preserve-credentials",
                "--target",
                pid,
                "--",
                "unshare",
            )
        if apart and not found:
            pytest.skip("this user may make no namespaces, or there is no ip")
        yield TwoHosts(found)
