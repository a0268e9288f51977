"""What the report says of a run in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from namr_dist.losses import registry
from namr_dist.named_code import is_named_code
from namr_dist.results.record import RunRecord, block, number_in
from namr_dist.results.tables import baseline_rows, columns, mode_rows
from namr_dist.retrieval.arrays import Int64
from namr_dist.retrieval.evaluate import evaluate_sample
from namr_dist.retrieval.intervals import LEVEL
from namr_dist.retrieval.modes import SAMPLE, STRUCTURE, SYMMETRIC, row_name
from namr_dist.text import duration

_BACKBONES = {"efficientnet_lite0": "EfficientNet-Lite0", "conv4": "a small four-layer network"}

_VALIDATION_DRAWS = 10
_MOST_SEARCHED = 10_000
"""images for such a draw: seconds"""


def facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Counts of the run, by name."""
    train = block(run.metrics, "train")
    if run.sides.leave_one_out:
        yield "test images", f"{len(run.labels_N):,}"
    else:
        yield "test queries", f"{len(run.sides.query_Q):,}"
        yield "images searched", f"{len(run.sides.item_G):,}"
    yield "test classes", f"{len(set(run.labels_N.tolist())):,}"
    yield "embedding width", f"{run.z_ND.shape[1]:,}"
    if (steps := number_in(train, "steps")) is not None:
        yield "training steps", f"{steps:,.0f}"
    if (seconds := number_in(train, "seconds")) is not None:
        yield "training time", duration(seconds)
    if (speed := number_in(train, "img_per_s")) is not None:
        yield "images a second", f"{speed:,.0f}"


def summary(run: RunRecord) -> Iterator[str]:
    """What was trained, how well it finds, and whether the structure embedding helps, as
    sentences."""
    yield _what_was_trained(run)
    name = first_cut_off(run.metrics)
    recall = number_in(run.metrics, "test", "sample", name)
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
    rivals = [(row.name, number_in(row.figures, name)) for row in baseline_rows(run.metrics)]
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
    yield from _structure_verdict(run, name, recall)


def first_cut_off(metrics: Mapping[str, Any]) -> str:
    """The R@k of the smallest k that was measured."""
    return next(iter(columns(mode_rows(metrics)[:1])), "R@1")


def _what_was_trained(run: RunRecord) -> str:
    model, loss = block(run.config, "model"), block(run.config, "loss")
    backbone = str(model.get("backbone") or "a network")
    if is_named_code(backbone):
        backbone = f"the network {backbone}"
    backbone = _BACKBONES.get(backbone, backbone.removeprefix("timm:"))
    text = backbone[0].upper() + backbone[1:] + " was trained"
    train = block(run.metrics, "train")
    if steps := number_in(train, "steps"):
        text += f" for {steps:,.0f} steps"
    if seconds := number_in(train, "seconds"):
        text += f" ({duration(seconds)})"
    if data := block(run.metrics, "protocol").get("data set"):
        text += f" on {data}"
    if metric := loss.get("metric"):
        text += f" with the {registry.title(str(metric))}"
        weight, clusters = (
            number_in(loss, "ranking", "weight"),
            number_in(loss, "ranking", "clusters"),
        )
        if weight:
            detail = f"λ = {weight:g}" + (f", M = {clusters:g}" if clusters else "")
            if rise := number_in(loss, "ranking", "rise_passes"):
                detail += f", rising over {rise:g} passes"
            text += f" and multi-cluster ranking ({detail})"
        elif weight == 0:
            text += " alone, without multi-cluster ranking"
    return text + "."


def _structure_verdict(run: RunRecord, name: str, recall: float) -> Iterator[str]:
    """Whether the structure embedding beats both its controls, by more than other test classes
    would move the difference."""
    queries = number_in(run.metrics, "test_counts", "queries")
    from_centres = STRUCTURE.name in block(run.metrics, "test")
    rows = (
        (STRUCTURE.name, SAMPLE.name, row_name(STRUCTURE.name, "shuffled"))
        if from_centres
        else tuple(row_name(SYMMETRIC.name, control) for control in ("", *SYMMETRIC.controls))
    )
    learnt, ones, shuffled = (number_in(run.metrics, "test", row, name) for row in rows)
    if learnt is None or ones is None or shuffled is None or not queries:
        return
    gain = learnt - max(ones, shuffled)
    better = rows[1] if ones >= shuffled else rows[2]
    if ends := run.classes and run.classes.difference(rows[0], better, name):
        low, high = ends
        chance = (
            f"{gain:+.1f} points to the better of them ({100 * LEVEL:g} % over test classes: {low:+.1f} to "
            f"{high:+.1f})"
        )
    else:
        # Without figures of each class, as if queries were drawn one by one.
        error = math.sqrt(max(recall * (100 - recall), 0) / queries)
        low, high = gain - 2 * error, gain + 2 * error
        chance = f"with a standard error of {error:.1f} points"
    if low > 0:
        verdict = "it helps the search"
    elif high < 0:
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
        f"{shuffled:.1f} % with that of another image; {chance}, {verdict}."
    )


def validation_note(run: RunRecord, classes: int | None, *, seed: int) -> str | None:
    """Why the figures of validation, on so many classes, and of the test lie apart: the same figure
    for as many of the test classes at a time. None where one of the numbers is not known."""
    name = first_cut_off(run.metrics)
    tested = number_in(run.metrics, "test", SAMPLE.name, name)
    validated = number_in(run.validations[-1], "val", name) if run.validations else None
    labels_C = np.unique(run.labels_N)
    if not classes or tested is None or validated is None:
        return None
    text = (
        f"{name} ends at {validated:.1f} % on the validation classes and is {tested:.1f} % on the "
        f"test classes. A query has {classes - 1:,} other classes to be taken for in validation, "
        f"{len(labels_C) - 1:,} in the test"
    )
    if classes >= len(labels_C):
        return f"{text}; compare figures of the same classes alone."
    if (fewer := _among_fewer(run, labels_C, classes, name, seed=seed)) is None:
        return f"{text}: fewer classes to confuse read higher."
    return (
        f"{text}: among {classes:,} test classes at a time (mean of {_VALIDATION_DRAWS} random "
        f"draws) the same network has {fewer:.1f} %."
    )


def _among_fewer(
    run: RunRecord, labels_C: Int64, classes: int, name: str, *, seed: int
) -> float | None:
    """R@k where so many random test classes are all there is; None where images have roles, or
    where that would take long."""
    share = classes / len(labels_C)
    if not run.sides.leave_one_out or share * len(run.labels_N) > _MOST_SEARCHED:
        return None
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(_VALIDATION_DRAWS):
        inside_N = np.isin(run.labels_N, rng.choice(labels_C, classes, replace=False))
        figures = evaluate_sample(
            run.z_ND[inside_N],
            run.labels_N[inside_N],
            ks=(int(name[2:]),),
            distance="cosine" if run.cosine else "euclidean",
        )
        found.append(figures[name])
    mean = float(np.mean(found))
    return mean if math.isfinite(mean) else None
