"""Where a figure was made: machine, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

from namr_dist import __version__


def provenance() -> dict[str, str]:
    """The machine, the versions and the commit of the source tree this process runs from."""
    return {
        "machine": _machine(),
        "commit": _commit(),
        "versions": f"namr-dist {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.is_file()
        else []
    )
    return f"{models[0]}, {len(models)} cores" if models else platform.machine()


def _commit() -> str:
    try:
        described = subprocess.run(
            [
                "git",
                "-C",
                str(Path(__file__).parent),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=12",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git here
        return "unknown"
    return described.stdout.strip() if described.returncode == 0 else "not a source checkout"
