"""What deepspeed and torchrun start on every rank: `namr train`, and nothing else.

torchrun --nproc-per-node 2 launchers/train.py homeware --run-dir runs/two
deepspeed --num_accelerators 2 launchers/train.py homeware --run-dir runs/two
"""

from __future__ import annotations

import signal
import sys

# Seconds of imports lie ahead, and schedulers signal every process of a job: who asks again is
# heard once ranks train. Until then Ctrl-C ends a rank, without a traceback from each.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from namr_dist.cli.main import main  # noqa: E402

if __name__ == "__main__":
    # The deepspeed launcher adds --local_rank=N, which its environment variable LOCAL_RANK says as
    # well.
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    sys.exit(main(["train", *words]))
