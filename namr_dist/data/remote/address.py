"""What a set's location names: a folder, or a URL of a scheme that is listed here; and what of it
may be shown and kept.

A location may come from a file that somebody else made. So schemes are a list, and a chain of them
(`::`) is none: fsspec knows schemes that read instructions out of the address itself.
"""

from __future__ import annotations

import re
from dataclasses import replace

from namr_dist.config import Config
from namr_dist.errors import InputError

STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"})
"""Schemes that fsspec is asked to open: object stores, each read by a package of its own."""
_WEB = ("http", "https")
_OMITTED = "…"


def is_url(location: str) -> bool:
    """Whether a location is a URL and not a folder's path."""
    return is_command(location) or _scheme(location) is not None


def is_command(location: str) -> bool:
    """Whether reading from a location runs a command of a shell."""
    return location.startswith("pipe:")


def is_http(location: str) -> bool:
    """Whether a web server is asked."""
    return (_scheme(location) or "").lower() in _WEB


def check_scheme(url: str) -> None:
    """Raise InputError for a URL of a scheme that is not listed, a chain of several, and one whose
    credentials were left out where it was written down."""
    scheme = _scheme(url) or ""
    if not is_http(url) and (scheme not in STORES or "::" in url):
        raise InputError(
            f"{scheme[:40]}://… cannot be read: nothing here reads such URLs; give one of http, https, "
            "s3, gs, az, abfs, hf or pipe:COMMAND, without ::"
        )
    if f"://{_OMITTED}" in url or url.endswith(f"?{_OMITTED}"):
        raise InputError(
            f"{url} lacks its credentials, which were left out where it was written down; give the "
            "whole address"
        )


def shown(location: str) -> str:
    """A location or message for the user's eyes: of a command the program alone, of URLs neither
    user nor query."""
    if is_command(location):
        # A word such as TOKEN=… sets a variable, and where it ends is the shell's to say.
        program = re.match(r"pipe:\s*([\w./+-]*)(?!\S)", location)
        return f"pipe:{program[1]} {_OMITTED}" if program and program[1] else f"pipe:{_OMITTED}"
    # A password may hold any character, so that an @ behind a ? leaves open which of them begins
    # the query.
    without_both = re.sub(r"(\w://)[^\s?#]*[?#]\S*@\S*", rf"\1{_OMITTED}", location)
    without_user = re.sub(r"://\S*@", f"://{_OMITTED}@", without_both)
    return re.sub(r"(\w://[^\s?#]*)[?#]\S*", rf"\1?{_OMITTED}", without_user)


def has_credentials(config: Config) -> bool:
    """Whether a configuration may hold credentials: a URL with a user or a query, or a command."""
    return without_credentials(config) != config


def without_credentials(config: Config) -> Config:
    """The same configuration with its set's location as it may be shown. All else stays."""
    path = config.data.path
    if path is None or not is_url(path):
        return config
    return replace(config, data=replace(config.data, path=shown(path)))


def _scheme(location: str) -> str | None:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", location)
    return match[1] if match else None
