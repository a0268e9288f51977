"""Verbs around jobs that train: `namr preflight` before one, `namr top` while it runs, `namr
reproduce` of many."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from namr_dist.config import Config
from namr_dist.errors import InputError
from namr_dist.losses import registry
from namr_dist.recipes.overrides import configure, configure_quietly
from namr_dist.run.folder import REPORT, runs_in
from namr_dist.text import say

_RECIPE = "homeware"
_LONGEST_LIMIT_S = 86_400


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `preflight`, `top` and `reproduce` to the `namr` command."""
    preflight = verbs.add_parser(
        "preflight",
        help="check the nodes of a job before it trains",
        description="Check, with one process a node, whether a recipe can train there: srun --ntasks-per-node=1 namr "
        "preflight RECIPE. Ends within --limit seconds, with exit code 0 or 2 on all nodes.",
    )
    preflight.add_argument(
        "recipe", metavar="RECIPE", help="name of a recipe, with --set… as for namr train"
    )
    preflight.add_argument("--run-dir", type=Path, help="folder of the run (runs/RECIPE)")
    preflight.add_argument(
        "--ranks-per-node",
        type=int,
        metavar="N",
        help="ranks that will train on each node (one a GPU, or one)",
    )
    preflight.add_argument(
        "--limit",
        type=int,
        default=30,
        metavar="SECONDS",
        help="seconds in which all nodes must "
        "have answered, imports included; at least 5 (%(default)s)",
    )
    preflight.set_defaults(verb=_preflight)

    top = verbs.add_parser(
        "top",
        help="watch a run",
        description="Progress, losses, speed and checkpoints of a run, "
        "from any machine that sees its folder; live on a terminal, until it is finished or Ctrl-C.",
    )
    top.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    top.add_argument("--once", action="store_true", help="print it once, also on a terminal")
    top.add_argument("--json", action="store_true", help="print it once, as JSON")
    top.set_defaults(verb=_top)

    reproduce = verbs.add_parser(
        "reproduce",
        help="losses with and without multi-cluster ranking, over seeds, on this machine",
        description="Train and evaluate a grid of networks, each loss with multi-cluster ranking and without, over "
        "seeds, then print what the ranking and the structure embedding add, with intervals over seeds and over test "
        "classes. The same command resumes, and keeps what is done. Of images, --set… goes to all runs, "
        f"and FOLDER/{REPORT} compares them. Exit code 1 if a run failed, 75 if a signal asked for an end.",
    )
    reproduce.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?",
        help=f"name of a recipe ({_RECIPE}, for more steps than its own)",
    )
    reproduce.add_argument(
        "--track",
        choices=("images", "features"),
        default="images",
        help="train whole networks on images, or heads on frozen features (%(default)s)",
    )
    reproduce.add_argument(
        "--losses",
        nargs="+",
        default=registry.NAMES,
        metavar="LOSS",
        help=f"values of loss.metric ({' '.join(registry.NAMES)})",
    )
    reproduce.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="WEIGHT",
        help="of images: weights of multi-cluster ranking, 0 to leave it out and one other (0, and the recipe's own)",
    )
    reproduce.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help="(0 1 2; of features 0 to 9; with --short 0 1)",
    )
    reproduce.add_argument(
        "--rivals",
        nargs="*",
        metavar="RIVAL",
        help="the simplest things that could do what multi-cluster ranking does, too (lower_rate early_stop "
        "one_centre, of features also variance)",
    )
    reproduce.add_argument(
        "--short", action="store_true", help="few steps: shows that all of it works, and no gain"
    )
    reproduce.add_argument(
        "--run-dir",
        type=Path,
        metavar="FOLDER",
        help="folder of the runs (runs/reproduce-RECIPE, of features …-features, with --short …-short)",
    )
    reproduce.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="copy finished cells there, without checkpoints and this machine's folders, to be kept in a repository; "
        "those that are there already count as done",
    )
    reproduce.add_argument(
        "--ranks", type=int, metavar="W", help="of images: ranks of each run (one a GPU, or one)"
    )
    reproduce.add_argument(
        "--dry-run", action="store_true", help="of images: print what would be done, and stop"
    )
    reproduce.add_argument("--json", action="store_true", help="print the gains as JSON")
    reproduce.set_defaults(verb=_reproduce)


