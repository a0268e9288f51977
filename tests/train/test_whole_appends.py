"""A file that grows by whole pieces, whatever the disk refuses."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from namr_dist.train.whole_appends import WholeAppends


@contextlib.contextmanager
def no_larger_than(size: int) -> Iterator[None]:
    """Files may not grow beyond so many bytes: the last write up to it is cut short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_pieces_that_are_refused_follow_later_in_order(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("before\n")
    file = WholeAppends(path)
    file.append(b"one\n")
    with no_larger_than(14):  # three bytes more than there are
        for piece in (b"two two\n", b"three\n"):
            with pytest.raises(OSError, match="File too large.*lines"):
                file.append(piece)
            assert file.pending and path.read_text() == "before\none\n", "a part of a piece"
    file.append(b"four\n")
    assert not file.pending
    assert path.read_text() == "before\none\ntwo two\nthree\nfour\n"
    file.sync()
    file.close()


def test_a_part_that_could_not_be_taken_back_goes_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that became read-only in the middle of a write."""
    path = tmp_path / "lines"
    file = WholeAppends(path)

    def read_only(self: WholeAppends) -> None:
        raise OSError(30, "Read-only file system")

    with no_larger_than(3), monkeypatch.context() as patch:
        patch.setattr(WholeAppends, "_take_back", read_only)
        with pytest.raises(OSError, match="File too large"):
            file.append(b"one\n")
        assert path.read_text() == "one"
    file.append(b"two\n")
    assert path.read_text() == "one\ntwo\n"
    file.close()
