"""torchrun whose ranks may finish what a signal asks of them, and whose exit code is theirs.

    python -m namr_dist.launchers.torchrun --nproc-per-node 2 \\
        --module namr_dist.launchers.train homeware

torchrun itself kills its ranks 30 s after SIGTERM, dies of Ctrl-C and of a closed terminal with a
traceback, also under nohup, dies of SIGUSR1 and leaves them behind, and ends with 1 whatever they
end with. Here all these signals go on to the ranks, which write a checkpoint, unless they are
ignored; the first rank that ends with anything but 0 gives this program its exit code, and the
others are ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType

_PASSED_ON = tuple(
    number
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
    if number == signal.SIGUSR1 or signal.getsignal(number) is not signal.SIG_IGN
)
"""But for what nohup, or a shell that starts this in the background, has ignored."""
if __name__ == "__main__" and signal.SIGINT in _PASSED_ON:
    # Seconds of imports lie ahead, in which Ctrl-C is to end this without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from torch.distributed import DistNetworkError  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from torch.distributed.run import main as torchrun  # noqa: E402

from namr_dist.text import say  # noqa: E402

_REFUSED = 2


def main() -> int:
    """Run torchrun with the words of the command line; returns the exit code."""
    for number in _PASSED_ON:
        signal.signal(number, _pass_on_or_end)
    signal.signal(signal.SIGCHLD, _rank_ended)
    try:
        # Those that it handles itself, by ending its ranks.
        torchrun(["--signals-to-handle", "SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # As a shell counts signals.
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        say(f"torchrun: rank {rank} was the first to end, with code {code}", file=sys.stderr)
        return code
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        say(f"torchrun: error: {_port_in_use(str(error))}", file=sys.stderr)
        return _REFUSED
    finally:
        # Python's own end would set back a handler, and die of the next one.
        for number in _PASSED_ON:
            signal.signal(number, signal.SIG_IGN)
    return 0


def _port_in_use(error: str) -> str:
    """error: what the store says that could not listen."""
    named = re.search(r"port: (\d+)", error)
    port = f"port {named[1]}" if named else "a port"
    return (
        f"{port} of this machine, at which the ranks meet, is in use by another program; set "
        "NAMR_MASTER_PORT (of multi_node.sh), NAMR_PORT (of a Slurm job) or --master-port to a free "
        "one, or use --standalone on a single machine"
    )


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
