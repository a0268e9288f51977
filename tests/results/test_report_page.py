"""The report: made from a small run with real JPEGs, read as text, and opened in a browser."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from chromium import chromium, show_at
from PIL import EpsImagePlugin
from rich.console import Console
from safetensors.numpy import save_file

from namr_dist.errors import InputError
from namr_dist.results import examples
from namr_dist.results.charts import Line, line_chart, nice_ticks, smoothed, thinned
from namr_dist.results.page import write_report
from namr_dist.results.record import read_run
from namr_dist.results.searches import NEIGHBOURS
from namr_dist.results.summary import summary, validation_note
from namr_dist.results.tables import results_table
from namr_dist.retrieval.evaluate import evaluate, evaluate_sample
from namr_dist.train.checkpoints.verified_file import write_tensors

NASTY = "Chair <script>alert(\"x\")</script> & 'co'"


class SmallRun:
    """A folder as training and evaluation leave it: 24 classes of four images."""

    def __init__(self, folder: Path, *, noise: float = 1.0) -> None:
        rng = np.random.default_rng(3)
        self.folder = folder
        folder.mkdir()
        self.labels = np.repeat(np.arange(24), 4)
        z = rng.standard_normal((24, 16))[self.labels] + noise * rng.standard_normal((96, 16))
        s = rng.uniform(0.5, 1.5, z.shape)
        self.names = [NASTY if label == 2 else f"Thing {label}" for label in self.labels]
        self.categories = [f"Kind {label % 7}" for label in self.labels]
        self.tensors = {"z": z.astype("f4"), "s": s.astype("f4"), "labels": self.labels}
        self.config = {
            "recipe": "small",
            "model": {"backbone": "efficientnet_lite0"},
            "train": {"seed": 5},
            "loss": {"metric": "triplet", "ranking": {"weight": 2.0, "clusters": 2}},
        }
        self.log = [
            {
                "step": i,
                "epoch": 0,
                "loss": 1.0,
                "metric_loss": float(0.5 * 0.95**i + 1e-3),
                "ranking_loss": float(0.2 + 0.01 * rng.standard_normal()),
                "lr": 1e-3,
                "img_per_s": 30.0,
                "time_s": 2.0 * i,
            }
            for i in range(1, 101)
        ]
        self.log += [
            {"step": i, "val": {"R@1": 50 + i / 4, "MAP@R": 30 + i / 5}} for i in (25, 50, 75, 100)
        ]
        self.metrics = {
            **evaluate(z, s, self.labels, delta=0.5),
            "baselines": {
                "raw pixels": evaluate_sample(rng.standard_normal((96, 9)), self.labels),
                "untrained model": evaluate_sample(
                    z + 2 * rng.standard_normal(z.shape), self.labels
                ),
                "frozen backbone": evaluate_sample(z + rng.standard_normal(z.shape), self.labels),
            },
            "protocol": {
                "data set": "stripes",
                "commit": NASTY,
                "versions": {"torch": "2", "numpy": "2"},
            },
            "train": {"seconds": 200.4, "steps": 100},
        }
        self.classes = self.metrics.pop("test_classes")

    def save(self) -> None:
        (self.folder / "config.json").write_text(json.dumps(self.config))
        (self.folder / "metrics.jsonl").write_text(
            "".join(json.dumps(entry) + "\n" for entry in self.log)
        )
        (self.folder / "metrics.json").write_text(json.dumps(self.metrics))
        if self.classes is not None:
            (self.folder / "classes.json").write_text(json.dumps(self.classes))
        tensors = {name: torch.from_numpy(value) for name, value in self.tensors.items()}
        write_tensors(self.folder / "embeddings.safetensors", tensors, {})

    def jpeg(self, position: int) -> bytes:
        """Class colour, with a pattern that makes no two alike; the first class's are large
        files."""
        size = 300 if self.labels[position] == 0 else 64
        colour = np.random.default_rng(int(self.labels[position])).uniform(40, 215, 3)
        grain = np.random.default_rng(1000 + position).uniform(-40, 40, (size, size, 3))
        return simplejpeg.encode_jpeg(np.clip(colour + grain, 0, 255).astype(np.uint8), quality=85)

    def report(self, *, save: bool = True) -> Path:
        if save:
            self.save()
        return write_report(
            self.folder, self.jpeg, self.names, self.categories, validation_classes=9
        )


class Page(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += " ".join(data.split()) + " "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path / "small")


def test_page_is_self_contained_and_complete(run):
    path = run.report()
    assert path == run.folder / "report.html" and path.stat().st_size < 3_000_000
    assert sorted(p.name for p in run.folder.iterdir()) == [
        "classes.json",
        "config.json",
        "embeddings.safetensors",
        "metrics.json",
        "metrics.jsonl",
        "report.html",
    ]
    page = Page(path)
    assert not re.search(r"https?:|url\(|@import", page.html)
    assert not page.all("script")
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, attributes)
    images = page.all("img")
    # Ten searches, the hubs with as many pictures, and pairs of pictures.
    assert len(images) > 14 * (1 + NEIGHBOURS) and all(image["alt"] for image in images)
    assert page.all("html")[0]["lang"] == "en"
    assert all(head.get("scope") in ("row", "col") for head in page.all("th"))
    assert len(page.all("h1")) == 1 and len(page.all("table")) == 4
    # three charts, the map, and a symbol for each of seven super-categories
    assert len(page.all("svg")) == 4 + 7
    figure = run.metrics["test"]["sample"]["R@1"]
    assert f"The nearest image was of the same class for {figure:.1f} % of them" in page.text
    trained = (
        "EfficientNet-Lite0 was trained for 100 steps (3 min 20 s) on stripes with the triplet loss"
    )
    assert trained in page.text
    for words in (
        "raw pixels",
        "frozen backbone",
        "symmetric",
        "looks at the gallery",
        "versions, torch",
        "✓",
        "✗",
        "First neighbour wrong",
        "t-SNE",
    ):
        assert words in page.text, words
    assert NASTY in page.text  # shown as text, never run


def test_report_repeats_and_replaces(run):
    first = run.report().read_bytes()
    assert run.report().read_bytes() == first


def test_intervals_are_those_of_a_bootstrap_over_classes(run):
    """By another generator, so the ends differ by chance. Only what is known of each class has
    any."""
    labels = run.labels = run.tensors["labels"] = np.repeat(np.arange(24), 4)
    page = Page(run.report())
    cells = re.findall(r"<td>([\d.]+)(?:<small>([\d.]+)–([\d.]+)</small>)?</td>", page.html)
    known = {(float(value), float(low), float(high)) for value, low, high in cells if low}
    rng = np.random.default_rng(77)
    drawn = rng.integers(24, size=(4000, 24))
    for row, name in (("sample", "R@1"), ("sample", "MAP@R"), ("adaptive", "MAP@R")):
        whole, of_class = run.metrics["test"][row][name], np.array(run.classes[row][name])
        assert np.bincount(labels).tolist() == run.classes["queries"]
        low, high = np.quantile(of_class[drawn].mean(axis=1), [0.025, 0.975])
        near = 0.1 * (high - low) + 0.05
        assert any(
            abs(value - whole) <= 0.051 and abs(start - low) <= near and abs(end - high) <= near
            for value, start, end in known
        ), (row, name)
    shown = page.text.split("Ways to search")[1].split("Training")[0]
    # All figures of the sample mode, which the embeddings give; two of any other row.
    rows = len(run.metrics["test"])
    assert shown.count("–") - shown.count(" – ") == 6 + 2 * (rows - 1)


def test_figures_of_classes_may_be_missing_but_not_of_another_evaluation(run):
    run.classes = None
    page = Page(run.report())
    shown = page.text.split("Ways to search")[1].split("Training")[0]
    assert shown.count("–") == 6  # of the sample mode: those of the embeddings
    run.classes = {"label": [0, 1], "queries": [4, 4], "sample": {"R@1": [1.0, 2.0]}}
    run.save()
    with pytest.raises(InputError, match=r"classes.json has R@1 1\.500 .* of two evaluations"):
        write_report(run.folder, run.jpeg, run.names, run.categories)
    for damaged in (
        {"label": [0, 0]},
        {"queries": [0, 4]},
        {"sample": {"R@1": [1.0, "x"]}},
        {"sample": {"R@1": [1.0, 1e308]}},
    ):
        (run.folder / "classes.json").write_text(json.dumps(run.classes | damaged))
        with pytest.raises(InputError, match="does not hold figures by class .* evaluate it again"):
            write_report(run.folder, run.jpeg, run.names, run.categories)


def test_a_class_is_named_with_its_number(run):
    """Names repeat within a set."""
    run.names = ["Stool"] * 96
    page = Page(run.report())
    assert not re.search(r"Stool(?! ?</span>| #\d)", page.html)
    table = page.text.split("All 24 classes, worst first")[1]
    assert len(re.findall(r"Stool #\d+ [\d.]+ [\d.]+ 4 (–|Stool #\d+, \d ×) Kind \d ", table)) == 24


def test_why_validation_and_test_lie_apart(run):
    run.save()
    record = read_run(run.folder)
    assert validation_note(record, None, seed=0) is validation_note(record, 0, seed=0) is None
    figure = run.metrics["test"]["sample"]["R@1"]
    told = validation_note(record, 3, seed=0)
    assert f"ends at 75.0 % on the validation classes and is {figure:.1f} % on the test" in told
    assert "has 2 other classes to be taken for in validation, 23 in the test" in told
    fewer = re.search(r"among 3 test classes at a time .* the same network has ([\d.]+) %", told)
    assert fewer and figure + 5 < float(fewer[1]) <= 100
    # All but one class: what is left out changes little, and nothing is left out of 24.
    most = re.search(r"the same network has ([\d.]+) %", validation_note(record, 23, seed=0))
    assert most and float(most[1]) == pytest.approx(figure, abs=2)
    assert validation_note(record, 24, seed=0).endswith(
        "compare figures of the same classes alone."
    )
    assert "8 other classes to be taken for" in Page(run.report()).text


@pytest.mark.parametrize(
    "learnt, told",
    [
        (
            [65.0, 79.0],
            "+2.0 points to the better of them (95 % over test classes: -1.0 to +5.0), the diff",
        ),
        (
            [61.0, 84.0],
            "+2.5 points to the better of them (95 % over test classes: +1.0 to +4.0), it helps",
        ),
        (
            [59.0, 79.0],
            "-1.0 points to the better of them (95 % over test classes: -1.0 to -1.0), it harms",
        ),
    ],
)
def test_the_verdict_is_over_the_differences_of_classes(run, learnt, told):
    """Of two classes the ends are those of each alone."""
    of_row = {"structure": learnt, "sample": [60.0, 80.0], "structure_shuffled": [90.0, 40.0]}
    run.classes = {"label": [0, 1], "queries": [1, 1]}
    run.classes |= {row: {"R@1": values} for row, values in of_row.items()}
    run.metrics["test"] = {row: {"R@1": sum(values) / 2} for row, values in of_row.items()}
    run.save()
    assert told in list(summary(read_run(run.folder)))[-1]
    (run.folder / "classes.json").unlink()
    assert "a standard error of" in list(summary(read_run(run.folder)))[-1]


def test_missing_pieces_leave_a_smaller_report(run):
    run.log = [entry for entry in run.log if "val" not in entry]
    del run.tensors["s"], run.metrics["baselines"], run.metrics["train"], run.metrics["protocol"]
    run.metrics = {**run.metrics, **evaluate(run.tensors["z"], None, run.labels, delta=0.5)}
    run.classes = run.metrics.pop("test_classes")
    run.config = {}
    run.categories = [""] * 96
    page = Page(run.report())
    assert "Validation, %" not in page.text and "Metric loss" in page.text
    assert "no structure embedding" in page.text and "A network was trained." in page.text
    assert "by super-class" not in page.text


def test_no_training_log_and_unknown_figures(run):
    run.log = []
    run.metrics["test"]["sample"]["R@1"] = float("nan")
    page = Page(run.report())
    assert "Metric loss" not in page.text and "–" in page.text


def test_bad_lines_of_the_log_are_left_out_and_counted(run, capsys):
    whole = run.report().read_bytes()
    with open(run.folder / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n[1]\n" + b'{"step": 101, "lo')
    assert run.report(save=False).read_bytes() == whole
    path = run.folder / "metrics.jsonl"
    assert capsys.readouterr().err == f"WARNING: 3 lines of {path} could not be read; left out\n"


def test_values_of_wrong_types_are_gaps(run):
    run.log += [
        {"step": 101, "loss": "x", "metric_loss": [], "time_s": None},
        {"step": 102, "loss": None},
        {"step": 103, "val": 3},
        {"step": 104, "val": {"R@1": "high", "MAP@R": None}},
    ]
    page = Page(run.report())
    assert "Metric loss" in page.text and "Validation, %" in page.text


def test_few_images_and_lone_classes(run):
    """Below 50 images the map is a PCA; classes of one image are never queries."""
    keep = np.concatenate([np.arange(12), [12, 16, 20]])
    run.classes = None
    run.tensors = {name: tensor[keep] for name, tensor in run.tensors.items()}
    run.labels = run.labels[keep]
    run.names, run.categories = [run.names[i] for i in keep], [run.categories[i] for i in keep]
    page = Page(run.report())
    assert "PCA" in page.text
    run.labels = run.tensors["labels"] = np.arange(15)
    assert "No test image has another one of its class." in Page(run.report()).text


def test_collapsed_embeddings_have_no_map(run):
    run.tensors["z"] = np.ones_like(run.tensors["z"])
    assert "Map of the test embeddings" not in Page(run.report()).text


def test_many_super_categories_share_a_last_symbol(run):
    run.categories = [f"Kind {label}" for label in run.labels]
    page = Page(run.report())
    assert "all others" in page.text and len(page.all("svg")) == 4 + 12


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "metrics.json", "embeddings.safetensors"]
)
def test_missing_and_damaged_files_are_named(run, name):
    run.save()
    if name != "metrics.jsonl":  # of that, what can be read is shown
        (run.folder / name).write_bytes(b"\x00 no good\n\n")
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            write_report(run.folder, run.jpeg, run.names, run.categories)
    (run.folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing: (train|evaluate) the run first"):
        write_report(run.folder, run.jpeg, run.names, run.categories)
    assert not (run.folder / "report.html").exists()


def test_other_bad_input_is_named(run):
    run.save()
    with pytest.raises(InputError, match="95 names for 96 embeddings"):
        write_report(run.folder, run.jpeg, run.names[1:], run.categories)
    with pytest.raises(InputError, match="cannot be read"):
        write_report(run.folder, lambda _: b"no image", run.names, run.categories)
    save_file({"labels": run.labels}, run.folder / "embeddings.safetensors")
    with pytest.raises(InputError, match="no tensor z: evaluate the run first"):
        write_report(run.folder, run.jpeg, run.names, run.categories)


def test_no_program_is_run_for_an_image(tmp_path, monkeypatch):
    """Pillow reads PostScript, whatever the file is called, by the first gs on the path."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    image = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    with pytest.raises(InputError, match="image of 'a.jpg' cannot be read"):
        examples.data_uri(image, "a.jpg")
    assert not (tmp_path / "ran").exists()


