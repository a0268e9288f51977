"""A searchable gallery: items, their embeddings, and an index of one retrieval mode over them.

Shapes: Q queries, N items, D width of z, E of what is kept of s, K neighbours, C candidates.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from namr_dist.data.picture import Picture
from namr_dist.errors import InputError
from namr_dist.gallery import folder
from namr_dist.gallery.embedder import Embedder, as_list
from namr_dist.gallery.embedding import Embeddings
from namr_dist.gallery.engine import Engine, SearchSettings, sample, shape_of
from namr_dist.gallery.geometry import Geometry
from namr_dist.gallery.items import Hit, Items
from namr_dist.gallery.pictures import picture_of
from namr_dist.gallery.sheet import contact_sheet, search_page
from namr_dist.retrieval.arrays import Float32, Float64, Int64
from namr_dist.retrieval.forms import Form, mode_named
from namr_dist.retrieval.modes import CALIBRATED, SAMPLE, Side
from namr_dist.retrieval.search import search_excluding_self
from namr_dist.retrieval.vectors import DENSITY_NEIGHBOURS, local_density, mean_of_nearest

_SPARE = 16
"""Candidates of an exact index beyond those asked for, by which its order is checked."""
_CANDIDATES = 1 << 22
"""That are looked at together, of all queries."""
_QUERIES = 1024
"""That are searched for at a time."""
_BLOCK = 1 << 16
"""Items whose float64 copies are held at a time."""
_ROUNDING = 2.0**-23
_LEAST, _MOST = 1e-12, 1e12
"""Of the largest number in embeddings."""


class Gallery:
    """Searched by pictures or by embeddings; items can be added and removed. `open_index` and
    `Model.index` make one."""

    def __init__(
        self, contents: folder.Contents, *, name: str, model: Embedder | None = None
    ) -> None:
        """model: None loads it from where index.json says once it is needed."""
        header = contents.header
        self._contents = contents
        self._model = model
        self.name = name
        self.form = Form(
            mode=mode_named(header.mode),
            centre_D=np.array(header.centre, dtype=np.float64),
            limit=header.limit,
            delta=header.geometry.delta,
        )
        if self.form.mode not in header.geometry.modes:
            raise InputError(
                f"index {name} has mode {header.mode}, which its model does not serve; build it again"
            )

    @property
    def header(self) -> folder.Header:
        """What it is of."""
        return self._contents.header

    @property
    def items(self) -> Items:
        """The items, in order of their positions."""
        return self._contents.items

    @property
    def engine(self) -> Engine:
        """The faiss index."""
        return self._contents.engine

    @property
    def mode(self) -> str:
        """Name of the retrieval mode."""
        return self.header.mode

    @property
    def type(self) -> str:
        """Of gallery.engine.TYPES."""
        return self.header.shape.type

    @property
    def geometry(self) -> Geometry:
        """How embeddings are compared."""
        return self.header.geometry

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"<Gallery {self.name}: {len(self):,} items, {self.mode}, {self.type}>"

    @property
    def model(self) -> Embedder:
        """The network that embedded the items. Raises InputError if it is no more where it was, or
        is another now."""
        if self._model is None:
            place = Path(self.header.model_place)
            try:
                model = Embedder.load(place)
            except InputError as error:
                raise InputError(
                    f"the model of index {self.name} cannot be loaded ({error}); say where it is now: "
                    "open_index(…, model=…), --model on the command line"
                ) from None
            self.header.check_model(model.digest, str(model.place), f"index {self.name}")
            self._model = model
        return self._model

    @cached_property
    def settings(self) -> SearchSettings:
        """How hard an approximate index looks; may be set."""
        return self.header.settings

    @overload
    def search(self, pictures: Picture, k: int = ...) -> list[Hit]: ...
    @overload
    def search(self, pictures: list[Picture], k: int = ...) -> list[list[Hit]]: ...
    def search(self, pictures: Picture | list[Picture], k: int = 10) -> list[Hit] | list[list[Hit]]:
        """The k nearest items of a picture, nearest first; of a list of pictures, a list for each.

        Fewer where the gallery has fewer. A picture that is itself an item is found like any other.
        Raises InputError for what is no picture, and as `model` does.
        """
        asked = as_list(pictures)
        alone = asked is not pictures
        if k < 1:
            raise InputError(f"k is {k}; ask for at least one neighbour")
        if not asked:
            return []
        z_QD, s_QS = self.model.embed(asked, structure=True)
        squared_QK, ids_QK = self.nearest(z_QD, self.geometry.kept(s_QS), min(k, max(1, len(self))))
        hits = [
            self._hits(squared_K, ids_K)
            for squared_K, ids_K in zip(squared_QK, ids_QK, strict=True)
        ]
        return hits[0] if alone else hits

    def nearest(
        self,
        z_QD: Any,
        kept_QE: Any,
        k: int,
        *,
        settings: SearchSettings | None = None,
    ) -> tuple[Float32, Int64]:
        """Squared distances of the mode (Q, K) float32 and positions (Q, K) int64 of the nearest
        items of embedded queries, in the order of (distance, position); +inf and −1 where there are
        no more.

        Whatever the type, distances are computed from the embeddings, not from what the index
        stores. Of a flat index the order is that of an exact search. kept_QE: what
        `geometry.kept` takes of s.
        """
        if k < 1:
            raise InputError(f"k is {k}; ask for at least one neighbour")
        queries = self.geometry.side(z_QD, kept_QE, name="queries")
        if queries.z.shape[1] != self.geometry.width:
            raise InputError(
                f"queries are {queries.z.shape[1]} wide, the items {self.geometry.width}: embed both with "
                "the same model"
            )
        settings = settings or self.settings
        squared_QK = np.full((len(queries.z), k), np.inf, dtype=np.float32)
        ids_QK = np.full((len(queries.z), k), -1, dtype=np.int64)
        if not len(self):
            return squared_QK, ids_QK
        for start in range(0, len(queries.z), _QUERIES):
            rows_B = np.arange(start, min(start + _QUERIES, len(queries.z)))
            listed = min(k, len(self))
            squared_QK[rows_B, :listed], ids_QK[rows_B, :listed] = self._nearest(
                queries.at(rows_B), listed, settings
            )
        return squared_QK, ids_QK

    def _nearest(self, queries: Side, k: int, settings: SearchSettings) -> tuple[Float32, Int64]:
        if not self.form.weighs:
            return self._first(self.form, queries, k, settings)
        count = min(len(self), max(k, settings.candidates))
        _, ids_BC = self._first(replace(self.form, mode=SAMPLE), queries, count, settings)
        squared_BC = self.distances(queries, ids_BC)
        order_BK = self._order(squared_BC, ids_BC)[:, :k]
        return np.take_along_axis(squared_BC, order_BK, 1), np.take_along_axis(ids_BC, order_BK, 1)

    def _order(self, squared_QC: Float32, ids_QC: Int64) -> Int64:
        """(Q, C) columns by (distance, position), −1 last."""
        return np.lexsort((np.where(ids_QC < 0, len(self), ids_QC), squared_QC), axis=-1)

    def _first(
        self, form: Form, queries: Side, k: int, settings: SearchSettings
    ) -> tuple[Float32, Int64]:
        """By a form whose vectors say all."""
        asked_BV = form.queries(queries)
        by_codes = self.type in ("ivfpq", "binary")
        first_count = min(len(self), max(k + _SPARE, settings.candidates if by_codes else 0))
        squared_BK = np.empty((len(asked_BV), k), dtype=np.float32)
        ids_BK = np.empty((len(asked_BV), k), dtype=np.int64)
        waiting = [(np.arange(len(asked_BV)), first_count)]
        while waiting:
            open_M, count = waiting.pop()
            if (most := max(1, _CANDIDATES // count)) < len(open_M):
                waiting += [(open_M[most:], count), (open_M[:most], count)]
                continue
            found_MC, ids_MC = self.engine.search(asked_BV[open_M], count, settings)
            some = queries.at(open_M) if len(open_M) < len(asked_BV) else queries
            squared_MC = self._distances(form, some, ids_MC)
            order_MK = self._order(squared_MC, ids_MC)[:, :k]
            squared_BK[open_M] = np.take_along_axis(squared_MC, order_MK, 1)
            ids_BK[open_M] = np.take_along_axis(ids_MC, order_MK, 1)
            if self.type != "flat" or count == len(self):
                continue
            # Whatever was not found is, in the index's own numbers, at least as far as the last one
            # found: with room for their rounding, no such item belongs to the first k.
            lengths_M = np.linalg.norm(asked_BV[open_M].astype(np.float64), axis=1)
            slack_M = (asked_BV.shape[1] + 8) * _ROUNDING * (lengths_M + self._longest) ** 2
            reached_M = np.take_along_axis(found_MC, order_MK, 1).max(axis=1)
            doubtful_M = open_M[found_MC[:, -1] - reached_M <= 2 * slack_M]
            if len(doubtful_M):
                waiting.append((doubtful_M, min(len(self), 4 * count)))
        return squared_BK, ids_BK

    @cached_property
    def _longest(self) -> float:
        """Length of the longest vector."""
        longest = 0.0
        for start in range(0, len(self), _BLOCK):
            block_B = np.arange(start, min(start + _BLOCK, len(self)))
            lengths_B = np.linalg.norm(self.form.items(self.side(block_B)), axis=1)
            longest = max(longest, float(lengths_B.max()))
        return longest

    def distances(self, queries: Side, ids_QC: Int64) -> Float32:
        """(Q, C) the mode's squared distances of chosen pairs; +inf at −1."""
        return self._distances(self.form, queries, ids_QC)

    def _distances(self, form: Form, queries: Side, ids_QC: Int64) -> Float32:
        chosen_P, places_QC = np.unique(ids_QC, return_inverse=True)
        places_QC = places_QC.reshape(ids_QC.shape)
        first = int(chosen_P[0] < 0)  # −1, of which no row is read
        if first == len(chosen_P):
            return np.full(ids_QC.shape, np.inf, dtype=np.float32)
        squared_QC = form.squared_distances(queries, self.side(chosen_P[first:]), places_QC - first)
        return squared_QC.astype(np.float32)

    def side(self, positions: Int64) -> Side:
        """The items at these positions, as retrieval takes them."""
        return self._side_of(self._contents.embeddings[positions])

    def _side_of(self, rows: Float32) -> Side:
        return side_of(rows, self.geometry, self.name)

    def vectors(self, positions: Int64) -> Float32:
        """(P, V) of the items at these positions: what an l2 index of another program stores."""
        return self.form.items(self.side(positions))

    def queries(self, pictures: Picture | list[Picture]) -> Float32:
        """(Q, V) of pictures: what such an index is asked for. Its squared distance less
        `form.offset` is the mode's, or, in the modes adaptive and symmetric, in its order. Raises
        as `search`."""
        z_QD, s_QS = self.model.embed(as_list(pictures), structure=True)
        queries = self.geometry.side(z_QD, self.geometry.kept(s_QS), name="queries")
        return self.form.queries(queries)

    def embeddings(self) -> tuple[Float32, Float32]:
        """z (N, D) and what is kept of s (N, E), float32."""
        rows, D = self._contents.embeddings, self.geometry.width
        return np.asarray(rows[:, :D]), np.asarray(rows[:, D : D + self.geometry.kept_width])

    def _hits(self, squared_K: Float32, ids_K: Int64) -> list[Hit]:
        return [
            Hit(
                id=self.items.ids[position],
                path=self.items.path(position),
                label=self.items.labels[position],
                distance=max(0.0, squared + self.form.offset) ** 0.5,
            )
            for squared, position in zip(squared_K.tolist(), ids_K.tolist(), strict=True)
            if position >= 0
        ]

    def picture(self, id: str) -> Image.Image:
        """The picture of an item, RGB, upright. Raises InputError if there is no such item, or its
        picture is no more where it was."""
        position = int(self.items.positions([id])[0])
        return picture_of(self.items, position)

    def show(self, picture: Picture, k: int = 6) -> Image.Image:
        """A contact sheet: the picture, and its k nearest items with labels and distances. A
        notebook displays it."""
        return contact_sheet(picture, self.search(picture, k), self.picture)

    def page(self, pictures: Sequence[Picture], found: Sequence[Sequence[Hit]]) -> str:
        """The same for several pictures and what was found, as one HTML file that needs nothing
        else."""
        about = f"{len(self):,} items, mode {self.mode}"
        return search_page(self.name, about, pictures, found, self.picture)

    def add(self, made: Embeddings, items: Items) -> None:
        """Items behind those that are there; `items` has one for each picture that was embedded,
        damaged ones included. Raises InputError for ids that are there already, and for items
        unlike all that the index was built with."""
        if not len(made.kept_N):
            raise InputError("there is no picture to add; give one at least")
        joined = self.items.joined(items.at(made.kept_N))
        rows = _rows(self.geometry, made)
        if self.form.mode is CALIBRATED:
            rows = np.concatenate([rows, self._density_of(rows)[:, None]], axis=1, dtype=np.float32)
        self.engine.add(self.form.items(self._side_of(rows)))
        embeddings = np.concatenate([self._contents.embeddings, rows])
        self._replace(items=joined, embeddings=embeddings)

    def _density_of(self, rows: Float32) -> Float64:
        """Of new items among all: those that are there keep theirs."""
        D, E = self.geometry.width, self.geometry.kept_width
        old = self._contents.embeddings[:, : D + E]
        every = self._side_of(np.concatenate([old, rows])).z
        new_M = np.arange(len(old), len(every))
        count = min(DENSITY_NEIGHBOURS, len(every) - 1)
        if count < 1:
            return np.zeros(len(rows))
        squared_MK, _ = search_excluding_self(every[new_M], every, count, query_ids_Q=new_M)
        return mean_of_nearest(squared_MK)

    def remove(self, ids: Iterable[str]) -> None:
        """Items by their ids. Raises InputError if one is not there."""
        gone = self.items.positions(list(ids))
        kept_N = np.setdiff1d(np.arange(len(self)), gone)
        embeddings = np.asarray(self._contents.embeddings[kept_N])
        self._replace(items=self.items.at(kept_N), embeddings=embeddings)
        self.engine.refill(
            self.form.items(self._side_of(embeddings))
            if len(kept_N)
            else np.empty((0, self.form.width), dtype=np.float32)
        )

    def _replace(self, *, items: Items, embeddings: Float32) -> None:
        self._contents = replace(self._contents, items=items, embeddings=embeddings)
        self.__dict__.pop("_longest", None)

    def rebuilt(self, positions: Int64, type: str) -> Gallery:
        """Some of the items, in that order, in an index of a type, with the vectors that they have
        here. Raises InputError if the type does not serve so few."""
        embeddings = np.asarray(self._contents.embeddings[positions])
        shape = shape_of(type, self.form.width, len(positions))
        contents = folder.Contents(
            header=replace(self.header, shape=shape, settings=self.settings),
            engine=Engine.built(shape, self.form.items(self._side_of(embeddings))),
            items=self.items.at(positions),
            embeddings=embeddings,
        )
        return Gallery(contents, name=self.name, model=self._model)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it into a new folder, or over the index that is there; return the folder. Raises
        InputError if something else is there, and OSError; the index that was there then still
        stands."""
        where = Path(path)
        if folder.is_index(where):
            with folder.locked(where):
                self.write(where)
        else:
            self.write(where)
        self.name = where.absolute().name
        return where

    def write(self, path: Path) -> None:
        """As `save`, where the caller has locked the index that is there (gallery.folder)."""
        header = replace(self.header, settings=self.settings)
        folder.write(path, replace(self._contents, header=header))
        self._contents = replace(self._contents, read_from=folder.origin(path))

    def about(self) -> dict[str, Any]:
        """What `namr index info` shows."""
        header = self.header
        return {
            "items": len(self),
            "labels": len({label for label in self.items.labels if label is not None}),
            "mode": header.mode,
            "type": f"{self.type} ({header.shape.factory})",
            "width": header.shape.width,
            "distance": header.geometry.distance,
            "bytes_per_item": round(self.engine.bytes_per_item(), 1),
            "model": header.model,
            "model_digest": header.model_digest,
            "model_place": header.model_place,
            "gamma": header.geometry.gamma,
            "rho_max": header.geometry.rho_max,
            **asdict(header.settings),
            "sources": [source.text for source in self.items.sources],
            "first_ids": list(self.items.ids[:3]),
        }


def build(
    model: Embedder,
    made: Embeddings,
    items: Items,
    *,
    type: str = "flat",
    mode: str | None = None,
    settings: SearchSettings | None = None,
) -> Gallery:
    """A gallery of what was embedded. items: one for each picture given, damaged ones included.

    Raises InputError for types and modes that do not serve, and where nothing was embedded.
    """
    if not len(made.z_ND):
        raise InputError("there is no picture to index; give one at least")
    geometry = model.geometry
    if geometry.distance == "euclidean":
        _check_range(made.z_ND, model.name)
    chosen = geometry.served(mode)
    rows = _rows(geometry, made)
    if chosen is CALIBRATED:
        density_N = local_density(side_of(rows, geometry, model.name).z)
        rows = np.concatenate([rows, density_N[:, None]], axis=1, dtype=np.float32)

    def blocks() -> Iterator[Side]:
        for start in range(0, len(rows), _BLOCK):
            yield side_of(rows[start : start + _BLOCK], geometry, model.name)

    form = Form.fitted(chosen, blocks, delta=geometry.delta)
    shape = shape_of(type, form.width, len(rows))
    engine = Engine.trained(
        shape, lambda: form.items(side_of(rows[sample(len(rows))], geometry, model.name))
    )
    for side in blocks():
        engine.add(form.items(side))
    header = folder.Header(
        model=model.name,
        model_digest=model.digest,
        model_place=str(model.place),
        mode=chosen.name,
        geometry=geometry,
        shape=shape,
        limit=form.limit,
        centre=tuple(form.centre_D.tolist()),
        settings=settings or SearchSettings(),
    )
    contents = folder.Contents(
        header=header,
        engine=engine,
        items=items.at(made.kept_N),
        embeddings=rows,
    )
    return Gallery(contents, name=model.name, model=model)


def open_index(
    path: str | os.PathLike[str], *, model: Embedder | str | os.PathLike[str] | None = None
) -> Gallery:
    """An index that `namr index build` or `Gallery.save` wrote, every byte verified.

    model: a loaded model, or where it is now; None: where it was, looked at once a picture is
    searched for. Raises InputError, by name, if something is missing or damaged, or the model is
    another than the one that embedded the items.
    """
    where = Path(path)
    contents = folder.read(where)
    if model is not None and not isinstance(model, Embedder):
        model = Embedder.load(model)
    if model is not None:
        contents.header.check_model(model.digest, str(model.place), f"index {where}")
    return Gallery(contents, name=where.absolute().name, model=model)


def _check_range(z_ND: Float32, name: str) -> None:
    """Raise InputError for embeddings whose squared distances fp32 does not hold."""
    largest = float(np.abs(z_ND).max())
    if largest and not _LEAST <= largest <= _MOST:
        raise InputError(
            f"the embeddings of {name} reach {largest:.1e}, beyond {_LEAST:.0e} to {_MOST:.0e}, within which "
            "an index computes in fp32; train with distance cosine, or at another scale"
        )


def side_of(rows: Float32, geometry: Geometry, name: str) -> Side:
    """Rows of an index's embeddings (N, D + E [+ 1]) as retrieval takes them."""
    D, E = geometry.width, geometry.kept_width
    density_N = rows[:, D + E].astype(np.float64) if rows.shape[1] > D + E else None
    return geometry.side(
        rows[:, :D], rows[:, D : D + E], density_N=density_N, name=f"embeddings of {name}"
    )


def _rows(geometry: Geometry, made: Embeddings) -> Float32:
    rows: Float32 = np.concatenate([made.z_ND, geometry.kept(made.s_NS)], axis=1, dtype=np.float32)
    return rows
