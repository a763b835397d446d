"""Why a stage ended, in words, where it left none itself."""

from __future__ import annotations

import signal

TRACEBACK_LINES = 15


def describe(status: int) -> str:
    """A process's exit status (negative: a signal), for a stage that ended without any word."""
    if status >= 0:
        return f"Its process ended without a result (exit status {status})."
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = ": by hand, or because memory ran out (see dmesg)" if -status == signal.SIGKILL else ""
    return f"Its process was ended by {name}{hint}."


def tail(text: str) -> str:
    """The end of a long text."""
    return "\n".join(text.rstrip().splitlines()[-TRACEBACK_LINES:])
