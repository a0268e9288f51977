"""Code from outside the package that a command line names as `module:NAME`: a loss, a backbone, a
converter, a mode.

A run records such names, and whoever made the run chose them. So a name that was read from a file
is never enough: `load` imports what `allow` was given, and the commands give it what stands on
their own command line, no more.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from namr_dist.errors import InputError

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_allowed: set[str] = set()


def is_named_code(text: str) -> bool:
    """Whether the text has the form `module:NAME`, both of them dotted if need be.

    timm:NAME has not: it is a name in timm's own list of networks, which model.backbone takes.
    """
    return _NAME.fullmatch(text) is not None and not text.startswith("timm:")


def allow(names: Iterable[str]) -> None:
    """Let `load` import these from now on: names that the user typed, never ones that a file
    holds."""
    _allowed.update(names)


def check_allowed(names: Mapping[str, str], where: str) -> None:
    """Raise InputError, naming the file `where`, if one of the names (by what it is for) has not
    been allowed."""
    if refused := {use: name for use, name in names.items() if name not in _allowed}:
        told = ", ".join(f"{use} is {name}" for use, name in refused.items())
        flags = " ".join(f"--allow-code {name}" for name in dict.fromkeys(refused.values()))
        raise InputError(
            f"{where} names code to be imported: {told}; if you trust whoever made it, add {flags}"
        )


def load(name: str, *, use: str) -> Any:
    """Import `module:NAME`; modules in the working folder are found too.

    use: what it is for, such as "loss.metric", for errors. Raises InputError for a name of another
    form, one that was not allowed, and one that cannot be imported.
    """
    if not is_named_code(name):
        raise InputError(
            f"{use} is {name!r}; to use code of your own, give it as module:NAME, such as losses:MyLoss"
        )
    check_allowed({use: name}, "this run")
    module_name, _, path = name.partition(":")
    try:
        with _working_folder():
            target: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # another's module may raise anything
        raise InputError(
            f"{use} is {name}, but {module_name} cannot be imported ({type(error).__name__}: {error}); "
            "install it, or start where its file lies"
        ) from error
    for part in path.split("."):
        try:
            target = getattr(target, part)
        except AttributeError:
            near = difflib.get_close_matches(part, dir(target), n=1)
            raise InputError(
                f"{use} is {name}, but {module_name} has no {path}"
                + (f"; did you mean {near[0]}?" if near else "")
            ) from None
    return target


@contextmanager
def own_code(name: str, *, use: str) -> Iterator[None]:
    """Around a call of code that was loaded: if it asks the program to end, which a caller might
    take for success, InputError is raised in its place."""
    try:
        yield
    except SystemExit as error:
        raise InputError(
            f"{use} {name} asks the program to end (sys.exit); let it raise an error instead"
        ) from error


@contextmanager
def _working_folder() -> Iterator[None]:
    """Last on the path, so that nothing in it takes the place of an installed module, and not for
    longer than need be: a library that looks for an optional module later must not find a file of
    that name there. Where it is on the path already, it stays where it is."""
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        # The module may have changed the path as well.
        if added and here in sys.path:
            sys.path.remove(here)
