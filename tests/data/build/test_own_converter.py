"""A converter of a user's own, named on the command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import simplejpeg
from conftest import REPOSITORY, picture

from namr_dist import named_code
from namr_dist.cli.main import main
from namr_dist.data.build.converters import CONVERTERS
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.shards import verify_shards

DOCUMENTED = re.findall(
    r"```python\n(.*?)```", (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8"), re.DOTALL
)
MORE = """
from dataclasses import replace
from namr_dist.errors import InputError

NUMBER = 7

def wrong(source):
    return [path.name for path in source.iterdir()]

def refuses(source):
    raise InputError(f"{source} holds no flowers")

def empty(source):
    return replace(read(source), images=())

def dotted(source):
    return replace(read(source), images=tuple(replace(image, key=image.key + ".jpg") for image in read(source).images))

def odd_role(source):
    return replace(read(source), images=tuple(replace(image, role="asks") for image in read(source).images))

def both_splits(source):
    return replace(read(source), images=tuple(replace(image, split="test") for image in read(source).images))
"""


@pytest.fixture
def build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable:
    """Builds the pictures by a converter of flowers.py, the one of docs/data.md, in the working
    folder."""
    monkeypatch.setattr(named_code, "_allowed", set())
    monkeypatch.chdir(tmp_path)
    (code,) = (text for text in DOCUMENTED if "def read" in text)
    Path("flowers.py").write_text(code + MORE)
    for label, name in enumerate(("aster", "iris", "rose", "tulip")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for view in range(3):
            jpeg = simplejpeg.encode_jpeg(picture(label, view, size=32))
            (tmp_path / "pictures" / name / f"{view}.jpg").write_bytes(jpeg)

    def build(name: str) -> tuple[int, str]:
        code = main(["shards", "build", name, "pictures", "--out", "shards", "--workers", "1"])
        return code, capsys.readouterr().err

    yield build
    sys.modules.pop("flowers", None)


def test_the_documented_converter_builds_a_set(build: Callable) -> None:
    assert build("flowers:read") == (0, "")
    manifest = Manifest.load(Path("shards"))
    assert [(entry.name, entry.split) for entry in manifest.classes] == [
        ("aster", "train"),
        ("iris", "train"),
        ("rose", "test"),
        ("tulip", "test"),
    ]
    assert verify_shards(manifest, manifest.splits, decode=True) == 12
    assert build("flowers:read")[0] == 0  # and again, which finds it there


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("flowers:wrong", "FORMAT flowers:wrong returned list; let it return a Listing"),
        ("flowers:NUMBER", "FORMAT flowers:NUMBER is no function (int); name one"),
        ("flowers:raed", "flowers has no raed; did you mean read?"),
        ("flowers:refuses", "error: pictures holds no flowers"),
        ("flowers:empty", "flowers: no image is listed"),
        ("flowers:dotted", "the key 'aster_0.jpg' of pictures/aster/0.jpg is empty or holds a dot"),
        ("flowers:odd_role", "has the role 'asks'; give it one of '', 'query', 'gallery'"),
        ("flowers:both_splits", "splits may share no class"),
        ("no_flowers:read", "no_flowers cannot be imported"),
        (
            "sopp",
            "FORMAT is 'sopp'; known are sop, inshop, cub, cars, vehicleid, letters, folder, or module:NAME",
        ),
    ],
)
def test_converters_that_do_not_serve(build: Callable, name: str, told: str) -> None:
    code, said = build(name)
    assert code == 2 and len(said.splitlines()) == 1 and told in said
    assert not Path("shards").exists()


def test_help_names_every_converter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["shards", "build", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(re.search(rf"\b{name}\b", said) for name in CONVERTERS) and "module:NAME" in said
