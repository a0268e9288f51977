"""Cells as evaluation leaves them, without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from namr_dist.config import Config, LossConfig, RankingConfig, TrainConfig

CLASSES = 30
FIGURES = ("R@1", "MAP@R")
ROWS = ("sample", "structure", "structure_shuffled")
QUERIES = np.random.default_rng(5).integers(1, 9, CLASSES)


def write_cell(
    folder: Path,
    *,
    loss: str = "triplet",
    variant: str = "alone",
    seed: int = 0,
    rows: Mapping[str, np.ndarray] | None = None,
    named: bool = True,
    queries: np.ndarray = QUERIES,
    test_hash: str = "one",
) -> Path:
    """rows: (2, C) figures of each class; without any, drawn. named: by a cell.json, and not by its
    configuration."""
    rng = np.random.default_rng([seed, len(variant), len(loss)])
    rows = rows or {row: rng.uniform(20, 90, (2, len(queries))) for row in ROWS}
    folder.mkdir(parents=True)
    ranking = RankingConfig(weight=0.0 if variant == "alone" else 2.0)
    config = Config(
        recipe="homeware",
        loss=LossConfig(metric=loss, ranking=ranking),  # type: ignore[arg-type]
        train=TrainConfig(seed=seed),
    )
    (folder / "config.json").write_text("{}" if named else config.to_json())
    if named:
        name = {"loss": loss, "variant": variant, "seed": seed}
        (folder / "cell.json").write_text(json.dumps(name))
    test: dict[str, Any] = {
        row: dict(zip(FIGURES, (values @ queries / queries.sum()).tolist(), strict=True))
        for row, values in rows.items()
    }
    test["calibrated"] = {"R@1": 1.0}  # of no interest, and not by class
    protocol = {"test hash": test_hash, "data set": "shop", "steps": 450}
    (folder / "metrics.json").write_text(json.dumps({"test": test, "protocol": protocol}))
    classes = {
        row: dict(zip(FIGURES, values.round(3).tolist(), strict=True))
        for row, values in rows.items()
    }
    labels = {"label": list(range(len(queries))), "queries": queries.tolist()}
    (folder / "classes.json").write_text(json.dumps({**labels, **classes}))
    return folder
