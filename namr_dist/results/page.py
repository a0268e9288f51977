"""report.html of a run: one self-contained page with figures, charts and example searches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from namr_dist.atomic import write_atomic
from namr_dist.errors import InputError
from namr_dist.losses import registry
from namr_dist.named_code import is_named_code
from namr_dist.results.charts import Line, line_chart, smoothed, thinned
from namr_dist.results.examples import NEIGHBOURS, embedding_map, neighbour_examples
from namr_dist.results.record import RunRecord, read_run
from namr_dist.results.redact import shareable
from namr_dist.results.tables import (
    baseline_rows,
    columns,
    mean_and_deviation,
    mode_rows,
    number,
    reidentification_rows,
)
from namr_dist.retrieval.modes import SAMPLE, STRUCTURE, SYMMETRIC, row_name
from namr_dist.retrieval.reidentification import METRICS
from namr_dist.run.folder import Evaluation, RunFolder
from namr_dist.text import duration, printable

_BACKBONES = {"efficientnet_lite0": "EfficientNet-Lite0", "conv4": "a small four-layer network"}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure of the page with its heading and the one thing to know about it."""

    heading: str
    note: str
    svg: Markup


def write_report(
    run_dir: Path,
    load_jpeg: Callable[[int], bytes],
    names: Sequence[str],
    categories: Sequence[str],
    *,
    evaluation: Evaluation | None = None,
    page: Path | None = None,
) -> Path:
    """Write RUN/report.html and return its path.

    run_dir holds config.json, metrics.jsonl, metrics.json and embeddings.safetensors (z (N, D),
    labels (N,) and, where images have roles, roles (N,)). evaluation: where the last two are
    instead. page: what is written instead. load_jpeg gives the image file of an
    index in the embeddings' order; names and categories (N each; "" for none) its class and
    super-category.
    The page needs no network: charts are inline SVG, images data URIs. It replaces an older one
    atomically. Choices at random (examples, map) follow the run's seed.
    Raises InputError where a file is missing or damaged, or the lengths differ.
    """
    run = read_run(run_dir, evaluation)
    for what, values in (("names", names), ("categories", categories)):
        if len(values) != len(run.z_ND):
            raise InputError(
                f"{len(values)} {what} for {len(run.z_ND)} embeddings in {run_dir}: the data set is not "
                "the one that was evaluated; evaluate the run again"
            )
    names, categories = [printable(name) for name in names], [printable(one) for one in categories]
    seed = _number_in(run.config, "train", "seed")
    seed = 0 if seed is None else int(seed) % 2**32
    cosine = _block(run.metrics, "test_protocol").get("distance") == "cosine"
    right, wrong = neighbour_examples(
        run.z_ND, run.labels_N, run.sides, load_jpeg, names, cosine=cosine, seed=seed
    )
    measurement = _block(run.metrics, "test_counts") | _block(run.metrics, "test_protocol")
    rows, trained = baseline_rows(run.metrics), mode_rows(run.metrics)
    result_columns = columns([*rows, trained[0]])
    text = template("report.html").render(
        title=run.name,
        recipe=str(run.config.get("recipe") or ""),
        headline=_first_cut_off(run.metrics),
        summary=list(_summary(run)),
        facts=list(_facts(run)),
        bars=[(row.name, row.figures, False) for row in rows]
        + [("trained", trained[0].figures, True)],
        result_columns=result_columns,
        mode_columns=columns(trained),
        modes=trained,
        again=_block(run.metrics, "reidentification"),
        again_columns=METRICS,
        again_rows=[
            (row, [mean_and_deviation(row, name) for name in METRICS])
            for row in reidentification_rows(run.metrics)
        ],
        leave_one_out=run.sides.leave_one_out,
        certificate=_block(run.metrics, "test_counts").get("rerank_certified_percent"),
        clustering={name: run.metrics["test"]["sample"].get(name) for name in ("NMI", "AMI")},
        has_structure=any(row.control for row in trained),
        charts=list(_charts(run)),
        examples=[("First neighbour right", right), ("First neighbour wrong", wrong)],
        neighbours=NEIGHBOURS,
        map=embedding_map(run.z_ND, names, categories, seed=seed),
        protocol=[
            ("Protocol", list(_flat(_block(run.metrics, "protocol")))),
            ("Measurement", list(_flat(measurement))),
        ],
        config=json.dumps(shareable(run.config), indent=2, ensure_ascii=False).split("\n"),
    )
    path = page or RunFolder(run_dir).report
    write_atomic(path, text)
    return path


