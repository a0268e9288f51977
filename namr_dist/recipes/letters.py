"""letters, drawn from open fonts: a second small set, on which nothing of a recipe was chosen."""

from __future__ import annotations

import dataclasses

from namr_dist.config import Config
from namr_dist.recipes.homeware import homeware


def letters() -> Config:
    """The settings of homeware, every one, on another set."""
    settings = homeware()
    data = dataclasses.replace(settings.data, path="shards/letters")
    return dataclasses.replace(settings, recipe="letters", data=data)
