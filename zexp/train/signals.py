"""Being told to stop: the handler sets a flag, the loop looks at it between two optimizer steps.

SIGTERM is what launchers and schedulers send, SIGUSR2 what SLURM sends before a time limit, SIGINT is Ctrl-C in a
terminal (it reaches the whole process group). A second SIGINT is not waited for: it raises KeyboardInterrupt.
"""

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Context manager; `.requested` holds the name of the first signal that arrived, or None.

    Python delivers signals to the main thread only: entered elsewhere, it installs nothing and stays None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._set)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _set(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number).name
