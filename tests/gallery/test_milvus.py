"""`namr index push` to the real Milvus Lite: what is stored, and in which order it is found."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from made_up_items import MODES, gallery_of, rows

from namr_dist.cli.main import main
from namr_dist.errors import InputError, TransientError
from namr_dist.gallery import milvus
from namr_dist.gallery.gallery import Gallery
from namr_dist.gallery.milvus import TOKEN, collection_name, push

pymilvus = pytest.importorskip("pymilvus")
ITEMS, QUERIES, K = 5_000, 100, 10


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server, of a file, for all tests."""
    from milvus_lite.server_manager import server_manager_instance

    path = str(tmp_path_factory.mktemp("milvus") / "photos.db")
    yield path
    server_manager_instance.release_server(path)


@pytest.mark.parametrize("mode", ["calibrated", "symmetric"])
def test_milvus_gives_the_order_of_the_exact_search(
    mode: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties apart. Milvus's numbers are the mode's, but for what is added to them."""
    monkeypatch.setattr(milvus, "_BATCH_BYTES", 200_000)  # several batches, the last one smaller
    gallery = gallery_of(*rows(ITEMS, MODES[mode], seed=8), MODES[mode], mode=mode)
    queries = rows(QUERIES, MODES[mode], seed=9)
    name = push(gallery, database, collection=f"photos_{mode}")
    client = pymilvus.MilvusClient(uri=database)
    vectors_QV = gallery.form.queries(gallery.geometry.side(*queries, name="queries"))
    found = client.search(name, data=list(vectors_QV), limit=K)
    squared_QK, ids_QK = gallery.nearest(*queries, K)
    places = 0
    for hits, squared_K, ids_K in zip(found, squared_QK, ids_QK, strict=True):
        positions_K = gallery.items.positions([hit["id"] for hit in hits])
        differ_K = positions_K != ids_K
        places += int((~differ_K).sum())
        if mode == "calibrated":
            distances_K = np.array([hit["distance"] for hit in hits]) - gallery.form.offset
            np.testing.assert_allclose(distances_K, squared_K, atol=2e-4)
        # Only neighbours in the list that fp32 hardly tells apart change places.
        assert (np.abs(np.diff(squared_K))[differ_K[1:] & differ_K[:-1]] < 1e-4).all()
    assert places > 0.999 * QUERIES * K


def test_fields_and_names(
    database: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    z_ND, s_NE = rows(60, MODES["rerank"], seed=1)
    gallery = gallery_of(z_ND, s_NE, MODES["rerank"], mode="rerank")
    index = gallery.save(tmp_path / "2nd photos.index")
    assert main(["index", "push", str(index), database]) == 0
    printed = capsys.readouterr().out
    assert "60 items, mode rerank: collection index_2nd_photos" in printed
    assert "mode rerank orders what is found again: ask for 100" in printed
    client = pymilvus.MilvusClient(uri=database)
    (row,) = client.query(
        "index_2nd_photos",
        filter='id == "00013.jpg"',
        output_fields=["id", "label", "path", "source", "vector"],
    )
    assert (row["id"], row["label"], row["path"], row["source"]) == (
        "00013.jpg",
        "label 6",
        "00013.jpg",
        "memory",
    )
    np.testing.assert_array_equal(
        np.array(row["vector"], dtype=np.float32), gallery.vectors(np.array([13]))[0]
    )
    assert main(["index", "push", str(index), database]) == 2
    assert "collection index_2nd_photos exists already" in capsys.readouterr().err
    gallery.remove(["00000.jpg"])
    push(gallery, database, collection="index_2nd_photos", overwrite=True)
    counted = client.query("index_2nd_photos", filter="", output_fields=["count(*)"])
    assert counted[0]["count(*)"] == 59
    assert [name for name in client.list_collections() if "2nd" in name] == ["index_2nd_photos"]


def test_a_push_that_fails_leaves_the_old_collection(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = gallery_of(*rows(40, MODES["sample"], seed=1), MODES["sample"], mode="sample")
    push(gallery, database, collection="kept")
    monkeypatch.setattr(milvus, "_count", lambda client, name: 39)
    with pytest.raises(TransientError, match="counts 39 items where 40 were pushed"):
        push(gallery, database, collection="kept", overwrite=True)
    client = pymilvus.MilvusClient(uri=database)
    assert [name for name in client.list_collections() if "kept" in name] == ["kept"]
    assert client.query("kept", filter="", output_fields=["count(*)"])[0]["count(*)"] == 40


@pytest.mark.parametrize("failures", [1, 2], ids=["put back", "not even put back"])
def test_a_rename_that_fails_drops_no_last_copy(
    failures: int, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real client's, but for the first renames to the final name."""
    name = f"renamed_{failures}"
    old, new = (
        gallery_of(*rows(count, MODES["sample"], seed=1), MODES["sample"], mode="sample")
        for count in (40, 30)
    )
    push(old, database, collection=name)
    left, original = failures, pymilvus.MilvusClient.rename_collection

    def failing(self, old_name, new_name, *words, **options):
        nonlocal left
        if new_name == name and left:
            left -= 1
            raise pymilvus.MilvusException(message="not now")
        return original(self, old_name, new_name, *words, **options)

    monkeypatch.setattr(pymilvus.MilvusClient, "rename_collection", failing)
    with pytest.raises(TransientError, match="not now") as caught:
        push(new, database, collection=name, overwrite=True)
    client = pymilvus.MilvusClient(uri=database)
    found = sorted(one for one in client.list_collections() if name in one)
    if failures == 1:
        assert found == [name]
        assert client.query(name, filter="", output_fields=["count(*)"])[0]["count(*)"] == 40
        push(new, database, collection=name, overwrite=True)
        assert [one for one in client.list_collections() if name in one] == [name]
        assert client.query(name, filter="", output_fields=["count(*)"])[0]["count(*)"] == 30
    else:
        assert len(found) == 2 and all(one in str(caught.value) for one in found)
        assert [client.get_collection_stats(one)["row_count"] for one in found] == [30, 40]


@pytest.fixture
def gallery() -> Gallery:
    return gallery_of(*rows(20, MODES["sample"], seed=1), MODES["sample"], mode="sample")


@pytest.mark.parametrize(
    ("uri", "collection", "message"),
    [
        ("photos.sqlite", None, "photos.sqlite is no place of Milvus"),
        ("s3://key:secret@bucket/a.db", None, "s3://…@bucket/a.db is no place of Milvus"),
        ("nowhere/photos.db", None, "nowhere/photos.db lies in a folder that does not exist"),
        ("photos.db", "a-b", "--collection 'a-b' is no name that Milvus takes"),
    ],
)
def test_where_nothing_can_be_pushed(
    uri: str, collection: str | None, message: str, gallery: Gallery
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        push(gallery, uri, collection=collection)
    assert "secret" not in str(caught.value)


def test_without_pymilvus(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(InputError, match=r"pymilvus .*pip install 'namr-dist\[milvus\]'"):
        push(gallery, "http://localhost:19530")


def test_a_server_that_is_not_there(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is asked for stays secret, whatever Milvus's own client says."""
    monkeypatch.setattr(milvus, "_CONNECT_S", 0.5)
    monkeypatch.setenv(TOKEN, "root:hidden")
    with pytest.raises(
        TransientError, match=r"Milvus at http://…@127\.0\.0\.1:9 does not serve"
    ) as caught:
        push(gallery, "http://user:secret@127.0.0.1:9")
    for text in (str(caught.value), *capfd.readouterr()):
        assert "secret" not in text and "hidden" not in text


@pytest.mark.parametrize(
    ("index", "collection"),
    [
        ("photos.index", "photos"),
        ("Möbel 2.index", "M_bel_2"),
        ("2.index", "index_2"),
        ("é", "index"),
    ],
)
def test_names_of_collections(index: str, collection: str) -> None:
    assert collection_name(index) == collection
