"""`namr reproduce --track features`: losses × ways of training × seeds on heads over frozen
features.

Each run leaves a folder of the same kind as those of the track on images, without a network:
cell.json (what it is), config.json, metrics.json, classes.json. The same command resumes after
whatever ended it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from namr_dist import verified_json
from namr_dist.atomic import write_atomic
from namr_dist.config import Config
from namr_dist.errors import InputError
from namr_dist.provenance import provenance
from namr_dist.reproduce.cells import ALONE, CELL, RANKING, CellName, is_complete
from namr_dist.reproduce.heads import Features, Trained, Training, embed_once, train_heads
from namr_dist.results.redact import shareable
from namr_dist.retrieval.evaluate import evaluate
from namr_dist.run.folder import RunFolder
from namr_dist.terminal import say_above, transient_bar
from namr_dist.text import duration, say
from namr_dist.train.checkpoints.resume import check_same
from namr_dist.train.start import write_config

STEPS = 1000
SHORT_STEPS = 40
VIEWS, SHORT_VIEWS = 8, 1
"""augmented views of each training image"""
FEATURES = "features.safetensors"
SPREAD_PENALTY = 0.3
LOWER_RATE = 0.3
"""times the learning rate"""
EARLY_STOP = 0.3
"""times the steps"""

Settings = tuple[Config, Training]


def _ranking(config: Config) -> Settings:
    return config, Training()


def _alone(config: Config) -> Settings:
    ranking = replace(config.loss.ranking, weight=0.0)
    return replace(config, loss=replace(config.loss, ranking=ranking)), Training()


def _lower_rate(config: Config) -> Settings:
    config, training = _alone(config)
    return replace(
        config, optim=replace(config.optim, head_lr=LOWER_RATE * config.optim.head_lr)
    ), training


def _early_stop(config: Config) -> Settings:
    config, training = _alone(config)
    steps = config.optim.steps
    return config, replace(training, stops=(steps // 10, round(EARLY_STOP * steps), steps))


def _variance(config: Config) -> Settings:
    config, training = _alone(config)
    return config, replace(training, spread_penalty=SPREAD_PENALTY)


def _one_centre(config: Config) -> Settings:
    # With φ = 1 all centres lie at the mean distance.
    ranking = replace(config.loss.ranking, floor=1.0)
    return replace(config, loss=replace(config.loss, ranking=ranking)), Training(
        weights_of_one=True
    )


VARIANTS: dict[str, Callable[[Config], Settings]] = {
    ALONE: _alone,
    RANKING: _ranking,
    "lower_rate": _lower_rate,
    "early_stop": _early_stop,
    "variance": _variance,
    "one_centre": _one_centre,
}
"""The loss alone, with multi-cluster ranking, and with the simplest things that could do the same:
a learning rate of 0.3 times; the best of a tenth, three tenths and all of the steps, by MAP@R on
validation; a penalty on the squared coefficient of variation of the distances; a single centre at
the mean distance with s = 1."""


RIVALS = tuple(name for name in VARIANTS if name not in (ALONE, RANKING))


def _folder_name(cell: CellName) -> str:
    """A colon would be a host's to scp and rsync."""
    return f"{cell.loss.replace(':', '.')}-{cell.variant}-{cell.seed}"


def _settings(cell: CellName, base: Config) -> Settings:
    config = replace(
        base,
        loss=replace(base.loss, metric=cell.loss),
        train=replace(base.train, seed=cell.seed),
    )
    return VARIANTS[cell.variant](config)


