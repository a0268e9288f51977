"""A recipe's settings from the command line: `--set.section.field value…`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence

from namr_dist import named_code
from namr_dist.config import Config
from namr_dist.errors import InputError


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Words of `--set.section.field value…` apart from all others: an override's values end at the
    next option."""
    own: list[str] = []
    overrides: list[str] = []
    into = own
    for word in words:
        if word.startswith("--set."):
            into = overrides
        elif word.startswith("--"):
            into = own
        into.append(word)
    return own, overrides


def configure(recipe: str, overrides: Sequence[str], *, show_help: bool = False) -> Config:
    """The recipe with its overrides. Code that it names may be imported from now on: the command
    line names it.

    A wrong field or value ends the program with tyro's message and code 2, `show_help` with all
    settings and 0.
    """
    import tyro

    from namr_dist import recipes

    @dataclasses.dataclass(frozen=True)
    class Settings:
        set: Config

    base = recipes.find(recipe)
    words = ["--help"] if show_help else list(overrides)
    config = tyro.cli(
        Settings,
        args=words,
        default=Settings(set=base),
        prog=f"namr train {recipe}",
        config=(tyro.conf.FlagConversionOff,),
    ).set
    named_code.allow(config.code_names().values())  # the user typed them
    return config


def configure_quietly(recipe: str, overrides: list[str]) -> Config | InputError:
    """`configure`, but a mistake is returned in one line, for many nodes to tell once."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return configure(recipe, overrides)
    except InputError as error:
        return error
    except SystemExit:
        return InputError(re.sub(r"[\s─-╿]+", " ", said.getvalue()).strip())  # out of tyro's box
