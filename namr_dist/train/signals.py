"""Requests to stop: Ctrl-C, a closed terminal, SIGTERM, and SIGUSR1, which a scheduler sends ahead
of a time limit.

The first asks for a checkpoint at the end of the step. Another SIGINT, SIGHUP or SIGTERM before it
is written ends the process at once, even within a collective that never returns: a thread reads the
signals as they come. Signals within SAME_S of the first are the same request, since schedulers
signal every process of a job and launchers pass signals on as well; SIGUSR1, which they repeat, is
only ever a notice.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from types import FrameType, TracebackType

EXIT_CODE = 75
"""Of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h, "try again later"."""
SAME_S = 1.0
"""Seconds within which signals are one request."""

_ENDING = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
STOP_SIGNALS = (*_ENDING, signal.SIGUSR1)
_END = 0  # no signal's number


class StopRequests:
    """Within its `with`, signals are requests; `signal` is the number of the first, or 0.

    Those that were ignored when the process began stay ignored, as nohup wants it; but for SIGUSR1,
    which launchers ignore until ranks can hear it. Outside the main thread, where Python takes no
    signals, none is ever noted.
    """

    def __init__(self, *, speaks: bool = True, until_exit: bool = False) -> None:
        """speaks: whether this process says what it does; one of many ranks is enough.  until_exit:
        after the `with` comes the end of the process, whose exit code no late signal may change, so
        signals stay ignored; Python's own end would set back handlers, and die of the next one."""
        self.signal = 0
        self._until_exit = until_exit
        self._speaks = speaks
        self._over = False
        self._first_s = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number == signal.SIGUSR1 or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, _noted_elsewhere)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._until_exit else handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup)
        # Closing it would not do: forked workers have it open as well.
        os.write(self._writer, bytes([_END]))
        self._thread.join()
        os.close(self._writer)
        os.close(self._reader)

    def no_more(self) -> None:
        """The checkpoint is written, or an error ends the run: signals change nothing any more.
        Launchers end the other ranks when one has ended."""
        self._over = True

    def _listen(self) -> None:
        announced = False
        while True:
            waits = self.signal and not announced and not self._over
            if waits and not select.select([self._reader], [], [], SAME_S)[0]:
                announced = True
                if not self._over:
                    self._say(
                        f"{_name(self.signal)}: a checkpoint follows at the end of this step; "
                        "another one ends the run at once, without it"
                    )
                continue
            numbers = os.read(self._reader, 64)
            for number in numbers:
                if number == _END:
                    return
                self._note(number)

    def _note(self, number: int) -> None:
        if number not in self._before:  # SIGCHLD, say
            return
        now_s = time.monotonic()
        if not self.signal:
            self.signal, self._first_s = number, now_s
        elif number in _ENDING and now_s - self._first_s > SAME_S and not self._over:
            self._say(
                f"{_name(number)} again: the run ends at once; "
                "the same command with --resume goes on from the last checkpoint"
            )
            os._exit(128 + number)  # as a shell counts signals

    def _say(self, text: str) -> None:
        # Not by print: the main thread may be inside it, with its lock held.
        if self._speaks:
            # A progress bar hides the cursor, and its line has no end yet.
            cursor = "\x1b[?25h\n" if os.isatty(2) else ""
            with contextlib.suppress(OSError):  # the terminal may be closed
                os.write(2, f"{cursor}namr: {text}\n".encode())


def _noted_elsewhere(number: int, frame: FrameType | None) -> None:
    """The thread has heard of it."""


def _name(number: int) -> str:
    return signal.Signals(number).name