def test_console_table(run):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table(run.metrics))
    text = console.export_text()
    lines = [line for line in text.splitlines() if "│" in line]
    assert [line.split("│")[1].strip() for line in lines] == [
        "raw pixels",
        "untrained model",
        "frozen backbone",
        "trained, sample",
        "trained, rerank",
        "shuffled between images",
        "trained, adaptive",
        "with s = 1 everywhere",
        "shuffled between images",
        "trained, symmetric",
        "with s = 1 everywhere",
        "shuffled between images",
        "trained, calibrated *",
    ]
    assert (
        f"{run.metrics['test']['symmetric']['MAP@R']:.1f}" in text
        and "looks at the whole gallery" in text
    )
    del run.metrics["baselines"], run.metrics["test_counts"]
    results_table(run.metrics)


def test_chart_parts():
    assert (
        nice_ticks(0, 100) == [0, 20, 40, 60, 80, 100]
        and nice_ticks(3, 3)[0] < 3 < nice_ticks(3, 3)[-1]
    )
    assert nice_ticks(0.1, 0.3) == [0.1, 0.15, 0.2, 0.25, 0.3]
    # Rounding alone apart, as two logged steps may be.
    for low, high in (
        (1e-14, 3e-14),
        (48.6191, 48.6191 + 1e-13),
    ):
        assert len(set(nice_ticks(low, high))) > 2
    assert (
        smoothed([2.0, 2.0, 2.0]) == pytest.approx([2, 2, 2]) and len(thinned(range(1001))) == 400
    )
    line = Line(name="a", xs=[1, 2, 3], ys=[1, 100, float("nan")], css="c0", dots=True, label=True)
    chart = line_chart([line], title='a "b"', x_label="step", allow_log=True)
    assert chart and "logarithmic" in chart and "nan" not in chart and chart.count("<circle") == 2
    assert 'aria-label="a &#34;b&#34;"' in chart
    assert (
        line_chart([Line(name="a", xs=[1], ys=[float("inf")], css="c0")], title="", x_label="")
        is None
    )
    dot = Line(name="a", xs=[7], ys=[0.5], css="c0", dots=True)
    single = line_chart([dot], title="", x_label="", allow_log=True)
    assert single and "<circle" in single


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as chrome:
        yield chrome


