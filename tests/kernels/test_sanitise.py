"""tests/kernels/sanitise.py: it runs every op, and NVIDIA's compute-sanitizer finds nothing to say
of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from op_cases import COMPILED, KERNEL_MARKS, OPS

pytestmark = KERNEL_MARKS
PROGRAM = Path(__file__).with_name("sanitise.py")
FOLDERS = [Path("/usr/local/cuda/bin"), *sorted(Path("/opt/nvidia").glob("**/compute-sanitizer"))]
SANITIZER = shutil.which(
    "compute-sanitizer",
    path=os.pathsep.join([os.environ.get("PATH", ""), *(str(folder) for folder in FOLDERS)]),
)


@pytest.mark.whole
def test_every_op_is_run() -> None:
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == (2 if COMPILED else 1) * list(OPS)


@pytest.mark.gpu
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("tool", "verdict"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors"),
    ],
)
def test_the_sanitizer_finds_no_error(tool: str, verdict: str) -> None:
    done = subprocess.run(
        [str(SANITIZER), "--report-api-errors", "no", "--tool", tool, sys.executable, PROGRAM],
        capture_output=True,
        text=True,
        check=False,
    )
    # A virtual machine that shows it no debugger.
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer cannot watch this GPU")
    assert verdict in done.stdout + done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("loss") == 2 * len(OPS)
