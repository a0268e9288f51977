"""What reads an original download: the converters of this package, and those of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from namr_dist import named_code
from namr_dist.data.build.formats import cars, cub, folder, inshop, letters, sop, vehicleid
from namr_dist.data.build.listing import Listing
from namr_dist.errors import InputError

CONVERTERS: dict[str, Callable[[Path], Listing]] = {
    "sop": sop.read,
    "inshop": inshop.read,
    "cub": cub.read,
    "cars": cars.read,
    "vehicleid": vehicleid.read,
    "letters": letters.read,
    "folder": folder.read,
}


def read_source(name: str, source: Path, *, highres: bool = False) -> Listing:
    """The listing of a download.

    name: of CONVERTERS, or module:NAME of a function that takes `source` and returns a `Listing`
    (named_code.allow it first). highres: of inshop, the larger images. Raises InputError for
    another name, for code that does not serve, for a listing that contradicts itself, and as the
    converter does.
    """
    if name == "inshop":
        return inshop.read(source, highres=highres)
    if name in CONVERTERS:
        return CONVERTERS[name](source)
    if not named_code.is_named_code(name):
        raise InputError(
            f"FORMAT is {name!r}; known are {', '.join(CONVERTERS)}, or module:NAME for a converter of "
            "your own"
        )
    converter: Any = named_code.load(name, use="FORMAT")
    if not callable(converter):
        raise InputError(
            f"FORMAT {name} is no function ({type(converter).__name__}); name one that takes the source's "
            "path and returns a Listing (namr_dist.data.build.listing)"
        )
    with named_code.own_code(name, use="FORMAT"):
        listing = converter(source)
    if not isinstance(listing, Listing):
        raise InputError(
            f"FORMAT {name} returned {type(listing).__name__}; let it return a Listing "
            "(namr_dist.data.build.listing)"
        )
    listing.check()  # the package's own converters have done so
    return listing
