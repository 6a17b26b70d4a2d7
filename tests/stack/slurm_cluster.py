"""A private SLURM on this machine: munged, slurmctld and one slurmd for each node, all in a folder.

The packages are Debian's slurm-wlm and munge.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")
LIMIT_S = 90.0
_SBIN = os.pathsep.join(("/usr/sbin", "/sbin"))
_CONFIG = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=5
ReturnToService=2
KillWait=30
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What of SLURM is not installed."""
    return [name for name in (*DAEMONS, *CLIENTS) if _find(name) is None]


def _find(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=_SBIN)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class SlurmCluster:
    """Use as a context manager; nothing of it is left."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        """folder: short, because sockets lie in it."""
        self.folder = folder
        self._nodes = [f"n{k}" for k in range(1, num_nodes + 1)]
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmCluster:
        self.folder.mkdir(mode=0o755)
        (self.folder / "state").mkdir()
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.run("scancel", "--user", getpass.getuser())
            self._wait(lambda: not self.run("squeue", "--noheader").stdout, "all jobs to end")
        finally:
            self._end()

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        own = [
            f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "seed", "log")
        ]
        self._spawn(
            "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *own
        )
        ctld_port, *ports = _free_ports(1 + len(self._nodes))
        host = socket.gethostname().partition(".")[0]
        cpus = len(os.sched_getaffinity(0))
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
            "RealMemory=1000 State=UNKNOWN"
            for name, port in zip(self._nodes, ports, strict=True)
        ]
        config = _CONFIG.format(
            host=host,
            ctld_port=ctld_port,
            user=getpass.getuser(),
            folder=self.folder,
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(config)
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged to listen")
        self._spawn("slurmctld", "-D", "-i", "-f", str(self.folder / "slurm.conf"))
        for name in self._nodes:
            self._spawn("slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf"))
        self._wait(self._all_idle, "all nodes to be idle")

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--format=%T").stdout.split()
        return states == ["idle"]

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            for daemon in self._daemons:
                assert daemon.poll() is None, f"{daemon.args!r}: ended\n{self.logs()}"
            assert time.monotonic() < deadline, f"waited for {what}\n{self.logs()}"
            time.sleep(0.2)

    def _spawn(self, name: str, *arguments: str) -> None:
        program = _find(name)
        assert program is not None
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons.append(
                subprocess.Popen(
                    [program, *arguments], env=self.environment(), stdout=out, stderr=out
                )
            )

    def _end(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def environment(self) -> dict[str, str]:
        """For its programs."""
        kept = {name: os.environ[name] for name in ("HOME",) if name in os.environ}
        path = os.pathsep.join((os.environ["PATH"], _SBIN))
        return {**kept, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(
        self,
        *command: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """One of the client programs."""
        return subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment(), **(environment or {})},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def submit(
        self, file: Path, *arguments: str, options: Sequence[str], environment: Mapping[str, str]
    ) -> int:
        """sbatch from the repository; returns the job's number."""
        command = ["sbatch", "--parsable", *options, str(file), *arguments]
        done = self.run(*command, cwd=file.parents[2], environment=environment)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def state(self, job: int) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        done = self.run("scontrol", "--oneliner", "show", "job", str(job))
        assert done.returncode == 0, done.stderr
        fields = dict(f.partition("=")[::2] for f in done.stdout.split())
        return fields["JobState"]

    def logs(self) -> str:
        """What the daemons wrote last."""
        files = [*self.folder.glob("*.out"), *self.folder.glob("*.log")]
        return "\n".join(f"{f.name}:\n{f.read_text()[-2000:]}" for f in files)
