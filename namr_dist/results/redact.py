"""A run's configuration as it may be given away: without the owner's folders and credentials."""

from __future__ import annotations

import copy
from pathlib import PurePath
from typing import Any

from namr_dist.data.remote.address import shown

_LOCATIONS = (
    ("data", "path"),
    ("data", "remote", "cache"),
    ("data", "class_list"),
    ("model", "weights"),
    ("train", "profile"),
)


def shareable(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of the content of config.json with the last part alone of each path and URL.

    A URL's query, its user and password, and a command's arguments are left out. Fields that are
    missing stay so.
    """
    shared = copy.deepcopy(config)
    for *sections, field in _LOCATIONS:
        values: Any = shared
        for section in sections:
            values = values.get(section) if isinstance(values, dict) else None
        if isinstance(values, dict) and isinstance(values.get(field), str):
            values[field] = PurePath(shown(values[field])).name
    return shared