@pytest.fixture(scope="module")
def small_report(tmp_path_factory) -> Path:
    return SmallRun(tmp_path_factory.mktemp("runs") / "small").report()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(browser, small_report, width, scheme):
    show_at(browser, width=width, scheme=scheme)
    browser.get(small_report.as_uri())
    assert browser.get_log("browser") == []
    scroll_width, inner_width = browser.execute_script(
        "return [document.documentElement.scrollWidth, window.innerWidth]"
    )
    assert inner_width == width and scroll_width <= inner_width
    images = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.width])"
    )
    assert len(images) > 90 and all(
        done and natural > 0 and shown > 30 for done, natural, shown in images
    )
    # What is cut off says so, and the names of rows stay where they are.
    browser.execute_async_script(OPEN)
    cut = browser.execute_script(CUT)
    assert cut and all(hint == (wide > shown) for wide, shown, hint, _ in cut), cut
    assert any(hint for *_, hint, _ in cut) == (width < 500)
    assert all(abs(moved) < 2 for *_, moved in cut)
    assert (
        browser.execute_script(
            "return performance.getEntriesByType('resource')"
            ".filter(e => !e.name.startsWith('data:')).length"
        )
        == 0
    )
    # Small text stands out from what is behind it (WCAG AA: 4.5), in both schemes.
    ratios = browser.execute_script(CONTRAST)
    assert ratios and min(ratios.values()) >= 4.5, ratios


