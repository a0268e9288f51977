"""What deepspeed and torchrun start on every rank: `namr train`, and nothing else.

    torchrun --nproc-per-node 2 launchers/train.py homeware --run-dir runs/two
    deepspeed --num_accelerators 2 launchers/train.py homeware --run-dir runs/two
"""

from __future__ import annotations

import sys

from namr_dist.cli import main

if __name__ == "__main__":
    # The deepspeed launcher adds --local_rank=N, which its environment variable LOCAL_RANK says as well.
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    sys.exit(main(["train", *words]))
