"""The verb `namr serve`."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import fields
from functools import partial
from pathlib import Path

from namr_dist import named_code
from namr_dist.bounds import check_bounds
from namr_dist.cli.pictures import add_model
from namr_dist.errors import InputError
from namr_dist.serve.limits import Limits

_PACKAGES = ("fastapi", "uvicorn")


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve` to the `namr` command."""
    serve = verbs.add_parser(
        "serve",
        help="search an index over HTTP, with a page for it",
        description="Serve an index: POST /search takes a picture and answers with its nearest "
        "neighbours as JSON, and / is a page to drop a picture on. It runs until Ctrl-C or SIGTERM, "
        "and then answers what it has accepted.",
    )
    serve.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    add_model(serve)
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (%(default)s, this machine alone; 0.0.0.0 is all addresses, and "
        "there is no password)",
    )
    serve.add_argument(
        "--port", type=int, default=8000, help="port (%(default)s); 0 is any free one"
    )
    serve.add_argument(
        "--body-mib",
        type=int,
        default=Limits.body_mib,
        metavar="N",
        help="largest file of a picture, in MiB (%(default)s)",
    )
    serve.add_argument(
        "--waiting",
        type=int,
        default=Limits.waiting,
        metavar="N",
        help="most searches at a time; others are asked to try again (%(default)s)",
    )
    serve.add_argument(
        "--body-seconds",
        type=float,
        default=Limits.body_seconds,
        metavar="S",
        help="time in which a picture has to be sent (%(default)g)",
    )
    serve.set_defaults(verb=_serve)


def _serve(parsed: argparse.Namespace, _: list[str]) -> None:
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"namr serve needs {' and '.join(missing)}, not installed here; install the extra with "
            "`pip install 'namr-dist[serve]'`"
        )
    if not 0 <= parsed.port < 1 << 16:
        raise InputError(f"--port is {parsed.port}; give one from 1 to 65535, or 0 for any")
    limits = Limits(**{field.name: getattr(parsed, field.name) for field in fields(Limits)})
    check_bounds(limits)
    named_code.allow(parsed.allow_code)
    from namr_dist.gallery.gallery import open_index
    from namr_dist.serve.server import serve

    serve(
        partial(open_index, parsed.index, model=parsed.model),
        host=parsed.host,
        port=parsed.port,
        limits=limits,
    )
