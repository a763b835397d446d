"""Which process wrote something, and whether it is known to be dead."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """host, boot (the machine's boot id), namespace (of pids), pid, started (tells recycled pids apart)."""
    return process(os.getpid())


def process(pid: int) -> dict[str, Any]:
    """The same of another process of this machine, which is there."""
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "namespace": _namespace(),
        "pid": pid,
        "started": _started(pid),
    }


def known_dead(process: dict[str, Any]) -> bool:
    """True only if the process ran under this very boot and pid namespace and is gone.

    False means "alive or unknown": another host, a container, a reader who may not see it.
    """
    here = (_boot(), _namespace())
    pid = process.get("pid")
    if None in here or here != (process.get("boot"), process.get("namespace")) or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # somebody else's process, alive; its start time may still tell that the pid was recycled
    started = _started(pid)
    return started is not None and started != process.get("started")


@functools.cache
def _boot() -> str | None:
    if sys.platform == "darwin":
        # Not kern.boottime: it moves when the clock is set.
        return _output("sysctl", "-n", "kern.bootsessionuuid")
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


@functools.cache
def _namespace() -> str | None:
    """Containers share their host's boot id and not its pids."""
    if sys.platform == "darwin":
        return "darwin"
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """A text that two processes of one pid do not share; "zombie" for one that nobody has waited for."""
    if sys.platform == "darwin":
        text = _output("ps", "-o", "state=,lstart=", "-p", str(pid))
        if text is None:
            return None
        state, _, started = text.partition(" ")
        return "zombie" if state.startswith("Z") else started.strip()
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return "zombie" if fields[0] in "ZX" else fields[19]  # proc(5), field 22: starttime, in ticks


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
