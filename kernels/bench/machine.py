"""Where a figure was made."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
from pathlib import Path

import torch


def describe(device: torch.device) -> dict[str, str]:
    """The columns that are the same in every row of a run."""
    return {
        "device": device_name(device),
        "platform": _platform(device),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": _commit(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    table = Path("/proc/cpuinfo")
    models = (
        re.findall(r"^model name\s*:\s*(.+)$", table.read_text(), re.M) if table.is_file() else []
    )
    return models[0].strip() if models else platform.machine()


def _platform(device: torch.device) -> str:
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{threads} thread{'s' if threads > 1 else ''}"
    table = Path("/proc/driver/nvidia/version")
    version = re.search(r"\b\d+\.\d+(\.\d+)?\b", table.read_text()) if table.is_file() else None
    return f"driver {version.group() if version else 'unknown'}, CUDA {torch.version.cuda}"


def _triton_version() -> str:
    return importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"


def _commit() -> str:
    """The source tree's commit; outside of one, the package's version."""
    folder = str(Path(__file__).parent)
    try:
        # No optional locks: a benchmark must not get in the way of whoever works in the tree.
        process = subprocess.run(
            [
                "git",
                "--no-optional-locks",
                "-C",
                folder,
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
        return _package_version()
    return process.stdout.strip() if process.returncode == 0 else _package_version()


def _package_version() -> str:
    try:
        return importlib.metadata.version("namr-dist")
    except importlib.metadata.PackageNotFoundError:  # found by PYTHONPATH
        return "unknown"
