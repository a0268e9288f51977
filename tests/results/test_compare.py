"""Many runs become one table: figures against numpy, pairing, and what is left out and why."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from namr_dist.cli.main import main
from namr_dist.config import Config, DataConfig, LossConfig, ModelConfig, RankingConfig, TrainConfig
from namr_dist.errors import InputError
from namr_dist.results.comparison import compare, find_runs
from namr_dist.results.comparison_page import grids, write_comparison

HASH = "0123456789abcdef"


def write_run(
    folder: Path,
    *,
    recall: float,
    weight: float = 0.0,
    seed: int = 0,
    clusters: int = 2,
    metric: str = "triplet",
    test_hash: str = HASH,
    train_hash: str = "one",
    evaluated: bool = True,
    by_class: tuple[float, float] | None = None,
    **data: Any,
) -> Path:
    """A run's folder with the figures that evaluation writes, as far as a comparison reads them.
    by_class: R@1 of two classes with a query each, whose mean is `recall`."""
    loss = LossConfig(metric=metric, ranking=RankingConfig(weight=weight, clusters=clusters))  # type: ignore[arg-type]
    config = Config(recipe="sop", data=DataConfig(**data), loss=loss, train=TrainConfig(seed=seed))
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    figures = {"R@1": recall, "R@10": recall + 10, "MAP@R": recall / 2, "NMI": 80.0}
    metrics = {
        "test": {
            "sample": figures,
            "adaptive": {**figures, "R@1": recall + 1},
            "adaptive_s1": figures,
        },
        "protocol": {
            "data set": "shop",
            "test split": "test",
            "test hash": test_hash,
            "train hash": train_hash,
            "query": "all 60 images",
        },
    }
    if evaluated:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if by_class is not None:
        rows = {"R@1": by_class, "MAP@R": [recall / 2, recall / 2]}
        classes = {"label": [4, 7], "queries": [1, 1], "sample": rows}
        (folder / "classes.json").write_text(json.dumps(classes))
    return folder


def chart_classes(page: str, heading: str) -> list[str]:
    """The classes of a chart's curves, in order."""
    figure = next(part for part in page.split("<figure")[1:] if f"<h3>{heading}</h3>" in part)
    return re.findall(r'<path class="line ([^"]*)"', figure)


def cells(comparison: Any, title: str) -> list[list[str]]:
    return next(grid.rows for grid in grids(comparison) if grid.title == title)


