"""Write the locks in constraints/: all that `make setup` and the Dockerfile install, with hashes.

    make lock                                           # after a change of setup.py's requirements
    make lock LOCK_OPTIONS='--upgrade-package timm'     # --upgrade: everything
    make lock LOCK_OPTIONS='--wheel FILE'               # admits a build that another index has

uv resolves all extras together, for every Python of setup.py and every platform. A version that is
locked stays while it fits and is not to be upgraded. Hashes are those that uv's index states for
all files of a version, those of the wheels given here (PyTorch's own CPU index has torch in other
files), and, while the version stays, those that were locked before.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from namr_dist.atomic import write_atomic

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "constraints"

BUILD = ("setuptools>=77", "wheel")
"""What builds this package and the sources of others."""

CUDA = re.compile(r"(nvidia|cuda)-")
"""Names of the libraries that torch's CUDA builds need."""

HEADER = "# Written by tools/lock.py (make lock). {}\n"
FILES = {
    "build.txt": "What builds source packages and this one; installed before the others.",
    "base.txt": "What namr-dist needs everywhere, but for CUDA's libraries.\n"
    "# Hashes are those of the Python Package Index for all files of a version, and for torch also\n"
    "# that of the CPU build for Python 3.11 on Linux (x86_64) from PyTorch's own index.",
    "cuda.txt": "CUDA's libraries, which torch from the default index needs on Linux.",
    "cpu.txt": "All for machines without a GPU, but for torch's CUDA libraries.\n-r base.txt",
    "gpu.txt": "All for machines with an NVIDIA GPU.\n-r base.txt\n-r cuda.txt",
    "dev.txt": "What the tests and `make lint` need in addition.",
}
"""Each file with what its head says and includes."""

_PIN = re.compile(r"([a-z0-9-]+)==([^\s;]+)")
_HASH = re.compile(r"--hash=(sha256:[0-9a-f]{64})")


def entries(text: str) -> dict[str, list[tuple[str, frozenset[str]]]]:
    """Of every package of a requirements file, its lines without hashes, and their hashes."""
    found: dict[str, list[tuple[str, frozenset[str]]]] = {}
    for block in re.split(r"\n(?=[a-z0-9])", "\n" + text):
        line = block.split("\n", 1)[0].removesuffix("\\").strip()
        if pin := _PIN.match(line):
            found.setdefault(pin[1], []).append((line, frozenset(_HASH.findall(block))))
    return found


def resolve(*options: str, requirements: Iterable[str] = (), setup: bool = True) -> str:
    """What uv prints for the extras and the requirements given. Exits with its code if it fails."""
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.10"]
    command += ["--no-header", "--no-annotate", *options, *(["setup.py"] if setup else []), "-"]
    done = subprocess.run(
        command, cwd=ROOT, input="\n".join(requirements), text=True, stdout=subprocess.PIPE
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def extras(*names: str) -> list[str]:
    """Their options for uv."""
    return [word for name in names for word in ("--extra", name)]


def wheel_hash(path: Path) -> tuple[tuple[str, str], str]:
    """Name and version that a wheel is locked as, and its hash."""
    name, version = path.name.split("-")[:2]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    # A local version (2.13.0+cpu) satisfies the public one.
    return (name.lower().replace("_", "-"), version.split("+")[0]), f"sha256:{digest}"


def main() -> None:
    """Read the locks, resolve, and write them."""
    parser = argparse.ArgumentParser(description="Write the locks in constraints/.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest of everything")
    parser.add_argument("--upgrade-package", action="append", default=[], metavar="NAME")
    parser.add_argument("--wheel", action="append", default=[], type=Path, metavar="FILE")
    given = parser.parse_args()

    locked = [line_hashes for file in FILES for line_hashes in read(file)]
    known: dict[tuple[str, str], set[str]] = {}
    for line, hashes in locked:
        known.setdefault(pinned(line), set()).update(hashes)
    for path in given.wheel:
        package, digest = wheel_hash(path)
        known.setdefault(package, set()).add(digest)

    with tempfile.TemporaryDirectory() as folder:
        # uv prefers the versions of the file that it would write, and takes its hashes as they are.
        old = Path(folder, "all.txt")
        old.write_text("".join(f"{line}\n" for line, _ in locked), encoding="utf-8")
        options = ["--generate-hashes", "--output-file", str(old)]
        options += ["--upgrade"] if given.upgrade else []
        for name in given.upgrade_package:
            options += ["--upgrade-package", name]
        whole = extras("cpu", "gpu", "test", "dev")
        resolve(*options, *whole, requirements=BUILD)
        everything = entries(old.read_text(encoding="utf-8"))

        def names(*options: str, requirements: Iterable[str] = (), setup: bool = True) -> set[str]:
            """Packages that a part of it all needs, at the versions just found."""
            options = ("--offline", "--constraint", str(old), *options)
            return entries(resolve(*options, requirements=requirements, setup=setup)).keys() & (
                everything.keys()
            )

        build = names(requirements=BUILD, setup=False)
        runtime = names()
        cuda = {name for name in runtime if CUDA.match(name)}
        parts = {
            "build.txt": build,
            "base.txt": runtime - cuda - build,
            "cuda.txt": cuda,
            "cpu.txt": names(*extras("cpu")) - runtime - build,
            "gpu.txt": names(*extras("gpu")) - runtime - build,
            "dev.txt": names(*extras("test", "dev")) - runtime - build,
        }
    for file, packages in parts.items():
        text = HEADER.format(FILES[file])
        for name in sorted(packages):
            for line, hashes in everything[name]:
                every = sorted(hashes | known.get(pinned(line), set()))
                text += " \\\n    ".join([line, *(f"--hash={digest}" for digest in every)]) + "\n"
        write_atomic(FOLDER / file, text)


def read(file: str) -> list[tuple[str, frozenset[str]]]:
    """Lines and hashes of a lock; none if there is no such file."""
    path = FOLDER / file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [entry for of_package in entries(text).values() for entry in of_package]


def pinned(line: str) -> tuple[str, str]:
    """Name and version of a line."""
    pin = _PIN.match(line)
    assert pin
    return pin[1], pin[2]


if __name__ == "__main__":
    main()
