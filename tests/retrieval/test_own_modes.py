"""Modes of a user's own: measured beside the built-in ones, with their controls, and refused where
they are no good."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from namr_dist.errors import InputError
from namr_dist.retrieval.evaluate import evaluate
from namr_dist.retrieval.modes import ADAPTIVE, CALIBRATED, SYMMETRIC, Mode, Side
from namr_dist.retrieval.reidentification import reidentify
from namr_dist.retrieval.vectors import Served, adaptive_vectors, sample_vectors

LABELS = np.repeat(np.arange(12), 5)
_rng = np.random.default_rng(5)
Z = _rng.standard_normal((12, 8))[LABELS] + _rng.standard_normal((60, 8))
S = _rng.uniform(0.5, 1.5, Z.shape)
SQUARED = Mode(
    name="squared",
    sentence="distance with the squares of the query’s weights",
    uses_s=True,
    vectors=lambda queries, items: adaptive_vectors(queries.z, queries.s**2, items.z),
)


def plain(queries: Side, items: Side) -> Served:
    return sample_vectors(queries.z, items.z)


def test_an_own_mode_stands_beside_the_others_with_its_controls():
    before = evaluate(Z, S, LABELS, delta=0.5)
    result = evaluate(Z, S, LABELS, delta=0.5, modes=[SQUARED])
    added = {"squared", "squared_s1", "squared_shuffled"}
    assert result["test"].keys() == before["test"].keys() | added
    assert result["own_modes"] == {
        "squared": {"sentence": SQUARED.sentence, "looks_at_gallery": False}
    }
    assert {name: result["test"][name] for name in before["test"]} == before[
        "test"
    ] and "own_modes" not in before
    assert result["test"]["squared_s1"] == before["test"]["adaptive_s1"]
    assert result["test"]["squared"] != before["test"]["adaptive"]
    again = reidentify(Z, S, LABELS, draws=2, seed=0, modes=[SQUARED])["modes"]
    assert added < again.keys() and again["squared_s1"] == again["sample"] != again["squared"]
    assert added.isdisjoint(evaluate(Z, None, LABELS, delta=0.5, modes=[SQUARED])["test"])


@pytest.mark.parametrize("mode", [ADAPTIVE, SYMMETRIC, CALIBRATED], ids=lambda mode: mode.name)
@pytest.mark.parametrize("roles", [None, np.arange(60) % 3])
def test_a_copy_of_a_mode_gets_its_figures(mode, roles):
    """Whatever a built-in mode is given, one from outside is given too."""
    test = evaluate(
        Z, S, LABELS, delta=0.5, roles_N=roles, ks=(1, 50), modes=[replace(mode, name="copy")]
    )["test"]
    for name in ("", *(f"_{control}" for control in mode.controls)):
        assert test["copy" + name] == test[mode.name + name]


def test_a_mode_is_given_what_it_says_it_uses_and_no_more():
    seen: list[tuple[Side, Side]] = []

    def noted(queries: Side, items: Side) -> Served:
        seen.append((queries, items))
        return plain(queries, items)

    for own, measured in (
        (Mode(name="a", sentence="", vectors=noted), 1),
        (Mode(name="b", sentence="", vectors=noted, uses_s=True, looks_at_gallery=True), 3),
    ):
        seen.clear()
        result = evaluate(Z, S, LABELS, delta=0.5, modes=[own])
        assert len(seen) == measured
        for queries, items in seen:
            assert (queries.s is None) == (items.s is None) == (not own.uses_s)
            assert (items.density is None) == (not own.looks_at_gallery) and queries.density is None
    assert result["test_protocol"]["looks_at_gallery"] == ["calibrated", "b"]


def served(**changes) -> Mode:
    return Mode(
        name="own",
        sentence="",
        vectors=lambda queries, items: replace(plain(queries, items), **changes),
    )


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("plain", "'plain' is no retrieval mode; make it a Mode"),
        (plain, "is no retrieval mode"),
        (replace(SQUARED, name="rerank"), "figures called rerank, as another's are"),
        (replace(SQUARED, name="adaptive_s1"), "figures called adaptive_s1"),
        (replace(SQUARED, name=" "), "give it a name of printable letters"),
        (replace(SQUARED, vectors=None), "mode squared has no vectors"),
        (
            Mode(name="own", sentence="", vectors=lambda queries, items: queries.z),
            "as ndarray; return them as a Served",
        ),
        (
            served(queries_QV=np.ones((59, 8))),
            r"mode own, vectors of queries: shape \(59, 8\) where \(60, width\)",
        ),
        (served(items_NV=np.ones(60)), r"mode own, vectors of items: shape \(60,\)"),
        (served(items_NV=np.ones((60, 9))), "queries 8 wide and of items 9 wide"),
        (
            served(items_NV=np.where(np.eye(60, 8) > 0, np.nan, 1)),
            r"vectors of items: row 0 holds NaN .*8 such rows of 60",
        ),
        (served(queries_QV=np.full((60, 8), 1e60)), "row 0 holds NaN or infinity"),
        (served(metric="cosine"), "mode own asks for the metric 'cosine'"),
    ],
)
def test_modes_that_are_refused(mode, told):
    with pytest.raises(InputError, match=told):
        evaluate(Z, S, LABELS, delta=0.5, modes=[mode])
    with pytest.raises(InputError, match="mode"):
        reidentify(Z, S, LABELS, draws=1, seed=0, modes=[mode])


def test_a_name_may_be_given_once():
    with pytest.raises(InputError, match="mode squared would have its figures called squared"):
        evaluate(Z, S, LABELS, delta=0.5, modes=[SQUARED, SQUARED])
