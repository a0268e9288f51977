"""The tutorial's notebook and the README's lines of Python run as they are printed."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY, launch
from nbclient import NotebookClient

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nbformat.NotebookNode]:
    """The folder that the notebook was run in, and the notebook with what it printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    notebook = nbformat.read(REPOSITORY / "docs/tutorial.ipynb", 4)
    with pytest.MonkeyPatch.context() as patch:
        # `namr`, and the environment that tests give to commands.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("OMP_NUM_THREADS", "1")
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=540, kernel_name="python3", resources=resources).execute()
    return folder, notebook


def _said(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )


def test_the_notebook_runs_from_pictures_to_search(
    worked: tuple[Path, nbformat.NotebookNode],
) -> None:
    folder, notebook = worked
    said = _said(notebook)
    assert "340 pictures, 20 new ones" in said and "(20, 128) float32" in said
    # By chance it would be one of 20.
    found = re.search(r"of 20 new pictures, (\d+) have their own product first", said)
    assert found and int(found[1]) > 10, said
    shown = [
        output.data
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(shown) == 1
    assert (folder / "photos.index" / "index.faiss").exists()


def test_what_the_notebook_shows_names_no_place() -> None:
    committed = (REPOSITORY / "docs/tutorial.ipynb").read_text()
    assert "340 pictures, 20 new ones" in committed
    assert "/tmp/" not in committed and str(REPOSITORY) not in committed


def test_the_lines_of_the_readme_run(
    worked: tuple[Path, nbformat.NotebookNode], tmp_path: Path
) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    lines = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    assert 'namr_dist.load("runs/demo")' in lines
    for name, source in (("runs/demo", "runs/mine"), ("photos", "photos")):
        shutil.copytree(worked[0] / source, tmp_path / name)
    new = next((worked[0] / "new").rglob("*.jpg"))
    shutil.copy(new, tmp_path / "new.jpg")
    done = launch(sys.executable, "-c", lines, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    hits = done.stdout.splitlines()
    assert len(hits) == 6 and all("photos/" in hit for hit in hits)
