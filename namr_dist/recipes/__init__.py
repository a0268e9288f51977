"""One module a data set, one function a published run: each returns a whole Config.

`namr train NAME` calls the function NAME; `find` looks it up in the modules listed here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from namr_dist.config import Config
from namr_dist.errors import InputError
from namr_dist.recipes.cars import cars, cars_vit_small
from namr_dist.recipes.cub import cub, cub_vit_small
from namr_dist.recipes.folder import folder
from namr_dist.recipes.homeware import homeware, homeware_conv4
from namr_dist.recipes.inshop import inshop, inshop_vit_small
from namr_dist.recipes.letters import letters
from namr_dist.recipes.sop import sop, sop_vit_small
from namr_dist.recipes.vehicleid import vehicleid, vehicleid_vit_small

ALL: tuple[Callable[[], Config], ...] = (
    homeware,
    homeware_conv4,
    letters,
    sop,
    sop_vit_small,
    inshop,
    inshop_vit_small,
    cub,
    cub_vit_small,
    cars,
    cars_vit_small,
    vehicleid,
    vehicleid_vit_small,
    folder,
)


def find(name: str) -> Config:
    """The configuration of the recipe NAME. Raises InputError for an unknown one, naming the
    nearest."""
    by_name = {recipe.__name__: recipe for recipe in ALL}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown recipe {name!r}; {hint}known are {', '.join(sorted(by_name))}")
    return by_name[name]()
