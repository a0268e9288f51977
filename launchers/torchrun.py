"""torchrun whose ranks may finish what a signal asks of them, and whose exit code is theirs.

    python -m namr_dist.launchers.torchrun --nproc-per-node 2 \\
        --module namr_dist.launchers.train homeware

torchrun itself kills its ranks 30 s after SIGTERM, dies of SIGUSR1 and leaves them behind, and ends
with 1 whatever they end with. Here both signals go on to the ranks, which write a checkpoint; the
first that ends with anything but 0 gives this program its exit code, and the others are ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)


def main() -> int:
    """Run torchrun with the words of the command line; returns the exit code."""
    for number in _PASSED_ON:
        signal.signal(number, _pass_on_or_end)
    signal.signal(signal.SIGCHLD, _rank_ended)
    try:
        torchrun(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # As a shell counts signals.
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        print(f"torchrun: rank {rank} was the first to end, with code {code}", file=sys.stderr)
        return code
    finally:
        for (
            number
        ) in _PASSED_ON:  # Python's own end would set back a handler, and die of the next one
            signal.signal(number, signal.SIG_IGN)
    return 0


def _children() -> list[int]:
    children: list[int] = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            children += map(int, (thread / "children").read_text().split())
    return children


def _pass_on(number: int, frame: FrameType | None) -> None:
    for child in _children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)


def _pass_on_or_end(number: int, frame: FrameType | None) -> None:
    if not _children():  # no rank has begun, and there is nothing to finish
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    _pass_on(number, frame)


def _rank_ended(number: int, frame: FrameType | None) -> None:
    """From now on a signal without ranks comes late, and must not take the place of their exit
    code."""
    for late in _PASSED_ON:
        signal.signal(late, _pass_on)


if __name__ == "__main__":
    sys.exit(main())
