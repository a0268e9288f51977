"""Rank discovery from the environment."""

from __future__ import annotations

import pytest

from namr_dist.errors import InputError
from namr_dist.parallel.ranks import discover

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")  # so that whatever discover() sets is undone afterwards
        monkeypatch.delenv(name)
    return monkeypatch


def test_alone(environment: pytest.MonkeyPatch) -> None:
    rank = discover()
    assert (rank.rank, rank.world_size, rank.first) == (0, 1, True)


def test_launched(environment: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("3", "4", "1", "127.0.0.1", "29500"), strict=True):
        environment.setenv(name, value)
    rank = discover()
    assert (rank.rank, rank.world_size, rank.local_rank, rank.first) == (3, 4, 1, False)


def test_half_launched(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "1")
    with pytest.raises(InputError, match="set no WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start with"):
        discover()