OPEN = """
for (const e of document.querySelectorAll('details')) e.open = true;
requestAnimationFrame(() => requestAnimationFrame(arguments[0]));
"""

CUT = """
return [...document.querySelectorAll('.scroll')].map(e => {
  const hint = parseFloat(getComputedStyle(e, '::after').height) > 0, head = e.querySelector('tbody th');
  const [wide, shown, before] = [e.scrollWidth, e.clientWidth, head.getBoundingClientRect().left];
  e.scrollLeft = 60;
  const moved = head.getBoundingClientRect().left - before;
  e.scrollLeft = 0;
  return [wide, shown, hint, moved]; });
"""

CONTRAST = """
const channel = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number);
  return .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b); };
const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (c !== 'rgba(0, 0, 0, 0)') return c; } return 'rgb(255, 255, 255)'; };
const result = {};
for (const kind of ['body', '.soft', '.note', '.eyebrow', '.badge', 'td', 'tr.control td', 'tr.main td', 'dt',
                    'svg text', 'svg .name.c0', 'svg .name.c1', '.shot.right b', '.shot.wrong b',
                    '.shot span', 'td small', '.key li', '.key b', 'footer']) {
  const e = document.querySelector(kind);
  const style = getComputedStyle(e);
  const [a, b] = [light(e instanceof SVGElement ? style.fill : style.color), light(behind(e))];
  result[kind] = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
}
return result;
"""