def reproduce_features(
    base: Config,
    folder: Path,
    *,
    losses: Sequence[str],
    seeds: Sequence[int],
    variants: Sequence[str] = (ALONE, RANKING),
    views: int = VIEWS,
) -> None:
    """Train and measure every cell that is not in `folder` yet, seed by seed, on all cores.

    base: the recipe, with the steps and the ranking loss of this track. variants: names in
    VARIANTS. Prints a line for each cell, and a bar on a terminal. Raises InputError for a cell
    that is there with other settings, and for one that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if RunFolder(folder).config.exists():
        raise InputError(f"{folder} is the folder of one run; give another with --run-dir")
    cells = [
        CellName(loss=loss, variant=variant, seed=seed)
        for seed, loss, variant in itertools.product(seeds, losses, variants)
    ]
    left = []
    for cell in cells:
        run = RunFolder(folder / _folder_name(cell))
        if is_complete(run.path):
            check_same(run.config, Config.load(run.config), _settings(cell, base)[0])
        else:
            left.append(cell)
    say(
        f"{base.recipe} → {folder}: {len(cells)} cells of {base.optim.steps:,} steps on frozen features, "
        f"{len(cells) - len(left)} of them there already",
        file=sys.stderr,
    )
    if not left:
        return
    file = folder / FEATURES
    embed_once(base, file, views=views)
    with _workers(base, file, views) as pool, transient_bar() as bar:
        task = bar.add_task("cells", total=len(left))
        began = {pool.submit(_run, cell, folder): cell for cell in left}
        for number, done in enumerate(as_completed(began), start=1):
            said = _result(done, began[done])
            bar.advance(task)
            say_above(bar, f"{number:>3}/{len(left)}  {_folder_name(began[done]):<32} {said}")


def _result(done: Future[str], cell: CellName) -> str:
    try:
        return done.result()
    except Exception as error:
        raise InputError(f"{_folder_name(cell)} failed: {type(error).__name__}: {error}") from error


_features: Features
_base: Config


@contextlib.contextmanager
def _workers(base: Config, file: Path, views: int) -> Iterator[ProcessPoolExecutor]:
    # A process a core with a thread each: heads are too small to be worth more.
    count = len(os.sched_getaffinity(0))
    pool = ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(base, file, views),
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(base: Config, file: Path, views: int) -> None:
    global _features, _base
    torch.set_num_threads(1)
    _features, _base = embed_once(base, file, views=views), base


def _run(cell: CellName, folder: Path) -> str:
    """Train and measure a cell; a line for people."""
    began = time.monotonic()
    config, training = _settings(cell, _base)
    trained = train_heads(_features, config, training)
    run = RunFolder(folder / _folder_name(cell))
    run.path.mkdir(exist_ok=True)
    metrics, by_class = measure(trained, _features, config)
    write_config(run, config)
    write_atomic(
        run.path / CELL,
        json.dumps(dataclasses.asdict(cell)) + "\n",
    )
    write_atomic(run.classes, verified_json.dumps(by_class))
    write_atomic(run.metrics, verified_json.dumps(metrics, indent=2))
    test = metrics["test"]
    return f"{duration(time.monotonic() - began)}  " + "  ".join(
        f"{row} R@1 {test[row]['R@1']:.1f} MAP@R {test[row]['MAP@R']:.1f}"
        for row in ("sample", "structure")
    )


def measure(
    trained: Trained, features: Features, config: Config
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics.json, classes.json) of the test split."""
    index = features.test[1]
    measured = evaluate(
        trained.z["test"],
        None,
        index.label_N,
        delta=config.model.delta,
        ks=config.evaluation.recall_at,
        seed=config.train.seed,
        bonus_N=trained.centres.bonus(trained.rho["test"]),
        distance=config.distance,
        roles_N=index.role_N,
        clustering=False,
    )
    by_class = measured.pop("test_classes")
    manifest, images = features.training_set.manifest, features.training_set.index
    protocol = {
        "track": "heads on frozen features",
        "data set": manifest.name,
        "train images": f"{len(images)} of {features.training_set.classes} classes",
        "train hash": manifest.hash_of(images),
        "test split": config.data.test_split,
        "test hash": manifest.split_hash(config.data.test_split),
        "backbone": config.model.backbone,
        "views": len(features.views_VNF),
        "steps": trained.step,
        "distance": config.distance,
        "settings": shareable(json.loads(config.to_json())),
    }
    fitted = trained.fitted.record
    return {**measured, "structure": fitted, "protocol": protocol, **provenance()}, by_class
