"""A source tree serves all of the package by itself, whatever is installed beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import copy_tree, launch

# Kernels are looked up and not imported: that they are is another test's, and takes seconds.
_SHOW = (
    "from importlib.util import find_spec; import namr_dist, namr_dist.launchers.train as train; "
    "print(namr_dist.__file__, find_spec('namr_dist.kernels').origin, train.__file__)"
)
_WITHOUT_EDITABLE = (
    "import sys; sys.meta_path = [one for one in sys.meta_path if 'editable' not in str(one)]; "
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A second checkout, which nothing has installed."""
    copy_tree(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "before", ["", _WITHOUT_EDITABLE], ids=["beside an editable install", "nothing installed"]
)
def test_one_tree(checkout: Path, before: str) -> None:
    done = launch(sys.executable, "-c", before + _SHOW, cwd=checkout)
    assert done.stdout.split() == [
        str(checkout / file)
        for file in ("namr_dist/__init__.py", "kernels/__init__.py", "launchers/train.py")
    ], done.stderr


def test_one_tree_for_ranks(checkout: Path) -> None:
    """`python -m` as launchers and Slurm steps call it, from the folder of the job."""
    (checkout / "kernels" / "__init__.py").write_text("raise SystemExit('this tree')")
    done = launch(
        sys.executable,
        "-m",
        "namr_dist.launchers.torchrun",
        "--standalone",
        "--nproc-per-node",
        1,
        "--module",
        "namr_dist.kernels",
        cwd=checkout,
    )
    assert done.returncode == 1
    assert "this tree" in done.stderr
