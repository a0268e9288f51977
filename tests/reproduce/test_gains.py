"""Means, paired differences and their intervals: against scipy's tests and a bootstrap in numpy, on
cells whose figures are known."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cells import CLASSES, FIGURES, QUERIES, write_cell
from conftest import REPOSITORY
from scipy import stats

from namr_dist.errors import InputError
from namr_dist.reproduce.cells import complete_cells, copy_cell, read_cells
from namr_dist.reproduce.gains import Interval, as_json, gains, missing
from namr_dist.reproduce.gains_table import grids, rival_grids
from namr_dist.retrieval.intervals import over_classes

SEEDS = (0, 1, 3)


def write_grid(folder: Path, *variants: str, seeds: tuple[int, ...] = SEEDS) -> Path:
    for variant in variants:
        for seed in seeds:
            write_cell(folder / f"triplet-{variant}-{seed}", variant=variant, seed=seed)
    return folder


def read(folder: Path) -> list[Any]:
    return read_cells(complete_cells(folder))


def figure_of(folder: Path, variant: str, row: str, figure: str, seeds: tuple[int, ...]) -> list:
    return [
        json.loads((folder / f"triplet-{variant}-{seed}" / "metrics.json").read_text())["test"][
            row
        ][figure]
        for seed in seeds
    ]


SIDES = {
    "namr - alone": (("ranking", "structure"), ("alone", "sample")),
    "ranking - alone": (("ranking", "sample"), ("alone", "sample")),
    "structure - one": (("alone", "structure"), ("alone", "sample")),
    "structure - shuffled": (("alone", "structure"), ("alone", "structure_shuffled")),
    "namr - ranking": (("ranking", "structure"), ("ranking", "sample")),
    "namr - shuffled": (("ranking", "structure"), ("ranking", "structure_shuffled")),
    "lower_lr - alone": (("lower_lr", "sample"), ("alone", "sample")),
    "lower_lr + structure - alone": (("lower_lr", "structure"), ("alone", "sample")),
}


@pytest.mark.parametrize("figure", FIGURES)
def test_intervals_over_seeds_are_those_of_scipys_t_tests(tmp_path: Path, figure: str) -> None:
    write_grid(tmp_path, "alone", "ranking", "lower_lr")
    told = as_json(gains(read(tmp_path)))["triplet"]
    assert list(told["gain"]) == list(told["gain over classes"]) == list(SIDES)
    for name, (side, other) in SIDES.items():
        new, old = (figure_of(tmp_path, *one, figure, SEEDS) for one in (side, other))
        low, high = stats.ttest_rel(new, old).confidence_interval(0.95)
        assert told["gain"][name][figure] == pytest.approx(
            [np.mean(new) - np.mean(old), low, high]
        ), name
    quantities = {
        "alone": ("alone", "sample"),
        "ranking": ("ranking", "sample"),
        "structure": ("alone", "structure"),
        "namr": ("ranking", "structure"),
        "lower_lr": ("lower_lr", "sample"),
        "lower_lr + structure": ("lower_lr", "structure"),
    }
    assert list(told) == [*quantities, "gain", "gain over classes"]
    for name, side in quantities.items():
        values = figure_of(tmp_path, *side, figure, SEEDS)
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert told[name][figure] == pytest.approx([np.mean(values), low, high])


def test_a_bootstrap_over_classes_in_numpy_has_the_same_ends(tmp_path: Path) -> None:
    """By another generator and more draws, so the ends differ by chance: by less than a tenth of
    the length, and by much more if seeds were not averaged."""
    cells = {
        (cell.name.variant, cell.name.seed): cell
        for cell in read(write_grid(tmp_path, "alone", "ranking"))
    }
    told = as_json(gains(list(cells.values())))["triplet"]
    rng = np.random.default_rng(77)
    (side, row), (other, other_row) = SIDES["namr - shuffled"]
    difference_SFC = np.array(
        [
            [
                cells[side, seed].classes[row][figure]
                - cells[other, seed].classes[other_row][figure]
                for figure in FIGURES
            ]
            for seed in SEEDS
        ]
    )
    draws = []
    for _ in range(6000):
        drawn = rng.integers(CLASSES, size=CLASSES)
        of_all = difference_SFC[..., drawn] @ QUERIES[drawn] / QUERIES[drawn].sum()
        draws.append(of_all.mean(axis=0))
    for figure, low, high in zip(FIGURES, *np.quantile(draws, [0.025, 0.975], axis=0), strict=True):
        mean, *ends = told["gain over classes"]["namr - shuffled"][figure]
        assert mean == told["gain"]["namr - shuffled"][figure][0]
        assert ends == pytest.approx([low, high], abs=0.1 * (high - low)), figure


def test_the_ends_of_a_bootstrap_of_few_classes_are_known() -> None:
    """Of two classes, each alone is drawn in a quarter of all draws, so these are the ends."""
    low, high = over_classes(np.array([[3.0, -1.0], [5.0, 5.0]]), np.array([1.0, 9.0]))
    assert (list(low), list(high)) == ([-1.0, 5.0], [3.0, 5.0])
    # Classes weigh by their queries. Of six, three are 1: none of them is drawn in 1 of 64 draws,
    # which is beyond the end, and one in 6.
    low, high = over_classes(
        np.array([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]), np.array([98.0, 98.0, 98.0, 1.0, 1.0, 1.0])
    )
    assert (low[0], high[0]) == (pytest.approx(98 / 103), pytest.approx(490 / 491))
    assert over_classes(np.array([[1.0]]), np.array([4.0])) == ([None], [None])


def test_alike_differences_have_an_interval_of_no_length(tmp_path: Path) -> None:
    for seed in SEEDS:
        base = np.full((2, CLASSES), 40.0 + seed)
        write_cell(tmp_path / f"a{seed}", seed=seed, rows={"sample": base})
        write_cell(tmp_path / f"b{seed}", variant="ranking", seed=seed, rows={"sample": base + 0.5})
    told = as_json(gains(read(tmp_path)))["triplet"]
    for block in ("gain", "gain over classes"):
        assert list(told[block]) == ["ranking - alone"]  # there is no structure row
        assert told[block]["ranking - alone"]["R@1"] == pytest.approx([0.5, 0.5, 0.5])
    assert list(told)[:2] == ["alone", "ranking"] and "namr" not in told


def test_a_single_seed_has_no_interval_over_seeds_but_one_over_classes(tmp_path: Path) -> None:
    [one] = gains(read(write_grid(tmp_path, "alone", "ranking", seeds=(4,))))
    assert one.means["alone"]["R@1"].low is None
    told = json.loads(json.dumps(as_json([one])))["triplet"]
    mean, low, high = told["gain"]["namr - alone"]["MAP@R"]
    assert low is None and high is None and mean != 0
    _, low, high = told["gain over classes"]["namr - alone"]["MAP@R"]
    assert low < mean < high
    row = grids([one])[0].rows[0]
    assert row[:2] == ["triplet", "1"] and "±" not in row[2] and " [–] [" in row[6]


def test_only_seeds_that_both_have_are_paired_and_the_table_counts_them(tmp_path: Path) -> None:
    write_grid(tmp_path, "alone", "variance")
    write_grid(tmp_path, "ranking", seeds=(3, 1, 7))
    cells = read(tmp_path)
    [one] = gains(cells)
    assert one.gains["namr - alone"].seeds == (1, 3) and one.gains["structure - one"].seeds == SEEDS
    new = figure_of(tmp_path, "ranking", "sample", "R@1", (1, 3))
    old = figure_of(tmp_path, "alone", "sample", "R@1", (1, 3))
    low, high = stats.ttest_rel(new, old).confidence_interval(0.95)
    assert one.gains["ranking - alone"].over_seeds["R@1"] == Interval(
        mean=pytest.approx(np.mean(new) - np.mean(old)),
        low=pytest.approx(low),
        high=pytest.approx(high),
    )
    first, rivals = grids([one])[0], rival_grids([one])[0]
    assert first.rows[0][1] == "3 alone, 3 ranking, 2 paired"
    assert [row[:3] for row in rivals.rows] == [
        ["triplet", "ranking", "2"],
        ["triplet", "variance", "3"],
    ]
    assert [str(name) for name in missing(cells)] == [
        "triplet alone seed 7",
        "triplet ranking seed 0",
        "triplet variance seed 7",
    ]


def test_the_configuration_names_a_cell_that_has_no_other_name(tmp_path: Path) -> None:
    write_cell(tmp_path / "a", loss="margin", seed=2, named=False)
    write_cell(tmp_path / "b", loss="margin", variant="ranking", seed=2, named=False)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text("{}")  # not evaluated yet
    assert [str(cell.name) for cell in read(tmp_path)] == [
        "margin alone seed 2",
        "margin ranking seed 2",
    ]


def _spoil(cell: Path, file: str, **changed: Any) -> None:
    content = json.loads((cell / file).read_text()) | changed
    (cell / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"test_hash": "other"}, "was measured on other test images than"),
        ({"queries": QUERIES[::-1].copy()}, "was measured on other test images than"),
        ({"variant": "alone"}, "are both triplet alone seed 0"),
        ({"variant": "namr"}, "is of the variant 'namr'"),
    ],
)
def test_cells_of_which_no_table_can_be_made_are_refused(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    write_cell(tmp_path / "a")
    write_cell(tmp_path / "b", **{"variant": "ranking", **options})
    with pytest.raises(InputError, match=told):
        gains(read(tmp_path))


@pytest.mark.parametrize(
    "file, changed, told",
    [
        ("classes.json", {"sample": {"R@1": [50.0] * CLASSES, "MAP@R": [5.0] * CLASSES}}, "of two"),
        ("classes.json", {"sample": {"R@1": [50.0]}}, "evaluate it again"),
        ("classes.json", {"label": [1]}, "1 labels"),
        ("metrics.json", {"test": {"sample": {"R@2": 1.0}}}, "lack R@1 or MAP@R"),
        ("metrics.json", {"test": {}}, "lack R@1 or MAP@R"),
        ("cell.json", {"seed": "0"}, "write it so"),
    ],
)
def test_damaged_figures_are_named(
    tmp_path: Path, file: str, changed: dict[str, Any], told: str
) -> None:
    cell = write_cell(tmp_path / "a")
    _spoil(cell, file, **changed)
    with pytest.raises(InputError, match=told) as raised:
        read(tmp_path)
    assert file in str(raised.value)


def test_a_copy_reads_alike_and_is_complete_only_with_its_last_file(tmp_path: Path) -> None:
    cell = write_cell(tmp_path / "a" / "triplet-2-0", variant="ranking", named=False)
    (cell / "metrics.jsonl").write_text(
        '{"step": 1, "img_per_s": 2.5, "slowest_host": "mine"}\n{"step": 1, "los'
    )
    copy_cell(cell, tmp_path / "b")
    [copied] = complete_cells(tmp_path / "b")
    assert json.loads((copied / "cell.json").read_text()) == {
        "loss": "triplet",
        "variant": "ranking",
        "seed": 0,
    }
    assert (copied / "metrics.jsonl").read_text() == '{"step": 1, "img_per_s": 2.5}\n'
    assert as_json(gains(read(tmp_path / "a"))) == as_json(gains(read(tmp_path / "b")))
    (copied / "metrics.json").unlink()
    assert complete_cells(tmp_path / "b") == []


def _make_gains() -> ModuleType:
    path = REPOSITORY / "tools" / "make_gains.py"
    spec = importlib.util.spec_from_file_location("make_gains", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_show_the_tables_between_their_marks(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    cells = write_grid(docs / "results" / "gains-images", "alone", "ranking", "one_centre")
    write_cell(docs / "results" / "gains-letters" / "m", loss="margin", seed=1)
    (cells / "triplet-ranking-3" / "classes.json").unlink()
    marks = "<!-- gains-images:begin -->\n{}<!-- gains-images:end -->"
    (tmp_path / "README.md").write_text(f"before\n{marks.format('old')}\nafter\n")
    rivals = "<!-- gains-images-rivals:begin -->\n<!-- gains-images-rivals:end -->"
    (docs / "page.md").write_text(f"{marks.format('')}\n{rivals}")
    assert _make_gains().write(tmp_path) == [
        "docs/results/gains-images lacks triplet ranking seed 3",
        "docs/results/gains-features has no finished cell; its table is left as it is",
        "no page has the marks of gains-letters",
        "no page has the marks of gains-summary",
    ]
    (docs / "summary.md").write_text("<!-- gains-summary:begin -->\n<!-- gains-summary:end -->")
    assert "no page has the marks of gains-summary" not in _make_gains().write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("before\n<!--") and page.endswith("-->\nafter\n") and "old" not in page
    both, _, simpler = (docs / "page.md").read_text().partition("\n<!-- gains-images-rivals:")
    assert both in page
    heading, marks, row = page.split("R@1:\n\n")[1].split("\n\n")[0].splitlines()
    assert heading == (
        "| loss | seeds | alone | ranking | structure | namr | namr − alone | structure − s = 1 | "
        "structure − shuffled | ranking − alone |"
    )
    told = as_json(gains(read(cells)))["triplet"]
    shown = row.strip("| ").split(" | ")
    assert shown[:2] == ["triplet", "3 alone, 2 ranking, 2 paired"] and marks.count("--") == 10
    mean, low, high = told["gain"]["namr - alone"]["R@1"]
    _, *ends = told["gain over classes"]["namr - alone"]["R@1"]
    assert shown[6] == f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] [{ends[0]:+.2f}, {ends[1]:+.2f}]"
    short = (docs / "summary.md").read_text().split("\n| ")[3].strip("| ").split(" | ")
    assert short[:2] == ["homeware, end to end, 3 alone, 2 ranking, 2 paired seeds", "triplet"]
    namr = told["namr"]["R@1"][0]
    assert short[3:5] == [f"{namr:.1f}", f"{mean:+.1f} [{ends[0]:+.1f}, {ends[1]:+.1f}]"]
    mean, low, high = told["alone"]["R@1"]
    assert shown[2] == f"{mean:.2f} ± {high - mean:.2f}"
    assert "5 networks, seeds 0, 1, 3; 30 test classes" in page and "steps: 450" in page
    assert "8 networks, seeds 0, 1, 3" in simpler
    assert "| triplet | one_centre | 3 |" in simpler and "one_centre" not in page