def template(name: str) -> Template:
    """The template of a page. Text that is put into it is escaped; a name it is not given is an
    error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template(name)


def _shown(value: Any) -> Any:
    """What a template puts into the page for a value: texts without characters that nothing shows,
    or that turn the direction of reading."""
    return printable(value) if type(value) is str else value


def _block(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A nested block, empty where it is missing."""
    block = values.get(name)
    return block if isinstance(block, dict) else {}


def _number_in(values: Mapping[str, Any], *path: str) -> float | None:
    """A number some blocks down, or None where it is missing or not finite."""
    for name in path[:-1]:
        values = _block(values, name)
    value = values.get(path[-1])
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            yield from _flat(value, f"{label}, ")
        elif isinstance(value, list):
            yield label, ", ".join(map(str, value)) or "–"
        else:
            yield label, f"{value:,.4g}" if isinstance(value, float) else str(value)


def _facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    train = _block(run.metrics, "train")
    if run.sides.leave_one_out:
        yield "test images", f"{len(run.labels_N):,}"
    else:
        yield "test queries", f"{len(run.sides.query_Q):,}"
        yield "images searched", f"{len(run.sides.item_G):,}"
    yield "test classes", f"{len(set(run.labels_N.tolist())):,}"
    yield "embedding width", f"{run.z_ND.shape[1]:,}"
    if (steps := _number_in(train, "steps")) is not None:
        yield "training steps", f"{steps:,.0f}"
    if (seconds := _number_in(train, "seconds")) is not None:
        yield "training time", duration(seconds)
    if (speed := _number_in(train, "img_per_s")) is not None:
        yield "images a second", f"{speed:,.0f}"


def _summary(run: RunRecord) -> Iterator[str]:
    """What was trained, how well it finds, and whether the structure embedding helps, as
    sentences."""
    yield _what_was_trained(run)
    name = _first_cut_off(run.metrics)
    recall = _number_in(run.metrics, "test", "sample", name)
    if recall is None:
        return
    sides = run.sides
    searched = (
        "Each test image then searched all the others"
        if sides.leave_one_out
        else f"Each of {len(sides.query_Q):,} test images then searched a gallery of {len(sides.item_G):,}"
    )
    hit = "The nearest image was" if name == "R@1" else f"One of the {name[2:]} nearest images was"
    text = (
        f"{searched}. None of their classes had been trained on. "
        f"{hit} of the same class for {recall:.1f} % of them ({name})"
    )
    rivals = [(row.name, _number_in(row.figures, name)) for row in baseline_rows(run.metrics)]
    known = [
        f"{value:.1f} % "
        + ("by comparing raw pixels" if rival == "raw pixels" else f"with the {rival}")
        for rival, value in rivals
        if value is not None
    ]
    if known:
        text += (
            ", against " + (", ".join(known[:-1]) + " and " if len(known) > 1 else "") + known[-1]
        )
    yield text + "."
    yield from _structure_verdict(run.metrics, name, recall)


def _first_cut_off(metrics: Mapping[str, Any]) -> str:
    """The R@k of the smallest k that was measured."""
    return next(iter(columns(mode_rows(metrics)[:1])), "R@1")


