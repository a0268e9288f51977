"""Tables: what spreadsheets would run is text, numbers are numbers, and reading gives back what was
written."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from namr_dist.csv_file import read_csv, write_csv
from namr_dist.data.build.build import _write_broken

FORMULAS = ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "=", "-a")
OTHERS = ("a=b", "", "'", "'quoted'", "'=1", "''@x", "3", "-3", "+3.5", "-1.200e-03", "-inf", " =1")


def cells(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("text", (*FORMULAS, *OTHERS))
def test_a_text_comes_back_and_is_no_formula(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.csv"
    write_csv(path, [{"a": text, text + "b": "c"}])
    assert read_csv(path) == [{"a": text, text + "b": "c"}]
    stored = cells(path)[1][0]
    assert stored == ("'" + text if text in FORMULAS or text in ("'=1", "''@x") else text)


def test_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_csv(path, [{"a": -3, "b": -0.5, "c": None, "d": True}])
    assert cells(path)[1] == ["-3", "-0.5", "", "True"]


def test_the_list_of_what_a_build_left_out(tmp_path: Path) -> None:
    path = tmp_path / "skipped.csv"
    _write_broken(path, [("=HYPERLINK(1).jpg", "damaged", "x"), ("a/b.jpg", "empty", "")])
    assert cells(path)[1:] == [["'=HYPERLINK(1).jpg", "damaged (x)"], ["a/b.jpg", "empty"]]
