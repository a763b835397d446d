"""The process of one job: its stages one after another, and a line to the slot's server as each starts and ends.

Forked by the server, or, where processes are spawned, `python -m zexp.study.launch.child JOB_FD REPORT_FD` with the job as
the first line of JOB_FD. Either way JOB_FD stays open for as long as the server lives: its end is the server's death.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from zexp.store.lease import LeaseTimes
from zexp.study.ranks import run_task
from zexp.study.stages import EXIT_CODES, Ended, Interrupted, Watcher, run_stage


def run_job(job: dict[str, Any], lifeline: int, report: int) -> NoReturn:
    """Run the job's requests and end the process. With one request the exit code says how it ended (EXIT_CODES);
    with several it is that of the last one that is not done.

    job: {store, lease_times, requests, handlers, grace_seconds, devices: CUDA_VISIBLE_DEVICES, None = as it is}, and tasks if this
    process is rank 0 of so many that a cluster started. Nothing of the server runs on the way out: no atexit, no finally.
    """
    code = EXIT_CODES["failed"]
    try:
        if job["devices"] is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = job["devices"]  # read when CUDA is first used
        faulthandler.enable(file=2)  # a number: follows the redirection to the stage's log
        threading.Thread(target=_watch, args=(lifeline, job["grace_seconds"]), daemon=True).start()
        code = _run(job, report)
    except Interrupted:
        code = EXIT_CODES["interrupted"]
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = code or EXIT_CODES["failed"]  # a full disk: what was printed last is lost
        os._exit(code)


def _run(job: dict[str, Any], report: int) -> int:
    code = 0
    for request in job["requests"]:
        stage = request["stage"]
        waiting = False

        def say(op: str, stage: str = stage, **facts: Any) -> None:
            # A broken pipe: the server has died. The lifeline is what stops this process then, at a state.
            with contextlib.suppress(BrokenPipeError):
                os.write(report, json.dumps({"op": op, "stage": stage, **facts}).encode() + b"\n")

        def on_wait(holder: dict[str, Any]) -> None:
            nonlocal waiting
            if not waiting:  # once; it may take hours
                say("waiting", holder=holder)
                waiting = True

        watcher = Watcher(started=lambda path: say("started", attempt=str(path)), waiting=on_wait)
        times = LeaseTimes(**job["lease_times"])
        try:
            if job.get("tasks", 1) > 1:
                ended = run_task(job["store"], request, handlers=job["handlers"], watcher=watcher, times=times)
            else:
                ended = run_stage(job["store"], request, handlers=job["handlers"], watcher=watcher, times=times)
        except Exception as error:  # of ranks that do not meet: there is no attempt yet that could hold it
            traceback.print_exc()
            ended = Ended("failed", "".join(traceback.format_exception_only(error)).strip())
        say("ended", result=ended.result, error=ended.error)
        code = EXIT_CODES[ended.result] or code
        if ended.result == "interrupted":
            break
    return code


def _watch(lifeline: int, grace_seconds: float) -> None:
    """When the server has gone, write a state and stop; do not go on without anybody who knows."""
    while os.read(lifeline, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> NoReturn:
    lifeline, report = int(sys.argv[1]), int(sys.argv[2])
    line = b""
    while not line.endswith(b"\n"):
        got = os.read(lifeline, 1)  # unbuffered: what follows the line is the lifeline
        if not got:
            os._exit(EXIT_CODES["failed"])
        line += got
    job = json.loads(line)
    for number in (lifeline, report, *job["lease"]):  # kept open by this process, not by programs that a stage starts
        os.set_inheritable(number, False)
    run_job(job, lifeline, report)


if __name__ == "__main__":
    main()