def _what_was_trained(run: RunRecord) -> str:
    model, loss = _block(run.config, "model"), _block(run.config, "loss")
    backbone = str(model.get("backbone") or "a network")
    if is_named_code(backbone):
        backbone = f"the network {backbone}"
    backbone = _BACKBONES.get(backbone, backbone.removeprefix("timm:"))
    text = backbone[0].upper() + backbone[1:] + " was trained"
    train = _block(run.metrics, "train")
    if steps := _number_in(train, "steps"):
        text += f" for {steps:,.0f} steps"
    if seconds := _number_in(train, "seconds"):
        text += f" ({duration(seconds)})"
    if data := _block(run.metrics, "protocol").get("data set"):
        text += f" on {data}"
    if metric := loss.get("metric"):
        text += f" with the {registry.title(str(metric))}"
        weight, clusters = (
            _number_in(loss, "ranking", "weight"),
            _number_in(loss, "ranking", "clusters"),
        )
        if weight:
            detail = f"λ = {weight:g}" + (f", M = {clusters:g}" if clusters else "")
            text += f" and multi-cluster ranking ({detail})"
        elif weight == 0:
            text += " alone, without multi-cluster ranking"
    return text + "."


def _structure_verdict(metrics: Mapping[str, Any], name: str, recall: float) -> Iterator[str]:
    queries = _number_in(metrics, "test_counts", "queries")
    from_centres = STRUCTURE.name in _block(metrics, "test")
    rows = (
        (STRUCTURE.name, SAMPLE.name, row_name(STRUCTURE.name, "shuffled"))
        if from_centres
        else tuple(row_name(SYMMETRIC.name, control) for control in ("", *SYMMETRIC.controls))
    )
    learnt, ones, shuffled = (_number_in(metrics, "test", row, name) for row in rows)
    if learnt is None or ones is None or shuffled is None or not queries:
        return
    error = math.sqrt(max(recall * (100 - recall), 0) / queries)
    gain = learnt - max(ones, shuffled)
    if gain > 2 * error:
        verdict = "it helps the search"
    elif gain < -2 * error:
        verdict = "it harms the search"
    else:
        verdict = "the difference is within chance"
    how = (
        "Searching with the structure embedding as well, which tells how far an item lies from the "
        "nearest cluster centres,"
        if from_centres
        else "Searching with the structure weights of both images (the symmetric distance)"
    )
    yield (
        f"{how} finds {learnt:.1f} %. The controls find {ones:.1f} % without it (s = 1) and "
        f"{shuffled:.1f} % with that of another image; with a standard error of {error:.1f} points, {verdict}."
    )


def _charts(run: RunRecord) -> Iterator[Chart]:
    steps = [float(entry["step"]) for entry in run.steps]
    panels = [
        ("metric_loss", "Metric loss", "c0"),
        ("ranking_loss", "Multi-cluster ranking loss", "c1"),
        ("structure_loss", "Loss of the learnt centres", "c2"),
    ]
    if not any(key in entry for entry in run.steps for key, _, _ in panels):
        panels = [("loss", "Training loss", "c0")]
    for key, heading, css in panels:
        ys = [_number_in(entry, key) for entry in run.steps]
        values = [math.nan if y is None else y for y in ys]
        lines = [
            Line(name="each step", xs=thinned(steps), ys=thinned(values), css=f"{css} faint"),
            Line(name="smoothed", xs=thinned(steps), ys=thinned(smoothed(values)), css=css),
        ]
        svg = line_chart(
            lines, title=f"{heading} over training steps", x_label="step", allow_log=True
        )
        if svg is not None:
            note = "Pale: as logged. Strong: moving average. Lower is better."
            yield Chart(heading=heading, note=note, svg=svg)
    curves = []
    for css, name in (("c0", "R@1"), ("c1", "MAP@R")):
        pairs = [
            (float(entry["step"]), _number_in(entry["val"], name)) for entry in run.validations
        ]
        known = [(step, value) for step, value in pairs if value is not None]
        curves.append(
            Line(
                name=name,
                xs=[step for step, _ in known],
                ys=[value for _, value in known],
                css=css,
                dots=True,
                label=True,
            )
        )
    svg = line_chart(
        curves, title="Validation R@1 and MAP@R over training steps, %", x_label="step"
    )
    if svg is not None:
        note = "On classes that were not trained on. Higher is better."
        yield Chart(heading="Validation, %", note=note, svg=svg)
