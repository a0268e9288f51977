"""Slurm's short form of host names, such as node[1-2,7],login, written out."""

from __future__ import annotations

import itertools
import re

from namr_dist.errors import InputError

_HOST = r"(?:[^,\[\]\s]|\[[^\[\]]+\])+"
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand_hosts(text: str) -> tuple[str, ...]:
    """node[08-10,12],login → node08, node09, node10, node12, login. A name may have several
    brackets.

    Raises InputError for what is no list of hosts.
    """
    if not re.fullmatch(f"{_HOST}(?:,{_HOST})*", text):
        raise InputError(f"{text!r} is no list of hosts; expected a form such as node[1-2,7],login")
    hosts: list[str] = []
    for pattern in re.findall(_HOST, text):
        # Text outside and inside brackets by turns.
        pieces = re.split(r"\[([^\[\]]+)\]", pattern)
        choices = [
            _numbers(piece, text) if position % 2 else [piece]
            for position, piece in enumerate(pieces)
        ]
        hosts += ("".join(choice) for choice in itertools.product(*choices))
    return tuple(hosts)


def _numbers(ranges: str, text: str) -> list[str]:
    """1-3,7 → 1, 2, 3, 7; leading zeros stay."""
    numbers: list[str] = []
    for entry in ranges.split(","):
        match = _RANGE.fullmatch(entry)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(first) > int(last):
            raise InputError(
                f"[{ranges}] in the list of hosts {text!r} is no list of numbers; expected a form such "
                "as [1-2,7]"
            )
        numbers += (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return numbers
