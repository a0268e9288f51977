"""A hostfile (lines of `HOST slots=N`, # for comments) → the command that starts each machine's
ranks.

    python -m namr_dist.launchers.hostfile --ranks hosts
    python -m namr_dist.launchers.hostfile --port 29500 hosts homeware --run-dir runs/many

Prints one command a machine, by ssh, in the order of the file; with --node K that of machine K
alone, without ssh.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from namr_dist.errors import InputError
from namr_dist.text import say

_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,6})")
# What ranks on other machines need of this shell's environment.
_PASSED_ON = ("NCCL_", "GLOO_", "OMP_", "PYTHONPATH")


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots of each host, in the order of the file. Raises InputError, with the line, if it is no
    hostfile."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"hostfile {path} cannot be read ({getattr(error, 'strerror', None) or 'not text'}); give a "
            "file with a line HOST slots=N for each machine"
        ) from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        match = _LINE.fullmatch(entry)
        unusable = not entry.replace("\t", " ").isprintable() or entry.startswith("-")
        if not match or unusable or int(match[2]) < 1:
            raise InputError(
                f"line {number} of hostfile {path} is {entry!r}; write HOST slots=N, with N at least 1"
            )
        if match[1] in hosts:
            raise InputError(
                f"line {number} of hostfile {path} names {match[1]} again; keep one line for it, with "
                "all its slots"
            )
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise InputError(
            f"hostfile {path} names no host; write a line HOST slots=N for each machine"
        )
    return hosts


def node_command(hosts: dict[str, int], node: int, *, port: int, words: Sequence[str]) -> list[str]:
    """What machine number `node` runs: torchrun with its ranks. The first host is where all ranks
    meet."""
    return [
        sys.executable,
        "-m",
        "namr_dist.launchers.torchrun",
        "--nnodes",
        str(len(hosts)),
        "--node-rank",
        str(node),
        "--master-addr",
        next(iter(hosts)),
        "--master-port",
        str(port),
        "--nproc-per-node",
        str(list(hosts.values())[node]),
        "--module",
        "namr_dist.launchers.train",
        *words,
    ]


def ssh_command(host: str, command: Sequence[str]) -> list[str]:
    """The same by ssh, in this folder and with this Python, which must be at the same place on
    every machine."""
    passed_on = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(_PASSED_ON)
    ]
    # A terminal of its own: the ranks end when the connection does. One that draws nothing, if this
    # one cannot either.
    passed_on += [] if sys.stderr.isatty() else ["TERM=dumb"]
    there = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *passed_on, *command])}"
    return ["ssh", "-tt", "-o", "BatchMode=yes", host, there]


def _lines(arguments: argparse.Namespace) -> list[str]:
    hosts = read_hostfile(arguments.hostfile)
    if arguments.ranks:
        return [str(sum(hosts.values()))]
    if not 1 <= arguments.port <= 65535:
        raise InputError(
            f"the port is {arguments.port}; set NAMR_MASTER_PORT to a free port of the first machine"
        )
    commands = [
        node_command(hosts, node, port=arguments.port, words=arguments.words)
        for node in range(len(hosts))
    ]
    if arguments.node is None:
        return [
            shlex.join(ssh_command(host, command))
            for host, command in zip(hosts, commands, strict=True)
        ]
    if not 0 <= arguments.node < len(hosts):
        raise InputError(
            f"the node is {arguments.node}, but hostfile {arguments.hostfile} has {len(hosts)} hosts, "
            "counted from 0; give this machine's place in it"
        )
    return [shlex.join(commands[arguments.node])]


def main() -> int:
    """Print what the command line asks for; returns the exit code, 2 for what cannot be used."""
    parser = argparse.ArgumentParser(
        prog="hostfile",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("hostfile", type=Path, metavar="HOSTFILE")
    parser.add_argument(
        "--ranks", action="store_true", help="print how many ranks the machines hold together"
    )
    parser.add_argument(
        "--port", type=int, default=29500, help="port of the first machine (%(default)s)"
    )
    parser.add_argument(
        "--node", type=int, metavar="K", help="place of this machine in the file, from 0"
    )
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="RECIPE …", help="words of `namr train`"
    )
    try:
        print("\n".join(_lines(parser.parse_args())))
    except InputError as error:
        say(f"namr: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