def _preflight(parsed: argparse.Namespace, overrides: list[str]) -> None:
    from namr_dist.cluster.deadline import EXIT_CODE, Deadline

    if not 5 <= parsed.limit <= _LONGEST_LIMIT_S:
        raise InputError(
            f"--limit is {parsed.limit}; set it to at least 5 seconds, and at most {_LONGEST_LIMIT_S}"
        )
    # Before torch is imported, which may take long from a slow file system.
    deadline = Deadline(parsed.limit)
    if parsed.ranks_per_node is not None and parsed.ranks_per_node < 1:
        raise InputError(f"--ranks-per-node is {parsed.ranks_per_node}; set it to at least 1")
    config = configure_quietly(parsed.recipe, overrides)
    # One line says what is wrong, and not torch's traces in C++.
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    from namr_dist.cluster.preflight import preflight

    try:
        code = preflight(
            config,
            parsed.run_dir or Path("runs") / parsed.recipe,
            ranks_per_node=parsed.ranks_per_node,
            deadline=deadline,
        )
    except InputError as error:
        say(f"namr: error: {error}", file=sys.stderr)
        code = EXIT_CODE
    sys.stderr.flush()
    os._exit(code)  # a call that hangs has left a thread behind, which the usual end would wait for


def _top(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.run.top import top

    top(parsed.run, once=parsed.once, as_json=parsed.json)


def _reproduce(parsed: argparse.Namespace, overrides: list[str]) -> int:
    if parsed.seeds is None:
        whole = range(10) if parsed.track == "features" else range(3)
        parsed.seeds = [0, 1] if parsed.short else list(whole)
    if parsed.track == "features":
        return _reproduce_features(parsed, overrides)
    return _reproduce_images(parsed, overrides)


def _base(name: str, overrides: list[str]) -> Config:
    """What all cells of a grid share. Raises InputError for settings that each has of its own, and
    where R@1 is not measured."""
    from namr_dist import recipes

    recipe, base = recipes.find(name), configure(name, overrides)
    for option, field, own, given in (
        ("--losses", "loss.metric", recipe.loss.metric, base.loss.metric),
        ("--seeds", "train.seed", recipe.train.seed, base.train.seed),
    ):
        if given != own:
            raise InputError(
                f"--set.{field} is {given}, but each run has its own; give {option} {given}"
            )
    if 1 not in base.evaluation.recall_at:
        given = " ".join(map(str, base.evaluation.recall_at))
        raise InputError(
            f"evaluation.recall_at is {given}, but R@1 is compared; give --set.evaluation.recall_at 1 {given}"
        )
    return base


def _reproduce_features(parsed: argparse.Namespace, overrides: list[str]) -> int:
    for option, given in (
        ("--weights", parsed.weights),
        ("--ranks", parsed.ranks),
        ("--dry-run", parsed.dry_run),
    ):
        if given:
            raise InputError(
                f"{option} is given, which goes with --track images alone; leave it out"
            )
    from namr_dist.reproduce.cells import (
        ALONE,
        RANKING,
        check_results,
        complete_cells,
        copy_cell,
        name_of,
    )
    from namr_dist.reproduce.features import (
        RIVALS,
        SHORT_STEPS,
        SHORT_VIEWS,
        STEPS,
        VIEWS,
        reproduce_features,
    )
    from namr_dist.reproduce.images import CONSTANT

    name = parsed.recipe or _RECIPE
    steps, views = (SHORT_STEPS, SHORT_VIEWS) if parsed.short else (STEPS, VIEWS)
    base = _base(name, ["--set.optim.steps", str(steps), *CONSTANT, *overrides])
    if base.data.validation_split is None:
        raise InputError(
            f"recipe {name} has no validation split, by which this track chooses γ; name one by "
            "--set.data.validation_split"
        )
    variants = (ALONE, RANKING, *_rivals(parsed, RIVALS))
    folder, results = _folder(parsed, f"{name}-features"), parsed.results
    check_results(folder, results)
    kept = complete_cells(results) if results else []
    there = {cell.name for cell in complete_cells(folder)}
    for cell in kept:
        if cell.name not in there:
            copy_cell(cell, folder)
    try:
        reproduce_features(
            base,
            folder,
            losses=parsed.losses,
            seeds=parsed.seeds,
            variants=variants,
            views=views,
        )
    finally:
        done = complete_cells(folder)
        for cell in done:
            if results and cell.name not in [one.name for one in kept]:
                copy_cell(cell, results)
    named = {cell: name_of(cell) for cell in done}
    _print_gains(
        [
            cell
            for cell, name in named.items()
            if name.loss in parsed.losses and name.seed in parsed.seeds
        ],
        as_json=parsed.json,
    )
    return 0


def _reproduce_images(parsed: argparse.Namespace, overrides: list[str]) -> int:
    import torch

    from namr_dist.reproduce.images import (
        CONSTANT,
        HOMEWARE_STEPS,
        RIVALS,
        SHORT,
        describe,
        plan,
        reproduce,
    )
    from namr_dist.train.signals import EXIT_CODE

    name = parsed.recipe or _RECIPE
    ranks = max(1, torch.cuda.device_count()) if parsed.ranks is None else parsed.ranks
    if ranks < 1:
        raise InputError(f"--ranks is {ranks}; set it to at least 1")
    if parsed.short:
        overrides = [*SHORT, *overrides]
    elif name == "homeware":
        overrides = ["--set.optim.steps", str(HOMEWARE_STEPS), *overrides]
    # Validation chooses nothing before the last step.
    steps = configure(name, overrides).optim.steps
    overrides = ["--set.train.validate_every", str(steps), *CONSTANT, *overrides]
    base = _base(name, overrides)
    if base.data.classes_per_batch % ranks:
        raise InputError(
            f"data.classes_per_batch is {base.data.classes_per_batch}, which {ranks} ranks cannot share; "
            "give another number by --ranks"
        )
    weights = (
        tuple(dict.fromkeys((0.0, base.loss.ranking.weight)))
        if parsed.weights is None
        else parsed.weights
    )
    if len([weight for weight in weights if weight]) > 1:
        raise InputError(
            f"--weights is {' '.join(f'{weight:g}' for weight in weights)}, of which more than one is not 0; "
            "give one, and each other one with a --run-dir of its own"
        )
    folder = _folder(parsed, name)
    runs = plan(
        name,
        base,
        overrides,
        folder,
        losses=parsed.losses,
        weights=weights,
        seeds=parsed.seeds,
        rivals=_rivals(parsed, tuple(RIVALS)),
        results=parsed.results,
    )
    if parsed.dry_run:
        say(*describe(runs, folder, ranks=ranks))
        return 0
    code = reproduce(runs, folder, ranks=ranks)
    done = [run.cell for run in runs if run.cell]
    if code != EXIT_CODE and done:
        page = folder / REPORT
        _write_page([*runs_in(folder), *(cell for cell in done if cell.parent != folder)], page)
        _print_gains(done, as_json=parsed.json)
        if not parsed.json:
            say(str(page))
    return code


def _rivals(parsed: argparse.Namespace, known: Sequence[str]) -> Sequence[str]:
    """Those that --rivals names, or all of the track where it names none."""
    asked: Sequence[str] = parsed.rivals or []
    if unknown := [name for name in asked if name not in known]:
        raise InputError(
            f"--rivals names {unknown[0]!r}; --track {parsed.track} has {' '.join(known)}"
        )
    return asked or (known if parsed.rivals is not None else ())


def _folder(parsed: argparse.Namespace, name: str) -> Path:
    """Of the runs."""
    default = Path("runs") / f"reproduce-{name}{'-short' * parsed.short}"
    return parsed.run_dir or default


def _write_page(runs: Sequence[Path], page: Path) -> None:
    """The comparison that `namr report` makes of these runs."""
    from namr_dist.results.comparison import compare
    from namr_dist.results.comparison_page import write_comparison

    write_comparison(compare(runs), page)


def _print_gains(cells: Sequence[Path], *, as_json: bool) -> None:
    from namr_dist.reproduce.cells import read_cells
    from namr_dist.reproduce.gains import as_json as gains_as_json
    from namr_dist.reproduce.gains import gains
    from namr_dist.reproduce.gains_table import print_gains

    every = gains(read_cells(cells))
    if as_json:
        print(json.dumps(gains_as_json(every), indent=2))
    else:
        print_gains(every)
