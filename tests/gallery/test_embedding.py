"""Pictures embedded by many ranks, interrupted, and damaged: the same bits as by one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from galleries import make_pictures, make_run
from training_runs import Run, start_parent

from namr_dist.gallery import embedding

BATCH = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two chunks and a part of a third."""
    folder = tmp_path_factory.mktemp("pictures") / "photos"
    first = make_pictures(folder, 4)
    for number in range(4, 2 * 1024 + 37):  # copies, which cost less to make
        shutil.copy(first[number % 4], folder / f"copy {number}.jpg")
    return folder


@pytest.fixture(scope="module")
def expected(
    run: Path, photos: Path, forked_namr: Callable, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("expected") / "all.safetensors"
    done = forked_namr("embed", run, photos, "--out", out, "--batch-size", BATCH)
    assert done.returncode == 0, done.stderr
    return safetensors.numpy.load_file(out)


@pytest.mark.dist
def test_a_killed_build_goes_on_and_ranks_share_the_work(
    run: Path, photos: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    start_parent()
    out = tmp_path / "all.safetensors"
    work = tmp_path / ".all.safetensors.partial"
    words = [run, photos, "--out", out, "--batch-size", BATCH, "--workers", 0]
    killed = Run(1, words, tmp_path / "killed.txt", verb="embed")
    killed.until(lambda: (work / "chunk-000000.safetensors").exists())
    killed.kill()
    killed.wait()
    assert not out.exists() and len(list(work.glob("chunk-*"))) < 3
    again = Run(2, words, tmp_path / "again.txt", verb="embed")
    assert again.wait() == [0, 0], again.said()
    assert "pictures were embedded before; going on" in again.said()
    assert again.said().count("2085 images →") == 1
    made = safetensors.numpy.load_file(out)
    assert all(np.array_equal(made[name], expected[name]) for name in ("z", "s"))
    assert not work.exists()


def test_damaged_pictures_are_left_out_by_consent(
    run: Path, forked_namr: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    paths = make_pictures(folder, 40)
    out = tmp_path / "all.safetensors"
    embed = ("embed", run, folder, "--out", out, "--batch-size", BATCH)
    assert forked_namr(*embed).returncode == 0
    whole = safetensors.numpy.load_file(out)
    out.unlink()
    paths[5].write_bytes(b"")
    paths[20].write_bytes(paths[20].read_bytes()[:300])
    done = forked_namr(*embed)
    assert done.returncode == 2 and not out.exists()
    lines = done.stderr.splitlines()
    assert str(paths[5]) in lines[0] and str(paths[20]) in lines[1]
    assert "2 of 40 pictures cannot be read" in lines[2] and "--skip-damaged" in lines[2]
    done = forked_namr(*embed, "--skip-damaged")
    assert (done.returncode, done.stdout) == (0, f"38 images → {out}\n"), done.stderr
    assert "40 pictures were embedded before; going on" in done.stderr
    made = safetensors.numpy.load_file(out)
    kept = np.delete(np.arange(40), [5, 20])
    assert np.array_equal(made["z"], whole["z"][kept])
    # Other pictures under the same names, and another batch size, begin anew.
    shutil.copy(paths[0], paths[5])
    shutil.copy(paths[0], paths[20])
    done = forked_namr(*embed)
    assert (done.returncode, done.stdout) == (0, f"40 images → {out}\n"), done.stderr
    made = safetensors.numpy.load_file(out)["z"]
    assert np.array_equal(made[kept], whole["z"][kept])
    assert np.abs(made[5] - made[0]).max() < 1e-4


def test_what_was_begun_otherwise_is_begun_again(
    run: Path, forked_namr: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    paths = make_pictures(folder, 20)
    paths[3].write_bytes(b"")
    out = tmp_path / "all.safetensors"
    embed = ("embed", run, folder, "--out", out, "--batch-size")
    assert forked_namr(*embed, 16).returncode == 2
    work = tmp_path / ".all.safetensors.partial"
    chunk = work / f"chunk-{0:06d}.safetensors"
    assert chunk.exists() and embedding.DEFAULT_BATCH != 16
    done = forked_namr(*embed, 8, "--skip-damaged")
    assert "starting over" in done.stderr and done.stdout == f"19 images → {out}\n", done.stderr
    assert forked_namr(*embed, 16).returncode == 2
    chunk.write_bytes(chunk.read_bytes()[:-1])
    done = forked_namr(*embed, 16, "--skip-damaged")
    assert "going on" not in done.stderr and done.stdout == f"19 images → {out}\n", done.stderr
