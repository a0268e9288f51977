"""What the readers of original downloads share: where a list lies, its lines and columns, the name
of an image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from namr_dist.errors import InputError

ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp")
"""Of image files, in any case."""
OTHER_ENDINGS = (".heic", ".heif", ".gif", ".tif", ".tiff", ".avif", ".jp2")
"""Of image files that no build reads."""


@dataclass(frozen=True)
class Line:
    """One line of a list that is not blank, without spaces around it."""

    path: Path
    number: int
    """Counted from 1, blank lines included."""
    text: str

    @property
    def where(self) -> str:
        """File and line number, with which an error begins."""
        return f"{self.path}, line {self.number}"

    def columns(self, names: str, *, path_first: bool = False) -> list[str]:
        """The columns of these names, which any number of spaces divides. Raises InputError if
        there are fewer.

        A path may hold spaces, as the last column or, with `path_first`, as the first.
        """
        divisions = len(names.split()) - 1
        words = (
            self.text.rsplit(None, divisions) if path_first else self.text.split(None, divisions)
        )
        if len(words) <= divisions:
            raise InputError(
                f"{self.where} has {len(words)} columns, not {names!r}; unpack the download again"
            )
        return words

    def integer(self, name: str, word: str) -> int:
        """The number in the column `name`. Raises InputError if it is none."""
        if not (word.isascii() and word.isdigit()):
            raise InputError(
                f"{self.where}: {name} is {word!r}, not a whole number; unpack the download again"
            )
        return int(word)


def find_root(source: Path, *names: str) -> Path | None:
    """The folder that holds one of these names (paths): `source`, or else one in it, for archives
    unpack into one.

    None if there is none. Raises InputError if `source` is no folder, or if two folders in it hold
    one.
    """
    if not source.is_dir():
        raise InputError(
            f"{source} is no folder; unpack the download and give the folder that it makes"
        )
    for folders in ([source], sorted(entry for entry in source.iterdir() if entry.is_dir())):
        roots = [folder for folder in folders if any((folder / name).exists() for name in names)]
        if len(roots) > 1:
            raise InputError(
                f"both {roots[0]} and {roots[1]} hold {' or '.join(names)}; give one of them"
            )
        if roots:
            return roots[0]
    return None


def find_list(source: Path, *names: str) -> Path:
    """The first of these names (paths) in their `find_root`. Raises InputError as that does, and if
    there is none."""
    root = find_root(source, *names)
    if root is None:
        raise InputError(
            f"no {' or '.join(names)} in {source} or in a folder in it; give the folder that the download "
            "unpacks into"
        )
    return next(root / name for name in names if (root / name).exists())


def read_lines(path: Path) -> list[Line]:
    """All lines that are not blank; any line ends, with or without a byte order mark.

    Raises InputError if the file is missing, is no UTF-8 text, or has no such line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} is missing; unpack the download again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as a list ({error}); unpack the download again"
        ) from None
    # Not splitlines(): it also divides at characters that a file name may hold.
    lines = [
        Line(path, number, line.strip())
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise InputError(f"{path} is empty; unpack the download again")
    return lines


def read_labels(path: Path, header: str) -> dict[int, int]:
    """A list of two columns of numbers, named by `header`: image → class, in its order. It has no
    line with the names.

    Raises InputError as `read_lines` does, for a word that is no number, and for an image that is
    listed twice.
    """
    image_name, class_name = header.split()
    label_of: dict[int, int] = {}
    for line in read_lines(path):
        image_id, class_id = line.columns(header)
        image = line.integer(image_name, image_id)
        if image in label_of:
            raise InputError(
                f"{line.where} lists image {image_id} a second time; unpack the download again"
            )
        label_of[image] = line.integer(class_name, class_id)
    return label_of


def after_header(path: Path, lines: list[Line], header: str) -> list[Line]:
    """The lines behind the header, which is the first. Raises InputError if it is another, or if
    nothing follows."""
    if not lines or lines[0].text.split() != header.split():
        where, text = (lines[0].where, lines[0].text) if lines else (str(path), "")
        raise InputError(f"{where} is {text!r}, not the header {header!r}; give the original list")
    if len(lines) == 1:
        raise InputError(f"{path} lists no image; unpack the download again")
    return lines[1:]


def relative_path(word: str, where: str) -> PurePosixPath:
    """The path in a list. Raises InputError, naming `where`, if it is absolute or leads out of its
    folder."""
    path = PurePosixPath(word)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise InputError(
            f"{where}: {word!r} is no path inside the folder of the images; give a relative one"
        )
    return path


def image_key(path: PurePosixPath) -> str:
    """Name of an image in the shards: its path without the ending, and without dots and slashes.

    >>> image_key(PurePosixPath("001.Albatross/Albatross_0001.jpg"))
    '001_Albatross__Albatross_0001'
    """
    return str(path.with_suffix("")).replace("/", "__").replace(".", "_")


def unique_keys(paths: Iterable[PurePosixPath]) -> dict[PurePosixPath, str]:
    """The `image_key` of each path, where later ones in sorted order get "-2", "-3", … if it is
    taken."""
    keys: dict[PurePosixPath, str] = {}
    taken: set[str] = set()
    for path in sorted(paths):
        key = plain = image_key(path)
        number = 1
        while key in taken:
            number += 1
            key = f"{plain}-{number}"
        taken.add(key)
        keys[path] = key
    return keys
