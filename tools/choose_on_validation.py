"""What validation chooses for the structure embedding and the ranking loss: heads on homeware's
frozen features, measured on the validation classes alone.

    python tools/choose_on_validation.py learnt docs/results/choices/learnt.jsonl [--seeds 5]

Writes a line of JSON a run: group, setting, loss, seed, and for each γ R@1 and MAP@R in percent.
Lines that are there already are kept. `learnt` also prints the differences from k-means, and
`ablations` those from the default, paired by seed, with 95 % intervals. No test figure is computed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from namr_dist.config import Config
from namr_dist.losses import registry
from namr_dist.recipes.homeware import homeware
from namr_dist.reproduce.features import STEPS, VIEWS
from namr_dist.reproduce.heads import Features, Training, embed_once, train_heads

Settings = tuple[Config, Training]
PLAIN = "0"


def _with(
    *,
    ranking: dict[str, Any] | None = None,
    structure: dict[str, Any] | None = None,
    views: int = 1,
    steps: int = STEPS,
    **training: Any,
) -> Settings:
    config = homeware()
    settings = {"rise_passes": 0.0, **(ranking or {})}
    loss = replace(config.loss, ranking=replace(config.loss.ranking, **settings))
    config = replace(
        config,
        loss=loss,
        structure=replace(config.structure, **(structure or {})),
        data=replace(config.data, views=views),
        optim=replace(config.optim, steps=steps),
    )
    return config, Training(**training)


def _learnt(objective: str, **settings: Any) -> dict[str, Any]:
    return {"form": "learnt", "objective": objective, **settings}


ALONE = {"weight": 0.0}
GROUPS: dict[str, dict[str, Settings]] = {
    "ranking": {
        "alone": _with(ranking=ALONE),
        "scaled": _with(),
        "unit": _with(ranking={"geometry": "unit"}),
        "unit, rising over 20 passes": _with(ranking={"geometry": "unit", "rise_passes": 20.0}),
        "scaled, rising over 20 passes": _with(ranking={"rise_passes": 20.0}),
        "scaled, λ = 4": _with(ranking={"weight": 4.0}),
    },
    "ablations": {
        "default": _with(),
        "M = 3": _with(ranking={"clusters": 3}),
        "M = 4": _with(ranking={"clusters": 4}),
        "M = 1": _with(ranking={"floor": 1.0}),
        "s = 1": _with(weights_of_one=True),
        "a = 5": _with(ranking={"sharpness": 5.0}),
        "t = 2": _with(ranking={"spread": 2.0}),
        "of an anchor": _with(ranking={"statistics": "anchor"}),
    },
    "centres": {
        f"M = {centres}, k = {nearest}": _with(structure={"centres": centres, "nearest": nearest})
        for centres in (64, 128, 256, 495)
        for nearest in (1, 5, 10, 20)
    },
    "rivals": {
        f"variance penalty {penalty:g}": _with(ranking=ALONE, spread_penalty=penalty)
        for penalty in (0.3, 1.0, 3.0)
    },
    "learnt": {
        "centres": _with(),
        "soft k-means": _with(structure=_learnt("soft_k_means")),
        "soft k-means, pull 0.1": _with(structure=_learnt("soft_k_means", pull=0.1)),
        "ranking": _with(structure=_learnt("ranking")),
        "ranking, pull 0.1": _with(structure=_learnt("ranking", pull=0.1)),
        "centres, two views": _with(views=2),
        "views": _with(structure=_learnt("views"), views=2),
        "views, pull 0.1": _with(structure=_learnt("views", pull=0.1), views=2),
    },
}
REFERENCE = {
    "learnt": {
        setting: "centres, two views" if setting.startswith("views") else "centres"
        for setting in GROUPS["learnt"]
        if not setting.startswith("centres")
    },
    "ablations": {setting: "default" for setting in GROUPS["ablations"] if setting != "default"},
}
"""What each setting is compared with."""

_features: Features


def _begin(file: Path) -> None:
    global _features
    torch.set_num_threads(1)
    _features = embed_once(homeware(), file, views=VIEWS)


def _run(group: str, setting: str, loss: str, seed: int) -> dict[str, Any]:
    config, training = GROUPS[group][setting]
    config = replace(
        config,
        loss=replace(config.loss, metric=loss),
        train=replace(config.train, seed=seed),
    )
    fitted = train_heads(_features, config, training).fitted
    return {
        "group": group,
        "setting": setting,
        "loss": loss,
        "seed": seed,
        "gamma": fitted.gamma,
        "validation": {
            f"{gamma:g}": {name: round(figures[name], 3) for name in ("R@1", "MAP@R")}
            for gamma, figures in fitted.figures.items()
        },
    }


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def _best(line: dict[str, Any], name: str) -> float:
    """With ρ at the run's own γ."""
    return float(line["validation"][f"{line['gamma']:g}"][name])


def differences(lines: list[dict[str, Any]], group: str) -> Iterator[str]:
    """What a setting adds to that which it is compared with, one line per loss and setting."""
    by_run = {(line["setting"], line["loss"], line["seed"]): line for line in lines}
    for setting, reference in REFERENCE[group].items():
        for loss in registry.NAMES:
            cells = []
            for name in ("R@1", "MAP@R"):
                changes = [
                    _best(line, name) - _best(by_run[reference, loss, seed], name)
                    for (own, of, seed), line in sorted(by_run.items())
                    if own == setting and of == loss and (reference, loss, seed) in by_run
                ]
                if not changes:
                    continue
                half = stats.t.ppf(0.975, len(changes) - 1) * stats.sem(changes)
                interval = f" ± {half:.2f}" if len(changes) > 1 else ""
                cells.append(f"{np.mean(changes):+.2f}{interval}")
            if cells:
                yield f"| {setting} | {loss} | {len(changes)} | {' | '.join(cells)} |"


def main() -> None:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--features", type=Path, default=Path("runs/features.safetensors"))
    parser.add_argument("--losses", nargs="+", default=registry.NAMES)
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args()
    there = {(line["setting"], line["loss"], line["seed"]) for line in _lines(asked.out)}
    left = [
        (setting, loss, seed)
        for seed, loss, setting in itertools.product(
            range(asked.seeds), asked.losses, GROUPS[asked.group]
        )
        if (setting, loss, seed) not in there
    ]
    asked.features.parent.mkdir(parents=True, exist_ok=True)
    embed_once(homeware(), asked.features, views=VIEWS)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(
        len(os.sched_getaffinity(0)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(asked.features,),
    )
    with pool, asked.out.open("a", encoding="utf-8") as file:
        for done in as_completed([pool.submit(_run, asked.group, *one) for one in left]):
            print(json.dumps(done.result(), ensure_ascii=False), file=file, flush=True)
    if asked.group in REFERENCE:
        print("\n".join(differences(_lines(asked.out), asked.group)))


if __name__ == "__main__":
    main()
