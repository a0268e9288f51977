"""Hostfiles: what they say, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from namr_dist.errors import InputError
from namr_dist.launchers.hostfile import node_command, read_hostfile


def test_lines_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# cluster\n\nb.example.org   slots=8  # the first\na\tslots=4\n")
    assert list(read_hostfile(path).items()) == [("b.example.org", 8), ("a", 4)]


def test_each_machine_starts_its_own_slots() -> None:
    hosts = {"b": 8, "a": 4}
    for node, slots in enumerate((8, 4)):
        words = node_command(hosts, node, port=29501, words=["homeware"])
        options = dict(zip(words[3:13:2], words[4:14:2], strict=True))
        assert options == {
            "--nnodes": "2",
            "--node-rank": str(node),
            "--master-addr": "b",
            "--master-port": "29501",
            "--nproc-per-node": str(slots),
        }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a slots=2\nb slots=two\n", "line 2 of hostfile .* is 'b slots=two'; write HOST slots=N"),
        ("a slots=0\n", "line 1 of hostfile .* is 'a slots=0'; .* at least 1"),
        ("a\n", "line 1 of hostfile .* is 'a'; write HOST slots=N"),
        ("a slots=2 extra\n", "'a slots=2 extra'"),
        ("-oProxyCommand=x slots=2\n", "'-oProxyCommand=x slots=2'"),
        ("a slots=2\n\na slots=4\n", "line 3 of hostfile .* names a again"),
        ("# nothing\n\n", "names no host; write a line"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(InputError, match=named):
        read_hostfile(tmp_path / "hosts")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_hostfile(tmp_path / "none")
    (tmp_path / "picture").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match="not text"):
        read_hostfile(tmp_path / "picture")
