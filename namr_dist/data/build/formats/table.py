"""The table of a user's own images: a CSV file with a line for each."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from namr_dist.data.build.formats.lists import ENDINGS, relative_path
from namr_dist.errors import InputError

_NEEDED = ("path", "label", "split")
_ROLES = ("is_query", "is_gallery")
_COLUMNS = (*_NEEDED, *_ROLES, "category", "group")
_SPLITS = ("train", "val", "test")
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One image as a user states it."""

    path: PurePosixPath
    """Relative to the folder of the set."""
    label: str
    """Name of its class."""
    split: str
    where: str
    """Place to name in errors."""
    role: str = ""
    category: str = ""
    group: str = ""


def read_table(path: Path) -> list[Entry]:
    """All lines of the table. Raises InputError, with the number of the line, for whatever is not
    as stated there."""
    entries = []
    line_of: dict[PurePosixPath, str] = {}
    for where, row in _rows(path):
        relative = relative_path(row["path"], where)
        if relative.suffix.lower() not in ENDINGS:
            raise InputError(
                f"{where}: {row['path']!r} is no image; its ending should be one of {', '.join(ENDINGS)}"
            )
        if line_of.setdefault(relative, where) != where:
            raise InputError(
                f"{where} lists {row['path']!r} a second time, after {line_of[relative]}; remove one"
            )
        if not row["label"]:
            raise InputError(
                f"{where} has no label; give each image the name or number of its class"
            )
        if row["split"] not in _SPLITS:
            raise InputError(
                f"{where}: split is {row['split']!r}; set it to {', '.join(_SPLITS[:-1])} or "
                f"{_SPLITS[-1]}"
            )
        entries.append(
            Entry(
                path=relative,
                label=row["label"],
                split=row["split"],
                where=where,
                role=_role(row, where),
                category=row.get("category", ""),
                group=row.get("group", ""),
            )
        )
    if not entries:
        raise InputError(f"{path} lists no image; add a line for each")
    return entries


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and columns of each line that is not blank."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header)
            for words in reader:
                where = f"{path}, line {reader.line_num}"
                if words and len(words) != len(header):
                    raise InputError(
                        f"{where} has {len(words)} columns, the header {len(header)}; put a text that "
                        "holds a comma into double quotes"
                    )
                if words:
                    yield (
                        where,
                        {
                            name: word if name == "path" else word.strip()
                            for name, word in zip(header, words, strict=True)
                        },
                    )
    except FileNotFoundError:
        raise InputError(
            f"there is no file {path}; give a folder of class folders or a .csv file"
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path} cannot be read as a table ({error}); store it as CSV in UTF-8"
        ) from None


def _check_header(path: Path, header: list[str]) -> None:
    for name in header:
        if name not in _COLUMNS or header.count(name) > 1:
            raise InputError(
                f"{path} has the column {name!r}, which is unknown or there twice; the columns are "
                f"{', '.join(_COLUMNS)}"
            )
    for name in (*_NEEDED, *(_ROLES if set(_ROLES) & set(header) else ())):
        if name not in header:
            raise InputError(
                f"{path} has no column {name!r}; its first line should name the columns "
                f"{', '.join(_NEEDED)}, and is_query and is_gallery both or not at all"
            )


def _role(row: dict[str, str], where: str) -> str:
    if "is_query" not in row or (
        row["split"] == "train" and not (row["is_query"] or row["is_gallery"])
    ):
        return ""
    for name in _ROLES:
        if row[name].lower() not in _FLAGS:
            raise InputError(f"{where}: {name} is {row[name]!r}; set it to true or false")
    query, gallery = (_FLAGS[row[name].lower()] for name in _ROLES)
    if row["split"] == "train" or query and gallery:
        return ""
    if not (query or gallery):
        raise InputError(
            f"{where}: the image is neither query nor gallery; set is_query or is_gallery to true, or "
            "remove the line"
        )
    return "query" if query else "gallery"
