"""A real SLURM cluster on this machine, for tests: munge, slurmdbd on a MariaDB of its own, slurmctld and four slurmd.

Four virtual nodes of 8 CPUs and 2 pretend GPUs (device files that lead nowhere) in the partitions `main` (default), `high`,
which preempts it, and `brief`, which allows ten minutes. Nothing outside the cluster's folder is changed: all nodes are
127.0.0.1, ports are free ones, and every daemon ends with this process.

It needs root and Debian's packages; `require()` names what is missing. One cluster takes three seconds to come up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = "munge slurmctld slurmd slurm-client slurmdbd mariadb-server-core"
COMMANDS = ("munged", "munge", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch", "srun", "sacct", "sacctmgr", "scontrol")
MYSQL = Path("/usr/share/mysql")
NODES = ("node1", "node2", "node3", "node4")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PR_SET_PDEATHSIG = 1

CONF = """\
ClusterName=zexptest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldDebug=info
SlurmdDebug=info
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldLogFile={folder}/slurmctld.log
MailProg=/usr/bin/true
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
DependencyParameters=kill_invalid_depend
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=1
SlurmctldTimeout=30
SlurmdTimeout=15
KillWait=5
MaxArraySize={max_array_size}
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={folder}/munge.socket
AccountingStorageTRES=gres/gpu
{nodes}
PartitionName=main Nodes=node[1-4] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 MaxTime=INFINITE State=UP
PartitionName=high Nodes=node[1-4] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
PartitionName=brief Nodes=node[1-4] PriorityTier=1 PreemptMode=REQUEUE MaxTime=10 State=UP
"""
DBD_CONF = """\
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoInAddrAny
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
DebugLevel=info
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""


def require() -> None:
    """Raises RuntimeError with what to do if this machine cannot run a cluster."""
    missing = [name for name in COMMANDS if shutil.which(name, path=PATH) is None]
    if missing or not (MYSQL / "mysql_system_tables.sql").is_file():
        what = ", ".join(missing) or str(MYSQL / "mysql_system_tables.sql")
        raise RuntimeError(
            f"{what} is missing. These tests need SLURM: apt-get install --no-install-recommends {PACKAGES} "
            "(their services need not run: mask them, or put `exit 101` into /usr/sbin/policy-rc.d meanwhile)"
        )
    if os.getuid() != 0:
        raise RuntimeError("These tests start slurmd, which needs root. Run them in a container, or with sudo.")


