"""The items of an index: what each is called, where its picture is, what it shows.

Shapes: N items.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Int64

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One neighbour."""

    id: str
    path: str
    """of a picture in a folder, its path; else the id"""
    label: str | None
    distance: float
    """the square root of the mode's squared distance. A mode that lessens squared distances, as
    structure does by γ ρ, has γ ρ_max added to them: then they are those of the vectors in the
    index, and an item's to itself is not 0"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where pictures were when they were indexed."""

    kind: Literal["folder", "shards", "vectors", "memory"]
    place: str = ""
    """folder: its path; shards: folder or URL; vectors: the file; memory: nothing"""
    split: str = ""
    """of shards"""

    @property
    def text(self) -> str:
        """In words."""
        return " ".join(filter(None, (self.kind, self.place, self.split)))


@dataclass(frozen=True, kw_only=True)
class Items:
    """N items in the order of the index's positions."""

    ids: tuple[str, ...]
    """each different: a picture's path below its folder, a key of a shard set, a name"""
    labels: tuple[str | None, ...]
    """what is shown of its class; None where nothing is known"""
    source_N: Int64
    """position in `sources`"""
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.labels) == len(self.source_N)

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def none(cls) -> Items:
        """Not one."""
        return cls(ids=(), labels=(), source_N=np.empty(0, dtype=np.int64), sources=())

    @cached_property
    def position_by_id(self) -> dict[str, int]:
        """Where each item is."""
        return {one: position for position, one in enumerate(self.ids)}

    def path(self, position: int) -> str:
        """Of a picture in a folder, its path; else the item's id."""
        source = self.sources[self.source_N[position]]
        return (
            os.path.abspath(Path(source.place, self.ids[position]))
            if source.kind == "folder"
            else self.ids[position]
        )

    def check_ids(self) -> None:
        """Raise InputError, naming some, if two items have one id, or if one is no text."""
        if wrong := [one for one in self.ids if not _is_text(one)]:
            raise InputError(
                f"{len(wrong):,} names are not UTF-8, such as {_some(wrong)}; rename these files"
            )
        if len(self.position_by_id) < len(self.ids):
            seen: set[str] = set()
            twice = [one for one in self.ids if one in seen or seen.add(one)]  # type: ignore[func-returns-value]
            raise InputError(
                f"items share ids, such as {_some(twice)} ({len(twice):,} in all); give every item its own"
            )

    def joined(self, more: Items) -> Items:
        """With others behind. One of them whose id another picture has is called by its path.

        Raises InputError if a picture is there already.
        """
        there = {self.path(position) for position in range(len(self))}
        paths = [more.path(position) for position in range(len(more))]
        ids = tuple(
            path if one in self.position_by_id else one
            for one, path in zip(more.ids, paths, strict=True)
        )
        if shared := [one for one, path in zip(more.ids, paths, strict=True) if path in there]:
            raise InputError(
                f"{len(shared):,} of {len(more):,} items are in the index already, such as {_some(shared)}; "
                "remove these first (namr index remove), or leave them out"
            )
        sources = tuple(dict.fromkeys((*self.sources, *more.sources)))
        renumbered = np.array([sources.index(source) for source in more.sources], dtype=np.int64)
        both = Items(
            ids=self.ids + ids,
            labels=self.labels + more.labels,
            source_N=np.concatenate([self.source_N, renumbered[more.source_N]]),
            sources=sources,
        )
        both.check_ids()
        return both

    def at(self, positions: Int64) -> Items:
        """Some of them, in that order."""
        chosen = positions.tolist()
        return replace(
            self,
            ids=tuple(self.ids[position] for position in chosen),
            labels=tuple(self.labels[position] for position in chosen),
            source_N=self.source_N[positions],
        )

    def positions(self, ids: Sequence[str]) -> Int64:
        """Where items of these ids are. Raises InputError, naming some, if one is not there."""
        if missing := [one for one in ids if one not in self.position_by_id]:
            raise InputError(
                f"{len(missing):,} of {len(ids):,} ids are not in the index, such as {_some(missing)}; "
                "`namr index info` shows what ids look like"
            )
        return np.array([self.position_by_id[one] for one in ids], dtype=np.int64)

    def table(self) -> Any:
        """As a pyarrow table: id, label, source."""
        import pyarrow

        return pyarrow.table(
            {
                "id": pyarrow.array(self.ids, pyarrow.string()),
                "label": pyarrow.array(self.labels, pyarrow.string()),
                "source": pyarrow.array(self.source_N, pyarrow.int32()),
            }
        )

    @classmethod
    def of_table(cls, table: Any, sources: tuple[Source, ...], where: str) -> Items:
        """What `table` made. Raises InputError, naming the file `where`, for another table."""
        try:
            ids, labels = table["id"].to_pylist(), table["label"].to_pylist()
            source_N = np.asarray(table["source"].to_numpy(), dtype=np.int64)
        except (KeyError, ValueError) as error:
            raise InputError(f"{where} has no items ({error}); build the index again") from None
        if not all(isinstance(one, str) for one in ids) or not all(
            one is None or isinstance(one, str) for one in labels
        ):
            raise InputError(f"{where} has ids or labels that are no text; build the index again")
        if len(source_N) and not 0 <= source_N.min() <= source_N.max() < len(sources):
            raise InputError(
                f"{where} names sources that index.json has not; build the index again"
            )
        items = cls(ids=tuple(ids), labels=tuple(labels), source_N=source_N, sources=sources)
        items.check_ids()
        return items


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:_SHOWN])
