"""A cell of the grid: one trained and evaluated network, as the files that its figures stand in.

A finished cell needs no checkpoint: its configuration, its figures and those of each class say all
that the table is made of, so it can be kept in a repository and counts as done wherever it lies.

Shapes: C test classes that have queries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from namr_dist import verified_json
from namr_dist.atomic import write_atomic
from namr_dist.config import Config
from namr_dist.errors import InputError
from namr_dist.results.class_figures import read_class_figures
from namr_dist.results.redact import shareable
from namr_dist.retrieval.arrays import Float64
from namr_dist.retrieval.modes import SAMPLE
from namr_dist.run.folder import RunFolder, runs_in
from namr_dist.run.log import read_log

CELL = "cell.json"
"""Names a network's loss, variant and seed, where its configuration does not."""
ALONE, RANKING = "alone", "ranking"
"""Variants of a network: trained by its metric loss alone, or with multi-cluster ranking. Any other
name is that of a simpler regulariser in place of the ranking."""
FIGURES = ("R@1", "MAP@R")
"""What is compared, in percent."""

_HOST = "slowest_host"
"""of a line of the log: the name of a machine"""


@dataclass(frozen=True, kw_only=True)
class CellName:
    """Which network a cell is."""

    loss: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.loss} {self.variant} seed {self.seed}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """A network's figures on the test split."""

    folder: Path
    name: CellName
    test: Mapping[str, Mapping[str, float]]
    """row of metrics.json → figure in FIGURES → percent, over all queries"""
    classes: Mapping[str, Mapping[str, Float64]]
    """the same as (C,) means over the queries of each class"""
    label_C: tuple[int, ...]
    queries_C: Float64
    """(C,) whole numbers"""
    protocol: Mapping[str, Any]


def is_complete(folder: Path) -> bool:
    """Whether a cell is finished: a checkpoint is not needed."""
    files = RunFolder(folder)
    return files.config.exists() and files.metrics.exists() and files.classes.exists()


def complete_cells(folder: Path) -> list[Path]:
    """The finished cells one level below a folder, by name."""
    return [cell for cell in runs_in(folder) if is_complete(cell)]


def name_of(folder: Path) -> CellName:
    """Of its cell.json; where there is none, of its configuration: λ = 0 is ALONE, else RANKING.

    Raises InputError if the file that should say so does not.
    """
    path = folder / CELL
    if not path.exists():
        config = Config.load(RunFolder(folder).config)
        variant = RANKING if config.loss.ranking.weight else ALONE
        return CellName(loss=config.loss.metric, variant=variant, seed=config.train.seed)
    told = _object(path)
    loss, called, seed = (told.get(field) for field in ("loss", "variant", "seed"))
    if not isinstance(loss, str) or not isinstance(called, str) or type(seed) is not int:
        raise InputError(
            f'{path} should hold {{"loss": TEXT, "variant": TEXT, "seed": INTEGER}}; write it so'
        )
    return CellName(loss=loss, variant=called, seed=seed)


def read_cell(folder: Path) -> Cell:
    """The figures of a finished cell.

    Raises InputError if a file is no JSON, lacks a figure in FIGURES, or if the figures of classes
    are not those of the same evaluation.
    """
    files = RunFolder(folder)
    metrics = _object(files.metrics)
    whole = metrics.get("test")
    by_class = read_class_figures(files.classes, whole if isinstance(whole, dict) else {})
    try:
        test = {
            row: {name: float(metrics["test"][row][name]) for name in FIGURES}
            for row in by_class.rows
        }
        classes = {
            row: {name: figures[name] for name in FIGURES} for row, figures in by_class.rows.items()
        }
        test[SAMPLE.name]  # which no evaluation leaves out
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{files.metrics} and {files.classes.name} lack {' or '.join(FIGURES)}, over all queries or of "
            f"each class ({type(error).__name__}: {error}); evaluate it again, with R@1"
        ) from None
    return Cell(
        folder=folder,
        name=name_of(folder),
        test=test,
        classes=classes,
        label_C=by_class.label_C,
        queries_C=by_class.queries_C,
        protocol=metrics.get("protocol") or {},
    )


def read_cells(folders: Sequence[Path]) -> list[Cell]:
    """Finished cells, each network once.

    Raises InputError as `read_cell`, and if two are the same network or were measured on different
    test images.
    """
    cells: list[Cell] = []
    for cell in map(read_cell, folders):
        for other in cells[:1]:
            if _test_set(cell) != _test_set(other):
                raise InputError(
                    f"{cell.folder} was measured on other test images than {other.folder}; make a table of "
                    "each set"
                )
        for other in cells:
            if cell.name == other.name:
                raise InputError(
                    f"{cell.folder} and {other.folder} are both {cell.name}; leave one out, and compare "
                    "weights of the ranking by `namr report`"
                )
        cells.append(cell)
    return cells


def _test_set(cell: Cell) -> tuple[Any, ...]:
    return cell.protocol.get("test hash"), cell.label_C, cell.queries_C.tolist()


def check_results(folder: Path, results: Path | None) -> None:
    """Raise InputError if finished cells of `folder` would be copied onto themselves."""
    if results and results.resolve() == folder.resolve():
        raise InputError(
            f"--results is {results}, which holds the runs themselves; give another folder"
        )


def copy_cell(cell: Path, results: Path) -> None:
    """Copy a finished cell into a folder of that name in `results`, as it may be given away:
    without checkpoints, embeddings, and this machine's folders, credentials and host names.

    Each file is whole or not there, and the figures come last: a copy that was cut short is not
    complete, and made again. Raises InputError for a file that is no JSON.
    """
    files, to = RunFolder(cell), RunFolder(results / cell.name)
    to.path.mkdir(parents=True, exist_ok=True)
    name = name_of(cell)
    write_atomic(to.path / CELL, _text(vars(name)))
    write_atomic(to.config, _text(shareable(_object(files.config))))
    if files.log.exists():
        lines = (
            json.dumps({field: value for field, value in entry.items() if field != _HOST})
            for entry in read_log(files.log).entries
        )
        write_atomic(to.log, "".join(f"{line}\n" for line in lines))
    write_atomic(to.classes, files.classes.read_bytes())
    write_atomic(to.metrics, files.metrics.read_bytes())


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _object(path: Path) -> dict[str, Any]:
    return verified_json.loads_object(
        path.read_bytes(), str(path), "copy it again, or evaluate the run again"
    )
