"""Where a run begins: the first rank claims the folder and looks what is in it, and all begin, or
end, together."""

from __future__ import annotations

import hashlib
import socket
import time
from pathlib import Path
from typing import BinaryIO

import torch.distributed as dist

from namr_dist.atomic import write_atomic
from namr_dist.config import Config
from namr_dist.data.remote.address import has_credentials
from namr_dist.errors import InputError, ReportedError, exit_code_of
from namr_dist.parallel.host import HostGroup
from namr_dist.parallel.ranks import shut_down
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.resume import Start, find_start
from namr_dist.train.checkpoints.state import check_fits
from namr_dist.train.checks import run_bytes
from namr_dist.train.objective import TrainingModule
from namr_dist.train.profile import check_profile

_SEEN_S = 30.0
"""A file system between nodes may show a new file some seconds late."""


def begin(
    module: TrainingModule,
    config: Config,
    run: RunFolder,
    data_hash: str,
    host: HostGroup,
    *,
    overwrite: bool,
    resume: bool,
) -> tuple[Start, BinaryIO | None]:
    """Make the folder ready and say where to begin, on the first rank; with the lock that keeps
    others out of it.

    Every rank calls it. Raises ReportedError or OSError on the first if it cannot, and ends the
    others with the exit code of that.
    """
    # A run that is to be replaced still stands if another rank sees none, or another.
    _end_together(_not_shared(run, host), host)
    trouble: ReportedError | OSError | None = None
    start, lock = Start(), None
    if dist.get_rank() == 0:
        try:
            start, lock = _claim(module, config, run, data_hash, overwrite=overwrite, resume=resume)
        except (ReportedError, OSError) as error:
            trouble = error
    _end_together(trouble, host)
    _end_together(_not_shared(run, host), host)
    return start, lock


def _not_shared(run: RunFolder, host: HostGroup) -> InputError | None:
    """On the first rank, what is wrong if another sees a folder of its own, and would write its
    parts of checkpoints there. Without a configuration on the first rank that cannot be said."""
    wanted = host.from_first(_hash(run.config) if dist.get_rank() == 0 else None)
    if wanted is None:
        return None  # unseen: network file systems may remember for a while what was not there
    ends_s = time.monotonic() + _SEEN_S
    while not (seen := _hash(run.config) == wanted) and time.monotonic() < ends_s:
        time.sleep(0.2)
    others = sorted({name for name in host.of_all(None if seen else socket.gethostname()) if name})
    if not others:
        return None
    return InputError(
        f"run folder {run.path} of {socket.gethostname()} is not the one that {', '.join(others)} sees; each "
        "rank writes its part of a checkpoint there: choose a folder on storage that all nodes share with "
        "--run-dir"
    )


def _hash(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _claim(
    module: TrainingModule,
    config: Config,
    run: RunFolder,
    data_hash: str,
    *,
    overwrite: bool,
    resume: bool,
) -> tuple[Start, BinaryIO | None]:
    lock = run.lock() if run.path.is_dir() else None
    start = find_start(run, config, data_hash=data_hash) if resume else Start()
    if start.finished:
        return start, lock
    check_profile(config)
    if start.saved:
        check_fits(start.saved, module)
    there_bytes = run.checkpoint_bytes() if start.goes_on else 0
    run.claim(
        overwrite=overwrite,
        goes_on=start.goes_on,
        need_bytes=max(0, run_bytes(module, config) - there_bytes),
    )
    lock = lock or run.lock()
    write_config(run, config)
    return start, lock


def write_config(run: RunFolder, config: Config) -> None:
    """Write config.json, which evaluation reads the set's location from: for this user's eyes alone
    where that may hold credentials."""
    write_atomic(run.config, config.to_json(), private=has_credentials(config))


def _end_together(trouble: ReportedError | OSError | None, host: HostGroup) -> None:
    """Raise the first rank's trouble there, once, and end the others with the exit code it will
    have."""
    code = host.from_first(None if trouble is None else exit_code_of(trouble) or 1)
    if code is None:
        return
    if trouble is None:
        shut_down(code)
    dist.destroy_process_group()
    assert trouble is not None
    raise trouble