BEFORE, AFTER = [70.0, 71.5, 70.9], [71.2, 72.0, 72.5]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three seeds without ranking and with it, and one seed of another loss."""
    for seed in range(3):
        write_run(tmp_path / f"a{seed}", recall=BEFORE[seed], seed=seed)
        write_run(tmp_path / f"b{seed}", recall=AFTER[seed], seed=seed, weight=2.0)
    write_run(tmp_path / "margin", recall=73.0, metric="margin")
    return tmp_path


def test_mean_and_deviation_over_seeds_are_numpys(sweep: Path) -> None:
    comparison = compare(find_runs([sweep]))
    assert comparison.fields == ("loss.metric", "loss.ranking.weight") and not comparison.left_out
    assert [
        (one.values["loss.metric"], one.values["loss.ranking.weight"], one.seeds)
        for one in comparison.settings
    ] == [("margin", 0.0, (0,)), ("triplet", 0.0, (0, 1, 2)), ("triplet", 2.0, (0, 1, 2))]
    for setting, values in zip(comparison.settings, ([73.0], BEFORE, AFTER), strict=True):
        recall = setting.figures["sample"]["R@1"]
        assert recall.mean == pytest.approx(np.mean(values))
        assert recall.deviation == (
            pytest.approx(np.std(values, ddof=1)) if len(values) > 1 else None
        )
        assert setting.figures["adaptive"]["R@1"].mean == pytest.approx(recall.mean + 1)
        assert (
            set(setting.figures) == {"sample", "adaptive"}
            and "NMI" not in setting.figures["sample"]
        )
    assert cells(comparison, "Results")[1] == [
        "triplet",
        "0",
        "3",
        "70.80 ± 0.75",
        "80.80 ± 0.75",
        "35.40 ± 0.38",
    ]
    assert cells(comparison, "R@1 by way of search")[0] == ["margin", "0", "1", "73.00", "74.00"]


def test_the_gain_of_ranking_has_the_error_of_paired_differences(sweep: Path) -> None:
    comparison = compare(find_runs([sweep]))
    (difference,) = comparison.differences
    assert (
        difference.paired
        and comparison.settings[difference.baseline].values["loss.ranking.weight"] == 0
    )
    gain, changes = difference.gains["R@1"], np.subtract(AFTER, BEFORE)
    assert gain.mean == pytest.approx(changes.mean())
    assert gain.error == pytest.approx(changes.std(ddof=1) / np.sqrt(3))
    assert cells(comparison, "What multi-cluster ranking adds") == [
        [
            "triplet",
            "2",
            "3, paired",
            "70.80 ± 0.75",
            "71.90 ± 0.66",
            "+1.10 ± 0.32",
            "35.40 ± 0.38",
            "35.95 ± 0.33",
            "+0.55 ± 0.16",
        ]
    ]


def test_other_seeds_are_not_paired(tmp_path: Path) -> None:
    for seed, recall in enumerate(BEFORE):
        write_run(tmp_path / f"a{seed}", recall=recall, seed=seed)
    for seed, recall in ((1, 72.0), (7, 73.0)):
        write_run(tmp_path / f"b{seed}", recall=recall, seed=seed, weight=1.0)
    (difference,) = compare(find_runs([tmp_path])).differences
    gain = difference.gains["R@1"]
    assert not difference.paired and gain.mean == pytest.approx(72.5 - np.mean(BEFORE))
    assert gain.error == pytest.approx(
        np.sqrt(np.var(BEFORE, ddof=1) / 3 + np.var([72.0, 73.0], ddof=1) / 2)
    )


def test_a_single_seed_has_neither_deviation_nor_error(tmp_path: Path) -> None:
    write_run(tmp_path / "a", recall=70.0)
    write_run(tmp_path / "b", recall=72.0, weight=1.0)
    comparison = compare(find_runs([tmp_path]))
    assert cells(comparison, "What multi-cluster ranking adds")[0][-3:] == [
        "35.00",
        "36.00",
        "+1.00",
    ]


def test_settings_that_a_run_does_not_use_make_no_setting(tmp_path: Path) -> None:
    """Clusters of a ranking of weight 0; where shards lie; how many workers read them."""
    write_run(tmp_path / "a", recall=70.0, clusters=5, seed=1, path="/here", workers=3)
    write_run(tmp_path / "b", recall=72.0, path="/there")
    write_run(tmp_path / "c", recall=72.0, weight=1.0)
    write_run(tmp_path / "d", recall=72.0, weight=1.0, clusters=3)
    comparison = compare(find_runs([tmp_path]))
    assert comparison.fields == ("loss.ranking.weight", "loss.ranking.clusters")
    assert [row[:3] for row in cells(comparison, "Results")] == [
        ["0", "–", "2"],
        ["1", "2", "1"],
        ["1", "3", "1"],
    ]
    assert [(one.baseline, one.ranked) for one in comparison.differences] == [(0, 1), (0, 2)]


def test_other_training_images_are_another_setting(tmp_path: Path) -> None:
    write_run(tmp_path / "a", recall=70.0)
    write_run(tmp_path / "b", recall=72.0, train_hash="two", seed=1)
    comparison = compare(find_runs([tmp_path]))
    assert comparison.fields == ("train images",) and [
        one.seeds for one in comparison.settings
    ] == [(0,), (1,)]
    # Of each class, the seed draws some.
    for name, hashed, seed in (
        ("c", "three", 0),
        ("d", "four", 1),
    ):
        write_run(tmp_path / "few" / name, recall=70.0, most_images=5, train_hash=hashed, seed=seed)
    assert [one.seeds for one in compare(find_runs([tmp_path / "few"])).settings] == [(0, 1)]


def test_no_run_is_dropped_without_a_word(sweep: Path) -> None:
    write_run(sweep / "half", recall=0, evaluated=False)
    (sweep / "half" / "metrics.jsonl").write_text('{"step": 70, "loss": 1.0, "time_s": 9.0}\n')
    write_run(sweep / "later", recall=0, evaluated=False)
    (sweep / "later" / "checkpoints" / "final.safetensors").touch()
    write_run(sweep / "elsewhere", recall=99, test_hash="f" * 16)
    write_run(sweep / "twice", recall=99, seed=2)
    (write_run(sweep / "broken", recall=99) / "metrics.json").write_text('{"test": {"sample": {}}')
    comparison = compare(find_runs([sweep]))
    why = {Path(one.run).name: one.why for one in comparison.left_out}
    assert set(why) == {"half", "later", "elsewhere", "twice", "broken"}
    assert (
        re.match(r"not finished \(\w+, step 70 of 10,000\)", why["half"])
        and "namr evaluate" in why["later"]
    )
    assert "other test images (shop, test, ffffffffffffffff)" in why["elsewhere"]
    assert why["twice"] == "same settings and seed as a2" and "evaluate it again" in why["broken"]
    assert [len(one.runs) for one in comparison.settings] == [1, 3, 3]
    assert max(one.figures["sample"]["R@1"].mean for one in comparison.settings) < 75


def test_a_figure_that_one_seed_lacks_is_not_averaged(sweep: Path) -> None:
    path = sweep / "a1" / "metrics.json"
    metrics = json.loads(path.read_text())
    del metrics["test"]["sample"]["R@10"], metrics["test"]["adaptive"]
    path.write_text(json.dumps(metrics))
    comparison = compare(find_runs([sweep]))
    assert cells(comparison, "Results")[1][3:] == ["70.80 ± 0.75", "–", "35.40 ± 0.38"]
    assert cells(comparison, "R@1 by way of search")[1][3:] == ["70.80 ± 0.75", "–"]


def test_owners_folders_do_not_show(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run = write_run(tmp_path / name, recall=70.0)
        config = replace(
            Config.load(run / "config.json"), model=ModelConfig(weights=Path(f"/home/me/{name}.pt"))
        )
        (run / "config.json").write_text(config.to_json())
    write_comparison(compare(find_runs([tmp_path])), tmp_path / "table.html")
    page = (tmp_path / "table.html").read_text()
    assert "one.pt" in page and "/home/me" not in page and str(tmp_path) not in page


def test_the_page_fetches_nothing_and_links_only_to_reports_that_exist(sweep: Path) -> None:
    (sweep / "b1" / "report.html").touch()
    write_comparison(compare(find_runs([sweep])), sweep / "report.html")
    page = (sweep / "report.html").read_text()
    assert re.findall(r'<a href="([^"]*)">([^<]*)</a>', page) == [("b1/report.html", "b1")]
    assert not re.search(r"https?:|url\(|@import|<script", page)
    assert "default-src 'none'" in page and page.count("<h1>") == 1
    assert "70.80 ± 0.75" in page and "+1.10 ± 0.32" in page


def test_bars_have_the_intervals_of_their_classes(tmp_path: Path) -> None:
    """Of two classes the ends are those of each alone; so are those of the difference."""
    write_run(tmp_path / "a", recall=70.0, by_class=(60.0, 80.0))
    write_run(tmp_path / "b", recall=72.0, weight=1.0, by_class=(65.0, 79.0))
    write_run(tmp_path / "c", recall=71.0, weight=2.0)
    write_comparison(compare(find_runs([tmp_path])), tmp_path / "all.html")
    page = (tmp_path / "all.html").read_text()
    bars = page.split("<h3>R@1 on the test classes, %</h3>")[1].split("</figure>")[0]
    assert re.findall(r"<small>(\d.*)</small>", bars) == [
        "60.0–80.0",
        "65.0–79.0, +2.0 (-1.0 to +5.0) to the first",
    ]
    assert re.findall(r'<b style="width: ([\d.]+)%"', bars) == ["70.00", "72.00", "71.00"]
    assert re.findall(r'<u style="left: ([\d.]+)%; right: ([\d.]+)%"', bars) == [
        ("60.00", "20.00"),
        ("65.00", "21.00"),
    ]
    (tmp_path / "b" / "classes.json").write_text('{"label": [4]}')
    with pytest.raises(InputError, match="b/classes.json does not hold figures by class"):
        write_comparison(compare(find_runs([tmp_path])), tmp_path / "all.html")


def test_curves_of_runs_share_a_chart_with_a_colour_each(sweep: Path) -> None:
    for number, run in enumerate(sorted(path for path in sweep.iterdir() if path.is_dir())):
        lines = [{"step": step, "loss": 1.0, "metric_loss": 0.5 / step} for step in range(1, 9)]
        lines += [{"step": step, "val": {"R@1": 50.0 + number + step}} for step in (4, 8)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_comparison(compare(find_runs([sweep])), sweep / "report.html")
    page = (sweep / "report.html").read_text()
    colours = ["p0", "p1", "p2", "p3", "p4", "p5", "p0 dashed"]
    assert chart_classes(page, "Metric loss") == colours
    assert chart_classes(page, "Validation R@1, %") == colours
    assert "Validation MAP@R, %" not in page
    legend = re.search(r'<ul class="legend">(.*?)</ul>', page, re.DOTALL)
    assert legend and re.findall(r'class="line ([^"]*)"', legend[1]) == colours
    assert re.findall(r"<span>(.*)</span>", legend[1]) == [
        "margin",
        "a0",
        "a1",
        "a2",
        "b0",
        "b1",
        "b2",
    ]
    # Of more runs than colours, each setting has one, and its bar is the mean over its seeds.
    for seed in range(3, 9):
        write_run(sweep / f"a{seed}", recall=71.0, seed=seed)
    write_comparison(compare(find_runs([sweep])), sweep / "report.html")
    page = (sweep / "report.html").read_text()
    assert chart_classes(page, "Metric loss") == ["p0", *["p1"] * 3, *["p2"] * 3]
    bars = page.split("<h3>R@1 on the test classes, %</h3>")[1].split("</figure>")[0]
    widths = [float(width) for width in re.findall(r'style="width: ([\d.]+)%"', bars)]
    means = [73.0, np.mean([*BEFORE, *[71.0] * 6]), np.mean(AFTER)]
    assert widths == pytest.approx(means, abs=0.01)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nor holds one"):
        find_runs([tmp_path])
    run = write_run(tmp_path / "a", recall=1, evaluated=False)
    with pytest.raises(InputError, match="no run to compare: .*a: not finished"):
        compare([run])


def test_the_command_writes_table_and_page(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(sweep)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == str(sweep / "report.html") and "70.80 ± 0.75" in said
    assert (sweep / "report.html").exists()
    two = [str(sweep / "a0"), str(sweep / "b0")]
    assert main(["report", *two, "--out", str(sweep / "two.html"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["differences"][0]["gains"]["R@1"] == {"mean": pytest.approx(1.2), "error": None}
    assert (sweep / "two.html").exists() and [one["seeds"] for one in facts["settings"]] == [
        [0],
        [0],
    ]


def test_another_split_is_compared_where_it_was_measured(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = json.loads((sweep / "a0" / "metrics.json").read_text())
    metrics["test"]["sample"]["R@1"] = 12.5
    (sweep / "a0" / "metrics-few.json").write_text(json.dumps(metrics))
    assert main(["report", str(sweep), "--split", "few", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (setting,) = facts["settings"]
    assert setting["figures"]["sample"]["R@1"]["mean"] == 12.5 and len(facts["left_out"]) == 6
    assert all("not evaluated on few" in one["why"] for one in facts["left_out"])
    assert (sweep / "report-few.html").exists() and not (sweep / "report.html").exists()


def test_options_that_do_not_go_together_are_named(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = str(sweep / "a0"), str(sweep / "b0")
    for words, told in (
        ([one, two], "give --out FILE.html"),
        ([str(sweep), "--shards", "x"], "--shards is x"),
        ([str(sweep), "--checkpoint", "9"], "--checkpoint is 9, which goes with one run"),
        ([one, two, "--out", str(sweep / "no" / "a.html")], "is not a file in a folder"),
    ):
        assert main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1


def test_what_runs_of_others_are_called_is_only_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No terminal obeys it, and rich takes none of it for markup."""
    write_run(tmp_path / "own", recall=71.0)
    foreign = write_run(tmp_path / "foreign", recall=70.0, metric="\x1b[2Jplanted:\u202eLoss[/x]")
    metrics = json.loads((foreign / "metrics.json").read_text())
    told = {"sentence": "as others do", "looks_at_gallery": True}
    metrics["own_modes"] = {"a[/x]": told, "\x1b[1Ab": told}
    metrics["test"] |= dict.fromkeys(("a[/x]", "\x1b[1Ab"), metrics["test"]["sample"])
    (foreign / "metrics.json").write_text(json.dumps(metrics))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "all.html")]) == 0
    said = capsys.readouterr().out
    assert "\\x1b[2Jplanted:\\u202eLoss[/x]" in said and "a[/x]" in said
    assert "\x1b" not in said and "\u202e" not in said
