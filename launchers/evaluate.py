"""What deepspeed and torchrun start on every rank to measure a run: `namr evaluate`.

torchrun --nproc-per-node 2 --module namr_dist.launchers.evaluate runs/two
deepspeed --num_accelerators 2 --module namr_dist.launchers.evaluate runs/two
"""

from __future__ import annotations

import signal
import sys

# Schedulers send it ahead of a time limit, to processes that could write a checkpoint: there is
# none to write here, and the figures may still come in time.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from namr_dist.cli.main import main  # noqa: E402

if __name__ == "__main__":
    # As in train.py, deepspeed's own word.
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    sys.exit(main(["evaluate", *words]))
