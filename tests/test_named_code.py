"""Code that is named as module:NAME: imported when the command line says so, and only then."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from namr_dist import named_code
from namr_dist.errors import InputError


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_code, "_allowed", set())


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module in the working folder that leaves a mark when it is imported."""
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "trap.py").write_text(
        "from pathlib import Path\nPath('sprung').touch()\nclass Thing:\n    part = 7\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "trap", raising=False)
    return tmp_path / "sprung"


def test_what_was_not_allowed_is_not_imported(trap: Path) -> None:
    with pytest.raises(InputError, match="--allow-code trap:Thing$"):
        named_code.load("trap:Thing", use="loss.metric")
    named_code.allow(["trap:Other"])  # another name of the same module is another name
    with pytest.raises(InputError, match="trap:Thing"):
        named_code.load("trap:Thing", use="loss.metric")
    assert not trap.exists()


def test_what_was_allowed_is_found_in_the_working_folder(trap: Path) -> None:
    path = list(sys.path)
    named_code.allow(["trap:Thing.part"])
    assert named_code.load("trap:Thing.part", use="loss.metric") == 7
    assert trap.exists() and sys.path == path


def test_a_working_folder_that_is_on_the_path_stays_where_it_is(
    trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = [str(trap.parent), *sys.path]
    monkeypatch.setattr(sys, "path", list(path))
    named_code.allow(["trap:Thing"])
    named_code.load("trap:Thing", use="loss.metric")
    assert sys.path == path


def test_nothing_in_the_working_folder_shadows_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "colorsys.py").write_text("rgb_to_hls = 'mine'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    named_code.allow(["colorsys:rgb_to_hls"])
    assert callable(named_code.load("colorsys:rgb_to_hls", use="loss.metric"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("trap:Thong", "did you mean Thing"),
        ("no_such_module:A", "cannot be imported"),
        ("ends:A", "cannot be imported .SystemExit: 0"),
        ("triplet", "module:NAME"),
        ("os;x:y", "module:NAME"),
        ("../trap:Thing", "module:NAME"),
    ],
)
def test_names_that_lead_nowhere(trap: Path, name: str, told: str) -> None:
    named_code.allow([name])
    with pytest.raises(InputError, match=told):
        named_code.load(name, use="loss.metric")


def test_every_name_that_is_refused_is_shown() -> None:
    named_code.allow(["fine:A"])
    with pytest.raises(
        InputError, match=r"^run/config.json names .* loss.metric is evil:B; .*--allow-code evil:B$"
    ):
        named_code.check_allowed(
            {"model.backbone": "fine:A", "loss.metric": "evil:B"}, "run/config.json"
        )
