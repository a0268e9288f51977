"""What a finished run left in its folder, read and checked for the report.

Shapes: N test images, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from namr_dist import named_code, verified_json
from namr_dist.config import Config
from namr_dist.data.remote.address import is_command, shown
from namr_dist.data.remote.cache import is_cache
from namr_dist.errors import DamagedFileError, InputError
from namr_dist.results.class_figures import ClassFigures, read_class_figures
from namr_dist.retrieval.arrays import Float64, Int64, as_labels, as_matrix
from namr_dist.retrieval.roles import Division, divide
from namr_dist.run.folder import CLASSES, EMBEDDINGS, METRICS, Evaluation, RunFolder
from namr_dist.run.log import Entry, Log, read_log
from namr_dist.train.checkpoints.verified_file import read_tensors

_EVALUATE_FIRST = "evaluate the run first"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Configuration, log, figures and embeddings of one run."""

    name: str
    config: dict[str, Any]
    steps: list[Entry]
    """lines of training steps"""
    validations: list[Entry]
    """lines with a block "val"; may be empty"""
    metrics: dict[str, Any]
    z_ND: Float64
    labels_N: Int64
    sides: Division
    """who queries and who is searched"""
    classes: ClassFigures | None
    """figures of each class; older evaluations wrote none"""

    @property
    def cosine(self) -> bool:
        """Whether the run is searched by cosine."""
        return block(self.metrics, "test_protocol").get("distance") == "cosine"


def block(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A nested block, empty where it is missing."""
    block = values.get(name)
    return block if isinstance(block, dict) else {}


def number_in(values: Mapping[str, Any], *path: str) -> float | None:
    """A number some blocks down, or None where it is missing or not finite."""
    for name in path[:-1]:
        values = block(values, name)
    value = values.get(path[-1])
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def trained_config(run: Path) -> Config:
    """The configuration that a run was trained with.

    A cache that it names is used where there is one, else this user's own: what a file says is no
    reason to write somewhere. Raises InputError if it cannot be read, or names code that has not
    been allowed: neither is it a reason to import any.
    """
    path = RunFolder(run).config
    config = Config.load(path)
    named_code.check_allowed(config.code_names(), str(path))
    remote = config.data.remote
    if remote.cache is not None and not is_cache(remote.cache):
        remote = replace(remote, cache=None)
    return replace(config, data=replace(config.data, remote=remote))


def run_config(run: Path, shards: str | None = None) -> Config:
    """The same, to read its shard set: at `shards` if that is given.

    Raises InputError also if the shards come from a command, which is no more to be run.
    """
    config, path = trained_config(run), RunFolder(run).config
    if shards is None and config.data.path and is_command(config.data.path):
        raise InputError(
            f"{path} reads its shards by a command ({shown(config.data.path)}); if you "
            "trust it, give it with --shards, or a folder or URL that has the same set"
        )
    return config if shards is None else replace(config, data=replace(config.data, path=shards))


def _object(path: Path, made_by: str) -> dict[str, Any]:
    try:
        return verified_json.loads_object(path.read_bytes(), str(path), made_by)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {made_by}") from None


def _check_figures(metrics: Mapping[str, Any], path: Path) -> None:
    """Raise InputError for rows of figures that are none: what shows them takes them for granted.
    A figure that is no number is shown as missing."""
    again = metrics.get("reidentification") or {}
    for name, rows in (
        ("test", metrics["test"]),
        ("baselines", metrics.get("baselines") or {}),
        ("reidentification", again),
        ("reidentification.modes", again.get("modes") or {} if isinstance(again, dict) else {}),
    ):
        whole = isinstance(rows, dict) and (
            name == "reidentification" or all(isinstance(row, dict) for row in rows.values())
        )
        if not whole:
            raise InputError(
                f"{path}: {name} does not hold figures by name: evaluate the run again"
            )


def training_steps(log: Log) -> list[Entry]:
    """Lines of training steps."""
    return [entry for entry in log.entries if "loss" in entry]


def validations(log: Log) -> list[Entry]:
    """Lines with a block "val"."""
    return [entry for entry in log.entries if isinstance(entry.get("val"), dict)]


def read_metrics(files: Evaluation) -> dict[str, Any]:
    """The figures of an evaluation, checked. Raises InputError where they are missing or none."""
    path = files.path(METRICS)
    metrics = _object(path, _EVALUATE_FIRST)
    if not isinstance(metrics.get("test"), dict) or not isinstance(
        metrics["test"].get("sample"), dict
    ):
        raise InputError(f"{path} has no test.sample: {_EVALUATE_FIRST}")
    _check_figures(metrics, path)
    return metrics


def read_run(run_dir: Path, evaluation: Evaluation | None = None) -> RunRecord:
    """Read a run's folder, and one evaluation; None: that of its trained network on its test
    split. Raises InputError where a file is missing or is not what it should be;
    lines of its log that cannot be read are left out, and their number is told on stderr."""
    run, files = RunFolder(run_dir), evaluation or Evaluation(folder=run_dir)
    config = _object(run.config, "train the run first")
    log = read_log(run.log)
    log.warn()
    metrics = read_metrics(files)
    path = files.path(EMBEDDINGS)
    try:
        tensors, _ = read_tensors(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {_EVALUATE_FIRST}") from None
    except DamagedFileError as error:
        raise InputError(f"{path} cannot be read ({error}): evaluate the run again") from None
    if missing := {"z", "labels"} - tensors.keys():
        raise InputError(f"{path} has no tensor {', '.join(sorted(missing))}: {_EVALUATE_FIRST}")
    z_ND = as_matrix(tensors["z"], f"{path}, z")
    roles = tensors.get("roles")
    by_class = files.path(CLASSES)
    return RunRecord(
        name=run_dir.resolve().name,
        config=config,
        steps=training_steps(log),
        validations=validations(log),
        metrics=metrics,
        z_ND=z_ND,
        labels_N=as_labels(tensors["labels"].numpy(), len(z_ND), f"{path}, labels"),
        sides=divide(None if roles is None else roles.numpy(), len(z_ND), str(path)),
        classes=read_class_figures(by_class, metrics["test"]) if by_class.exists() else None,
    )
