"""Remote shards fetched shortly before the plan needs them, while training runs."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from namr_dist.data.read.stream import Batch, TrainPlan
from namr_dist.data.read.watched_loader import set_up_worker
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import ReportedError

_MOST_BATCHES = 1000


def fetched_ahead(batches: Iterator[Batch], manifest: Manifest, plan: TrainPlan) -> Iterator[Batch]:
    """The same batches, while the shards of later ones are fetched; for a local set, nothing
    more."""
    if manifest.source is None:
        yield from batches
        return
    first = next(batches)
    ahead = LookAhead(manifest, plan.shards())
    try:
        for batch in itertools.chain([first], batches):
            ahead.taken()
            yield batch
    finally:
        ahead.close()


class LookAhead:
    """A process that asks for the shards of coming batches, so that readers find them in the cache.

    It stays within as many shards as two batches have at most: those being read and as many again,
    which is what `check_cache` makes sure of, so that it never drives out what is still to be read.
    A shard that cannot be had is left to its reader, who raises the error.

    It is no thread, since worker processes are forked at any time: one forked while a thread looks
    up a host or begins TLS would wait for ever for the locks that those functions have.
    """

    def __init__(self, manifest: Manifest, shards_by_batch: Iterable[Iterable[int]]) -> None:
        """shards_by_batch: positions in `manifest.shards` of each batch to come, in order; read as
        far as is needed."""
        self._manifest = manifest
        context = multiprocessing.get_context("fork")
        self._taken = context.Semaphore(0)
        self._process = context.Process(
            target=self._run, args=(shards_by_batch,), name="look-ahead", daemon=True
        )
        self._process.start()

    def taken(self) -> None:
        """Training has taken the next batch."""
        self._taken.release()

    def close(self) -> None:
        """Break off; what has come of a shard stays in the cache."""
        self._process.kill()
        self._process.join()

    def _run(self, shards_by_batch: Iterable[Iterable[int]]) -> None:
        set_up_worker(0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nobody waits for what it fetches
        window: deque[set[int]] = deque()
        wanted: Counter[int] = Counter()
        most = taken = 0
        for number, batch in enumerate(shards_by_batch, 1):
            shards = set(batch)
            fresh = shards.difference(wanted)
            most = max(most, len(shards))
            window.append(shards)
            wanted.update(shards)
            while True:
                while self._taken.acquire(block=False):
                    taken += 1
                # The batch taken last may still be read by workers that are ahead: it stays.
                while len(window) > 1 and number - len(window) + 1 < taken:
                    wanted.subtract(window.popleft())
                    wanted = +wanted
                if len(window) <= _MOST_BATCHES and len(wanted) <= 2 * most:
                    break
                self._taken.acquire()
                taken += 1
            if number < taken:  # too late: it has been read
                continue
            for shard in sorted(fresh):
                with contextlib.suppress(ReportedError):
                    self._manifest.path(self._manifest.shards[shard])