@dataclass
class Cluster:
    """folder: an empty one with a short path (sockets lie in it)."""

    folder: Path
    max_array_size: int = 1001
    ports: dict[str, int] = field(default_factory=dict)
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _starter: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """All that a client needs."""
        return {"SLURM_CONF": str(self.conf)}

    def up(self) -> None:
        require()
        host = socket.gethostname()
        self.ports = dict(zip(("ctld", "dbd", *NODES), free_ports(2 + len(NODES)), strict=True))
        for name in ("state", "spool", "tmp", "mysql/mysql", "dev"):
            (self.folder / name).mkdir(parents=True)
        for number in (0, 1):
            os.mknod(self.folder / "dev" / f"nvidia{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/dev/nvidia[0-1]\n")
        facts: dict[str, Any] = {"host": host, "folder": self.folder, "max_array_size": self.max_array_size}
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.ports[name]} CPUs=8 RealMemory=8000 Gres=gpu:2"
            for name in NODES
        )
        self.conf.write_text(CONF.format(**facts, **{k: self.ports[k] for k in ("ctld", "dbd")}, nodes=nodes))
        dbd = self.folder / "slurmdbd.conf"
        dbd.write_text(DBD_CONF.format(**facts, dbd=self.ports["dbd"]))
        dbd.chmod(0o600)
        self._start_munge()
        self._start_mariadb()
        self.start_accounting()
        self._wait(30, lambda: self.ask("sacctmgr", "-i", "add", "cluster", "zexptest") is not None, "the accounting's database")
        self.start_controller()
        for name in NODES:
            self.start_node(name, wait=False)
        for name in NODES:
            self._wait(60, lambda name=name: self.node_is_ready(name), name)
        self._wait(20, lambda: self.ask("sacct", "-n", "-X") is not None, "sacct")

    def down(self) -> None:
        """End every daemon and every job."""
        self._end("slurmctld", signal.SIGKILL)
        for name in NODES:
            self._end(f"slurmd.{name}", signal.SIGKILL)
        self.kill_jobs()
        for name in ("slurmdbd", "mariadbd", "munged"):
            self._end(name, signal.SIGKILL)

    # Faults

    def kill_node(self, name: str) -> None:
        """What a power cut does: slurmd and every process of its jobs get SIGKILL. SLURM finds out by itself in half a minute."""
        self._end(f"slurmd.{name}", signal.SIGKILL)
        self.kill_jobs(name)

    def start_node(self, name: str, *, wait: bool = True) -> None:
        self._launch(f"slurmd.{name}", "slurmd", "-D", "-N", name)
        if wait:
            time.sleep(0.5)  # until it has registered, the state that scontrol shows may be the old one
            self._wait(60, lambda: self.node_is_ready(name), name)

    def kill_controller(self) -> None:
        self._end("slurmctld", signal.SIGTERM)  # in order: SIGKILL would lose the jobs of the last seconds

    def start_controller(self) -> None:
        self._launch("slurmctld", "slurmctld", "-D")
        self._wait(20, lambda: " UP" in (self.ask("scontrol", "ping") or ""), "slurmctld")

    def kill_accounting(self) -> None:
        self._end("slurmdbd", signal.SIGTERM)

    def start_accounting(self) -> None:
        self._launch("slurmdbd", "slurmdbd", "-D")
        self._wait(30, lambda: self.ask("sacctmgr", "-n", "list", "cluster") is not None, "slurmdbd")

    def kill_jobs(self, node: str | None = None) -> None:
        """SIGKILL to the processes of jobs, of one node or of all, until none is left."""
        for _ in range(20):
            pids = self.processes(node)
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def node_is_ready(self, name: str) -> bool:
        said = self.ask("sinfo", "-h", "-p", "main", "-n", name, "-o", "%T") or ""
        if said.strip() in ("down", "down*", "drained"):
            self.ask("scontrol", "update", f"nodename={name}", "state=resume")
        return said.strip() in ("idle", "mixed", "allocated", "completing")

    # Commands

    def ask(self, *command: str, seconds: float = 15.0) -> str | None:
        """What a command prints; None if it fails."""
        environment = {"PATH": PATH, **self.environment}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
        except subprocess.TimeoutExpired:
            return None
        return done.stdout if done.returncode == 0 else None

    def run(self, *command: str) -> str:
        """The same, of a command that must not fail."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PATH": PATH, **self.environment})
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    # Daemons

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        places = {name: f"{self.folder}/munge.{name}" for name in ("socket", "pid", "seed", "log")}
        self._launch(
            "munged", "munged", "-F", "--force", f"--key-file={key}", f"--socket={places['socket']}",
            f"--pid-file={places['pid']}", f"--seed-file={places['seed']}", f"--log-file={places['log']}",
        )  # fmt: skip
        self._wait(10, lambda: self.ask("munge", "-n", "-S", places["socket"]) is not None, "munged")

    def _start_mariadb(self) -> None:
        own = [
            "--no-defaults", "--user=root", "--skip-networking", "--skip-log-bin", "--performance-schema=OFF",
            "--innodb-buffer-pool-size=24M", "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0",
            "--innodb-lock-wait-timeout=900", f"--datadir={self.folder}/mysql", f"--tmpdir={self.folder}/tmp",
        ]  # fmt: skip
        tables = "".join((MYSQL / f"mysql_system_tables{part}.sql").read_text() for part in ("", "_data"))
        subprocess.run(
            ["mariadbd", *own, "--bootstrap", "--silent-startup"],
            input=f"use mysql;\n{tables}", text=True, check=True, capture_output=True, env={"PATH": PATH},
        )  # fmt: skip
        init = self.folder / "init.sql"
        init.write_text(
            "create database slurm_acct_db;\ncreate user slurm@localhost identified by 'slurm';\n"
            "grant all on slurm_acct_db.* to slurm@localhost;\n"
        )
        self._launch("mariadbd", "mariadbd", *own, f"--socket={self.folder}/mysql.sock", f"--init-file={init}")
        self._wait(30, (self.folder / "mysql.sock").exists, "MariaDB")

    def _launch(self, name: str, *command: str) -> None:
        environment = {
            "PATH": PATH, "HOME": str(self.folder), "LANG": "C.UTF-8", "MYSQL_UNIX_PORT": f"{self.folder}/mysql.sock",
            **self.environment,
        }  # fmt: skip
        with open(self.folder / f"{name}.out", "ab") as output:
            # A daemon dies with the *thread* that started it: one that lives as long as this process.
            self.daemons[name] = self._starter.submit(
                subprocess.Popen, command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
                start_new_session=True, preexec_fn=_die_with_parent, cwd=self.folder,
            ).result()  # fmt: skip

    def _end(self, name: str, number: signal.Signals) -> None:
        process = self.daemons.pop(name, None)
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)

    def processes(self, node: str | None) -> list[int]:
        """Processes with this cluster's job environment, and the slurmstepd above them."""
        found = []
        mine = f"SLURM_CONF={self.conf}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                variables = (path / "environ").read_bytes().split(b"\0")
                command = (path / "comm").read_text().strip()
            except OSError:
                continue
            if mine not in variables or int(path.name) == os.getpid():
                continue
            names = {v.partition(b"=")[2].decode() for v in variables if v.startswith(b"SLURMD_NODENAME=")}
            if command.startswith("slurmstepd"):
                names |= self._node_of_step(path)
            if names and (node is None or node in names):
                found.append(int(path.name))
        return found

    def _node_of_step(self, path: Path) -> set[str]:
        """A slurmstepd has its slurmd's environment; the log that it holds open tells whose it is."""
        try:
            links = [os.readlink(link) for link in (path / "fd").iterdir()]
        except OSError:
            return set()
        return {name for name in NODES if f"{self.folder}/slurmd.{name}.log" in links}

    def _wait(self, seconds: float, ready: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + seconds
        while not ready():
            dead = {name: one.returncode for name, one in self.daemons.items() if one.poll() is not None}
            if dead or time.monotonic() > end:
                raise RuntimeError(f"{what} is not ready; ended: {dead or 'none'}\n{self._said()}")
            time.sleep(0.1)

    def _said(self) -> str:
        logs: Sequence[Path] = sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")])
        tails = ["\n".join([f"== {path.name}", *path.read_text(errors="replace").splitlines()[-8:]]) for path in logs]
        return "\n".join(tails)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
