"""A trained network's gallery: embedded, searched, changed, written and read again."""

from __future__ import annotations

import errno
import io
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
from conftest import launch, picture
from galleries import make_pictures, make_run
from PIL import Image

import namr_dist
from namr_dist.errors import InputError
from namr_dist.gallery.embedding import Embeddings
from namr_dist.gallery.engine import SearchSettings
from namr_dist.gallery.folder import read_about
from namr_dist.gallery.gallery import build


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def model(run: Path) -> namr_dist.Model:
    return namr_dist.load(run)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "photos"
    make_pictures(folder, 70)
    return folder


@pytest.fixture
def saved(model: namr_dist.Model, photos: Path, tmp_path: Path) -> Path:
    return model.index(photos).save(tmp_path / "photos.index")


def _brute_force(
    model: namr_dist.Model, queries: list[Path], items: list[Path]
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """(Q, N) squared distances of the structure mode by their definition."""
    centres = model.network.centres
    assert centres is not None
    z_QD = model.embed(queries).astype(np.float64)
    z_ND = model.embed(items).astype(np.float64)
    to_centres_NM = ((z_ND[:, None] - centres.centres_MD.numpy().astype(np.float64)) ** 2).sum(2)
    rho_N = np.sort(to_centres_NM, axis=1)[:, : centres.nearest].mean(axis=1)
    lessened_N = float(centres.gamma) * np.minimum(rho_N, float(centres.rho_max))
    squared_QN: np.ndarray = ((z_QD[:, None] - z_ND) ** 2).sum(2) - lessened_N
    return squared_QN


def test_the_package_itself_imports_nothing_large() -> None:
    done = launch(
        sys.executable,
        "-c",
        "import sys, namr_dist; print([name for name in ('torch', 'numpy', 'faiss') if name in sys.modules])",
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert {"load", "open_index"} <= set(dir(namr_dist))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = namr_dist.lode


def test_whatever_a_picture_comes_as_it_is_embedded_alike(
    model: namr_dist.Model, photos: Path
) -> None:
    path = next(photos.rglob("*.jpg"))
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    given = [
        path,
        str(path),
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
        image,
        np.array(image),
    ]
    z_ND, s_NS = model.embed(given, structure=True)
    assert z_ND.shape == (6, 16) and z_ND.dtype == s_NS.dtype == np.float32
    assert s_NS.shape == (6, model.structure_width)
    assert (z_ND == z_ND[0]).all() and (s_NS == s_NS[0]).all()
    given[3].seek(0)
    unit_ND = model.embed(given, normalize=True)
    assert np.allclose(unit_ND, z_ND / np.linalg.norm(z_ND, axis=1, keepdims=True), atol=1e-6)
    assert model.embed([]).shape == (0, 16)
    for nothing, told in (
        (photos / "none.jpg", "none.jpg cannot be read"),
        (b"no picture", "bytes 0"),
        (np.zeros((4, 4, 2), np.uint8), "array 0"),
    ):
        with pytest.raises(InputError, match=told):
            model.embed([nothing])
    with pytest.raises(InputError, match="batch_size is 0"):
        model.embed(given, batch_size=0)


@pytest.mark.parametrize("ending", ["safetensors", "parquet", "npy"])
def test_the_command_embeds_to_the_same_bits(
    model: namr_dist.Model,
    run: Path,
    photos: Path,
    forked_namr: Callable,
    tmp_path: Path,
    ending: str,
) -> None:
    out = tmp_path / f"photos.{ending}"
    done = forked_namr("embed", run, photos, "--out", out, "--batch-size", 16)
    assert (done.returncode, done.stdout) == (0, f"70 images → {out}\n"), done.stderr
    paths = sorted(photos.rglob("*.jpg"))
    names = [str(path.relative_to(photos)) for path in paths]
    z_ND, s_NS = model.embed(paths, batch_size=16, structure=True)
    if ending == "safetensors":
        import safetensors

        with safetensors.safe_open(out, "np") as file:
            assert np.array_equal(file.get_tensor("z"), z_ND)
            assert np.array_equal(file.get_tensor("s"), s_NS)
            told = file.metadata()
        assert json.loads(told["names"]) == names
    elif ending == "parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(out)
        assert np.array_equal(np.stack(table["z"].to_numpy()), z_ND)
        assert np.array_equal(np.stack(table["s"].to_numpy()), s_NS)
        assert table["id"].to_pylist() == names
        told = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    else:
        assert np.array_equal(np.load(out), z_ND)
        told = json.loads(out.with_name(f"{out.name}.json").read_text())
        assert told["names"] == names
    assert told["model_digest"] == model.digest and told["run"] == "small"
    assert not list(tmp_path.glob(".*.partial"))
    if ending != "npy":
        index = tmp_path / "of_vectors.index"
        done = forked_namr(
            "index", "build", run, "--vectors", out, "--out", index, "--mode", "sample"
        )
        assert done.returncode == 0, done.stderr
        hit = namr_dist.open_index(index).search(paths[9], 1)[0]
        assert (hit.id, hit.path, hit.label) == (names[9], names[9], paths[9].parent.name)


def test_hits_are_those_of_brute_force(model: namr_dist.Model, photos: Path) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    gallery = model.index(photos)
    assert (len(gallery), gallery.mode, gallery.type) == (70, "structure", "flat")
    squared_QN = _brute_force(model, paths[:5], paths)
    for hits, squared_N in zip(gallery.search(paths[:5], 7), squared_QN, strict=True):
        order = np.argsort(squared_N, kind="stable")[:7]
        assert [hit.path for hit in hits] == [str(paths[item]) for item in order]
        assert [hit.label for hit in hits] == [paths[item].parent.name for item in order]
        expected = np.sqrt(squared_N[order] + gallery.form.limit)
        assert [hit.distance for hit in hits] == pytest.approx(expected, rel=1e-5)
    alone = gallery.search(paths[0], 7)
    assert [hit.id for hit in alone] == [hit.id for hit in gallery.search(paths[:5], 7)[0]]
    assert len(gallery.search(paths[0], 100)) == 70
    with pytest.raises(InputError, match="k is 0"):
        gallery.search(paths[0], 0)
    with pytest.raises(InputError, match="mode adaptive is not served.*structure, sample"):
        model.index(photos, mode="adaptive")
    with pytest.raises(InputError, match="type 'tree' is none; take one of flat"):
        model.index(photos, type="tree")


def test_pictures_in_memory_make_a_gallery_too(model: namr_dist.Model, tmp_path: Path) -> None:
    images = [Image.fromarray(picture(label, 0)) for label in range(5)]
    gallery = model.index(images, mode="sample")
    assert [hit.id for hit in gallery.search(images[3], 1)] == ["image 3"]
    assert gallery.search(images[3], 1)[0].distance == pytest.approx(0, abs=1e-3)
    with pytest.raises(InputError, match="image 3 has no picture"):
        gallery.picture("image 3")


def test_what_is_written_is_what_is_read(
    model: namr_dist.Model, run: Path, photos: Path, saved: Path
) -> None:
    query = next(photos.rglob("*.jpg"))
    gallery, again = model.index(photos), namr_dist.open_index(saved)
    assert again.name == "photos.index"
    assert gallery.search(query, 9) == again.search(query, 9)
    # Plain faiss, with nothing but what the folder holds.
    about = read_about(saved)
    index = faiss.read_index(str(saved / "index.faiss"))
    assert index.ntotal == 70 and index.d == about["shape"]["width"] == 17
    asked = np.append(model.embed(query)[0] - np.array(about["centre"]), 0).astype(np.float32)
    squared_1K, found_1K = index.search(asked[None], 9)
    hits = again.search(query, 9)
    assert [again.items.ids[item] for item in found_1K[0]] == [hit.id for hit in hits]
    assert np.sqrt(squared_1K[0]) == pytest.approx([hit.distance for hit in hits], rel=1e-5)
    sheet = again.show(query, 8)
    assert isinstance(sheet, Image.Image) and sheet.width > 7 * 160 and sheet.height > 2 * 160
    assert "photos.index" in again.page([query], [hits])


def test_items_come_and_go(
    model: namr_dist.Model,
    run: Path,
    photos: Path,
    saved: Path,
    forked_namr: Callable,
    tmp_path: Path,
) -> None:
    before = namr_dist.open_index(saved)
    kept = before.engine.index.reconstruct_n(0, 70)
    more = tmp_path / "more"
    new = make_pictures(more, 6, labels=1)
    done = forked_namr("index", "add", saved, more)
    assert (done.returncode, done.stdout) == (0, f"6 items added, 76 in all: {saved}\n"), (
        done.stderr
    )
    gone = [str(path.relative_to(photos)) for path in sorted(photos.rglob("*.jpg"))[:3]]
    done = forked_namr("index", "remove", saved, *gone)
    assert (done.returncode, done.stdout) == (0, f"3 items removed, 73 left: {saved}\n"), (
        done.stderr
    )
    after = namr_dist.open_index(saved)
    # Vectors of items stay what they were, whatever comes and goes.
    assert np.array_equal(after.engine.index.reconstruct_n(0, 67), kept[3:])
    assert str(new[2]) in [hit.path for hit in after.search(new[2], 4)]
    assert not set(gone) & set(after.items.ids)
    assert len(list(saved.glob("*.faiss"))) == 1, "files of older states stay"
    for words, told in (
        (("add", saved, more), "6 of 6 items are in the index already"),
        (("remove", saved, gone[0]), "1 of 1 ids are not in the index"),
        (("remove", saved), "no id is given"),
        (("add", saved), "no kinds of pictures are given"),
        (("add", tmp_path / "none", more), "is no index"),
        (("build", run, more, "--out", saved), "replace it with --overwrite"),
        (("build", run, more, "--out", tmp_path), "give another folder"),
        (("build", run, more, "--out", tmp_path / "x", "--type", "ball"), "take one of flat"),
        (("build", run, more, "--out", tmp_path / "x", "--mode", "rerank"), "is not served"),
    ):
        done = forked_namr("index", *words)
        assert done.returncode == 2 and told in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    assert len(namr_dist.open_index(saved)) == 73
    done = forked_namr("index", "build", run, more, "--out", saved, "--overwrite", "--type", "hnsw")
    assert done.returncode == 0, done.stderr
    assert len(namr_dist.open_index(saved)) == 6
    told = json.loads(forked_namr("index", "info", saved, "--json").stdout)
    assert (told["items"], told["type"], told["labels"]) == (6, "hnsw (HNSW32,Flat)", 1)


def test_embeddings_of_pictures_that_are_there_are_refused(
    run: Path, saved: Path, photos: Path, forked_namr: Callable, tmp_path: Path
) -> None:
    vectors = tmp_path / "photos.parquet"
    assert forked_namr("embed", run, photos, "--out", vectors).returncode == 0
    done = forked_namr("index", "add", saved, "--vectors", vectors)
    assert done.returncode == 2 and "items share ids" in done.stderr
    assert len(namr_dist.open_index(saved)) == 70
    assert not list(tmp_path.glob(".*"))


def test_places_that_overlap_count_once(
    model: namr_dist.Model,
    run: Path,
    saved: Path,
    photos: Path,
    forked_namr: Callable,
    tmp_path: Path,
) -> None:
    first = sorted(photos.rglob("*.jpg"))[0]
    listed = tmp_path / "list.txt"
    listed.write_text(
        f"{first}\n{photos / 'class 1' / '..' / first.relative_to(photos)}\n", "utf-8-sig"
    )
    done = forked_namr("search", saved, photos, first, first, listed, "-k", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 70
    again = photos / ".." / photos.name
    done = forked_namr("index", "add", saved, again)
    assert done.returncode == 2 and "70 of 70 items are in the index already" in done.stderr
    (tmp_path / "nul.txt").write_text("a\0b.jpg\n")
    done = forked_namr("search", saved, tmp_path / "nul.txt")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_change_of_what_was_changed_meanwhile_is_refused(
    model: namr_dist.Model, saved: Path, photos: Path
) -> None:
    first, second = namr_dist.open_index(saved), namr_dist.open_index(saved)
    first.remove(first.items.ids[:5])
    first.save(saved)
    second.remove(second.items.ids[-7:])
    with pytest.raises(InputError, match="has been changed since it was opened"):
        second.save(saved)
    first.remove(first.items.ids[:5])
    first.save(saved)
    assert len(namr_dist.open_index(saved)) == 60
    gone = namr_dist.open_index(saved)
    gone.remove(gone.items.ids)
    assert gone.search([], 3) == [] and gone.search(next(photos.rglob("*.jpg")), 3) == []
    gone.save(saved)
    assert len(namr_dist.open_index(saved)) == 0


@pytest.mark.parametrize("share", [0.2, 0.98, 1.0])
def test_a_disk_without_room_leaves_the_index_as_it_was(
    saved: Path, photos: Path, share: float
) -> None:
    gallery = namr_dist.open_index(saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    # Of the files, items.parquet is the smallest and embeddings.npy the largest.
    size = (
        int(share * len(before["index.faiss"])) if share < 1 else len(before["embeddings.npy"]) - 9
    )
    gallery.remove(gallery.items.ids[:1] if share < 1 else [])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OSError) as failed:
            gallery.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed.value.errno == errno.EFBIG
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == {
        **before,
        ".index.lock": b"",
    }
    assert len(namr_dist.open_index(saved)) == 70


def test_cells_may_be_empty(model: namr_dist.Model, photos: Path) -> None:
    gallery = model.index(photos, type="ivf", mode="sample")
    gallery.settings = SearchSettings(nprobe=1)
    query = gallery.items.ids[0]
    gallery.remove(gallery.items.ids[1:])
    paths = sorted(photos.rglob("*.jpg"))
    found = gallery.search(paths, 10**12)
    assert found[0][0].id == query
    assert {len(hits) for hits in found} <= {0, 1}


def test_one_long_row_does_not_hide_the_nearest(model: namr_dist.Model, photos: Path) -> None:
    gallery = model.index(photos, mode="sample")
    z_ND, kept_NE = gallery.embeddings()
    z_ND = z_ND.copy()
    z_ND[7] *= 300
    made = Embeddings(z_ND=z_ND, s_NS=np.repeat(kept_NE, 4, axis=1), kept_N=np.arange(70))
    long = build(model, made, gallery.items, mode="sample")
    _, ids_QK = long.nearest(z_ND, kept_NE, 5)
    squared_NN = ((z_ND[:, None].astype(np.float64) - z_ND) ** 2).sum(2)
    assert np.array_equal(ids_QK, np.argsort(squared_NN, axis=1, kind="stable")[:, :5])
    far = Embeddings(z_ND=z_ND * np.float32(1e20), s_NS=made.s_NS, kept_N=made.kept_N)
    with pytest.raises(InputError, match="beyond 1e-12 to 1e"):
        build(model, far, gallery.items, mode="sample")


def test_the_command_finds_what_the_program_finds(
    saved: Path, photos: Path, forked_namr: Callable, tmp_path: Path
) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in paths[4:6]))
    page = tmp_path / "found.html"
    done = forked_namr("search", saved, paths[0], listed, "-k", 3, "--json", "--html", page)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [one["query"] for one in told] == [str(path) for path in (paths[0], *paths[4:6])]
    for one, hits in zip(
        told, namr_dist.open_index(saved).search([paths[0], *paths[4:6]], 3), strict=True
    ):
        assert one["hits"] == [vars(hit) for hit in hits]
    assert page.read_text().count("data:image/jpeg;base64,") == 12
    table = forked_namr("search", saved, photos, "-k", 1).stdout
    assert table.count("class 1") >= 17
    done = forked_namr("search", saved, tmp_path / "none.jpg")
    assert done.returncode == 2 and "none.jpg cannot be read" in done.stderr


def test_another_model_and_damage_are_named(
    run: Path, saved: Path, photos: Path, tmp_path: Path, forked_namr: Callable
) -> None:
    other = make_run(tmp_path / "other", seed=1)
    query = next(photos.rglob("*.jpg"))
    with pytest.raises(InputError, match="was built with model small .*other is another"):
        namr_dist.open_index(saved, model=other)
    done = forked_namr("search", saved, query, "--model", other)
    assert done.returncode == 2 and "is another" in done.stderr
    vectors = tmp_path / "vectors.safetensors"
    assert forked_namr("embed", other, photos, "--out", vectors).returncode == 0
    done = forked_namr("index", "build", run, "--vectors", vectors, "--out", tmp_path / "x.index")
    assert done.returncode == 2 and "was embedded by another model" in done.stderr
    moved = run.with_name("moved")
    shutil.move(run, moved)
    try:
        with pytest.raises(InputError, match="say where it is now"):
            namr_dist.open_index(saved).search(query)
        assert len(namr_dist.open_index(saved, model=moved).search(query)) == 10
    finally:
        shutil.move(moved, run)
    for name in ("index.json", "index.faiss", "items.parquet", "embeddings.npy"):
        whole = (saved / name).read_bytes()
        for damaged in (whole[:-1], whole[:50] + bytes([whole[50] ^ 4]) + whole[51:]):
            (saved / name).write_bytes(damaged)
            with pytest.raises(InputError, match=f"{name}.*damaged|{name} is not JSON"):
                namr_dist.open_index(saved)
        (saved / name).unlink()
        with pytest.raises(InputError, match=name):
            namr_dist.open_index(saved)
        (saved / name).write_bytes(whole)
    assert len(namr_dist.open_index(saved)) == 70


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("format", "other/1", "expected 'namr-index/1'"),
        ("mode", "best", "mode 'best' is none"),
        ("mode", "adaptive", "its model does not serve"),
        ("centre", [0.0], "centre has 1 numbers, not 16"),
        ("centre", "x", "expected a list"),
        ("geometry", {"width": 16}, "geometry is incomplete"),
        ("shape", {"type": "flat", "factory": "Flat", "width": 5}, "has vectors 17 wide"),
        ("settings", {"nprobe": 0}, "nprobe is 0"),
        ("limit", None, "expected a float"),
        ("sources", [], "names sources that index.json has not"),
        ("sources", [{"kind": "folder"}, 3], "should be an object"),
        ("sources", [{"kind": "ftp"}], "not one of folder"),
        ("files", {}, "names 0 files .faiss"),
        ("files", {"../../index.faiss": {}}, "names 0 files .faiss"),
        ("files", 7, "not an object"),
    ],
)
def test_an_index_that_says_something_else_is_refused(
    saved: Path, field: str, value: object, told: str
) -> None:
    about = {**read_about(saved), field: value}
    (saved / "index.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=told):
        namr_dist.open_index(saved)


def test_pictures_are_not_read_by_a_command_that_an_index_names(
    saved: Path, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    about = read_about(saved)
    about["sources"] = [{"kind": "shards", "place": f"pipe:touch {ran} {{}}", "split": "test"}]
    (saved / "index.json").write_text(json.dumps(about))
    gallery = namr_dist.open_index(saved)
    with pytest.raises(InputError, match="which is not run again"):
        gallery.picture(gallery.items.ids[0])
    assert not ran.exists()


def test_a_run_a_checkpoint_and_an_export_are_one_model(
    model: namr_dist.Model, run: Path, tmp_path: Path
) -> None:
    assert namr_dist.load(run / "checkpoints" / "final.safetensors").digest == model.digest
    assert namr_dist.load(make_run(tmp_path / "again")).digest == model.digest
    assert namr_dist.load(make_run(tmp_path / "seed", seed=1)).digest != model.digest
    larger = make_run(tmp_path / "larger", "--set.data.test_size", "48")
    assert namr_dist.load(larger).digest != model.digest
    weights = namr_dist.load(make_run(tmp_path / "weights", form="weights"))
    assert [mode.name for mode in weights.geometry.modes][:2] == ["sample", "rerank"]
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="neither a run nor a checkpoint nor an export"):
            namr_dist.load(place)
