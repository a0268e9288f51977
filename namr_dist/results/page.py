"""report.html of a run: one self-contained page with figures, charts and example searches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from namr_dist.atomic import write_atomic
from namr_dist.errors import InputError
from namr_dist.results.class_figures import ROUNDED, ClassFigures, Intervals, is_number
from namr_dist.results.class_tables import FIGURES as CLASS_FIGURES
from namr_dist.results.class_tables import LEAST_CLASSES, category_rows, class_rows
from namr_dist.results.curves import run_charts
from namr_dist.results.embedding_map import embedding_map
from namr_dist.results.examples import Album
from namr_dist.results.record import RunRecord, block, number_in, read_run
from namr_dist.results.redact import shareable
from namr_dist.results.searches import (
    NEIGHBOURS,
    Searches,
    sample_figures,
    search_all,
    taken_for,
)
from namr_dist.results.summary import facts, first_cut_off, summary, validation_note
from namr_dist.results.tables import (
    baseline_rows,
    columns,
    mean_and_deviation,
    mode_rows,
    number,
    reidentification_rows,
)
from namr_dist.retrieval.intervals import DRAWS, LEVEL
from namr_dist.retrieval.modes import SAMPLE
from namr_dist.retrieval.reidentification import METRICS
from namr_dist.run.folder import Evaluation, RunFolder
from namr_dist.text import printable

_MOST_CLASSES = 500
"""of the table of classes: a page with more is slow"""


def write_report(
    run_dir: Path,
    load_jpeg: Callable[[int], bytes],
    names: Sequence[str],
    categories: Sequence[str],
    *,
    evaluation: Evaluation | None = None,
    page: Path | None = None,
    validation_classes: int | None = None,
) -> Path:
    """Write RUN/report.html and return its path.

    run_dir holds config.json, metrics.jsonl, metrics.json, embeddings.safetensors (z (N, D), labels
    (N,) and, where images have roles, roles (N,)) and classes.json, which may be missing: figures
    without values of each class have no interval. evaluation: where the last three are instead.
    page: what is written instead. load_jpeg gives the image file of an index in the embeddings'
    order; names and categories (N each; "" for none) its class and super-category.
    validation_classes: how many classes training was validated on, if that is known.
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
    seed = number_in(run.config, "train", "seed")
    seed = 0 if seed is None else int(seed) % 2**32
    measurement = block(run.metrics, "test_counts") | block(run.metrics, "test_protocol")
    rows, trained = baseline_rows(run.metrics), mode_rows(run.metrics)
    ks = [int(name[2:]) for name in columns(trained[:1]) if name.startswith("R@")]
    searches = search_all(run.z_ND, run.labels_N, run.sides, cosine=run.cosine, ks=ks)
    sample = sample_figures(searches, ks)
    album = Album(searches, load_jpeg, names, run.labels_N)
    titles = [album.title(label) for label in run.labels_N.tolist()]
    text = template("report.html").render(
        title=run.name,
        recipe=str(run.config.get("recipe") or ""),
        headline=first_cut_off(run.metrics),
        summary=list(summary(run)),
        facts=list(facts(run)),
        bars=[(row.name, row.figures, "") for row in rows]
        + [("trained", trained[0].figures, trained[0].key)],
        intervals=_intervals(run, sample),
        draws=DRAWS,
        level=f"{100 * LEVEL:g} %",
        result_columns=columns([*rows, trained[0]]),
        mode_columns=columns(trained),
        modes=trained,
        again=block(run.metrics, "reidentification"),
        again_columns=METRICS,
        again_rows=[
            (row, [mean_and_deviation(row, name) for name in METRICS])
            for row in reidentification_rows(run.metrics)
        ],
        leave_one_out=run.sides.leave_one_out,
        certificate=block(run.metrics, "test_counts").get("rerank_certified_percent"),
        clustering={name: run.metrics["test"]["sample"].get(name) for name in ("NMI", "AMI")},
        has_structure=any(row.control for row in trained),
        charts=list(run_charts(run.steps, run.validations)),
        validation=validation_note(run, validation_classes, seed=seed),
        **_of_classes(
            searches, sample, album, dict(zip(run.labels_N.tolist(), categories, strict=True))
        ),
        **_of_pictures(searches, sample, album, seed=seed),
        map=embedding_map(run.z_ND, titles, categories, seed=seed),
        protocol=[
            ("Protocol", list(_flat(block(run.metrics, "protocol")))),
            ("Measurement", list(_flat(measurement))),
        ],
        config=json.dumps(shareable(run.config), indent=2, ensure_ascii=False).split("\n"),
    )
    path = page or RunFolder(run_dir).report
    write_atomic(path, text)
    return path


def _intervals(run: RunRecord, sample: ClassFigures | None) -> Intervals:
    """Of the figures in metrics.json. All those of the sample mode are known for each class, as far
    as the embeddings give the same figures."""
    intervals = run.classes.intervals() if run.classes else {}
    if sample is not None:
        known = run.metrics["test"][SAMPLE.name]
        intervals[SAMPLE.name] = intervals.get(SAMPLE.name, {}) | {
            name: ends
            for name, ends in sample.intervals()[SAMPLE.name].items()
            if is_number(known.get(name))
            and abs(sample.mean(SAMPLE.name, name) - known[name]) <= ROUNDED
        }
    return intervals


def _of_classes(
    searches: Searches, sample: ClassFigures | None, album: Album, category_of: dict[int, str]
) -> dict[str, Any]:
    """The tables of classes and super-classes; empty without any query that has a right answer."""
    if sample is None:
        return {"classes": [], "category_rows": [], "all_classes": 0}
    return {
        "all_classes": len(sample.label_C),
        "classes": class_rows(
            sample, taken_for(searches), album.title, category_of, most=_MOST_CLASSES
        ),
        "category_rows": category_rows(sample, category_of),
        "class_columns": CLASS_FIGURES,
        "least_classes": LEAST_CLASSES,
    }


def _of_pictures(
    searches: Searches, sample: ClassFigures | None, album: Album, *, seed: int
) -> dict[str, Any]:
    right, wrong = album.examples(seed=seed)
    hubs, share = album.hubs()
    return {
        "examples": [("First neighbour right", right), ("First neighbour wrong", wrong)],
        "neighbours": NEIGHBOURS,
        "distance": "1 − cos" if searches.cosine else "Euclidean distance",
        "worst": [] if sample is None else album.worst(sample),
        "confused": album.confused(),
        "hubs": hubs,
        "hub_share": share,
    }


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


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            yield from _flat(value, f"{label}, ")
        elif isinstance(value, list):
            yield label, ", ".join(map(str, value)) or "–"
        else:
            yield label, f"{value:,.4g}" if isinstance(value, float) else str(value)
