"""Remote shards fetched shortly before the plan needs them, while training runs."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from namr_dist.data.manifest import Manifest
from namr_dist.data.stream import Batch, TrainPlan
from namr_dist.errors import InputError

_MOST_BATCHES = 1000


def fetched_ahead(batches: Iterator[Batch], manifest: Manifest, plan: TrainPlan) -> Iterator[Batch]:
    """The same batches, while the shards of later ones are fetched; for a local set, nothing more."""
    if manifest.source is None:
        yield from batches
        return
    # Once the first batch is there: by then the worker processes are forked, which no thread should see.
    first = next(batches)
    ahead = LookAhead(manifest, plan.shards())
    try:
        for batch in itertools.chain([first], batches):
            ahead.taken()
            yield batch
    finally:
        ahead.close()


class LookAhead:
    """A thread that asks for the shards of coming batches, so that readers find them in the cache.

    It stays within as many shards as two batches have at most: those being read and as many again, which is what
    `check_cache` makes sure of, so that it never drives out what is still to be read. A shard that cannot be had is
    left to its reader, who raises the error.
    """

    def __init__(self, manifest: Manifest, shards_by_batch: Iterable[Iterable[int]]) -> None:
        """shards_by_batch: places in `manifest.shards` of each batch to come, in order; read as far as is needed."""
        self._manifest = manifest
        self._changed = threading.Condition()
        self._taken = 0
        self._closed = False
        # A daemon: a fetch may take minutes, and nobody is to wait for it at the end.
        threading.Thread(target=self._run, args=(shards_by_batch,), name="look-ahead", daemon=True).start()

    def taken(self) -> None:
        """Training has taken the next batch."""
        with self._changed:
            self._taken += 1
            self._changed.notify()

    def close(self) -> None:
        """Begin no further fetch."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self, shards_by_batch: Iterable[Iterable[int]]) -> None:
        window: deque[set[int]] = deque()
        wanted: Counter[int] = Counter()
        most = 0
        for number, batch in enumerate(shards_by_batch, 1):
            shards = set(batch)
            fresh = shards.difference(wanted)
            most = max(most, len(shards))
            window.append(shards)
            wanted.update(shards)
            with self._changed:
                while not self._closed:
                    # The batch taken last may still be read by workers that are ahead: it stays.
                    while len(window) > 1 and number - len(window) + 1 < self._taken:
                        wanted.subtract(window.popleft())
                        wanted = +wanted
                    if len(window) <= _MOST_BATCHES and len(wanted) <= 2 * most:
                        break
                    self._changed.wait()
                if self._closed:
                    return
                if number < self._taken:  # too late: it has been read
                    continue
            for shard in sorted(fresh):
                if self._closed:
                    return
                with contextlib.suppress(InputError):
                    self._manifest.path(self._manifest.shards[shard])
