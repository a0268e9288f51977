"""Verbs around jobs that train: `namr preflight` before one, `namr top` while it runs, `namr
reproduce` of many."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from namr_dist.errors import InputError
from namr_dist.losses import registry
from namr_dist.recipes.overrides import configure, configure_quietly
from namr_dist.run.folder import REPORT

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
        description="Train and evaluate a recipe with each loss, ranking weight and seed, one run at a time, then make "
        f"one table over them (FOLDER/{REPORT}). --set… goes to all runs. The same command goes on where it was, and "
        "keeps runs that are done. Exit code 1 if a run failed, 75 if a signal asked for an end.",
    )
    reproduce.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?",
        default="homeware",
        help="name of a recipe (%(default)s, for more steps than its own)",
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
        help="weights of multi-cluster ranking; 0 leaves it out (0, and the recipe's own)",
    )
    reproduce.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="(0 1 2)"
    )
    reproduce.add_argument(
        "--run-dir", type=Path, metavar="FOLDER", help="folder of the runs (runs/reproduce-RECIPE)"
    )
    reproduce.add_argument(
        "--ranks", type=int, metavar="W", help="ranks of each run (one a GPU, or one)"
    )
    reproduce.add_argument(
        "--dry-run", action="store_true", help="print what would be done, and stop"
    )
    reproduce.add_argument("--json", action="store_true", help="print the table as JSON")
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
        print(f"namr: error: {error}", file=sys.stderr)
        code = EXIT_CODE
    sys.stderr.flush()
    os._exit(code)  # a call that hangs has left a thread behind, which the usual end would wait for


def _top(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.run.top import top

    top(parsed.run, once=parsed.once, as_json=parsed.json)


def _reproduce(parsed: argparse.Namespace, overrides: list[str]) -> int:
    import torch

    from namr_dist import recipes
    from namr_dist.cli.results import write_table
    from namr_dist.reproduce.images import HOMEWARE_STEPS, describe, plan, reproduce
    from namr_dist.train.signals import EXIT_CODE

    ranks = max(1, torch.cuda.device_count()) if parsed.ranks is None else parsed.ranks
    if ranks < 1:
        raise InputError(f"--ranks is {ranks}; set it to at least 1")
    if parsed.recipe == "homeware":
        overrides = ["--set.optim.steps", str(HOMEWARE_STEPS), *overrides]
    recipe, base = recipes.find(parsed.recipe), configure(parsed.recipe, overrides)
    for option, field, own, given in (
        ("--losses", "loss.metric", recipe.loss.metric, base.loss.metric),
        ("--seeds", "train.seed", recipe.train.seed, base.train.seed),
    ):
        if given != own:
            raise InputError(
                f"--set.{field} is {given}, but each run has its own; give {option} {given}"
            )
    if base.data.classes_per_batch % ranks:
        raise InputError(
            f"data.classes_per_batch is {base.data.classes_per_batch}, which {ranks} ranks cannot share; "
            "give another number by --ranks"
        )
    folder = parsed.run_dir or Path("runs") / f"reproduce-{parsed.recipe}"
    weights = (
        tuple(dict.fromkeys((0.0, base.loss.ranking.weight)))
        if parsed.weights is None
        else parsed.weights
    )
    runs = plan(
        parsed.recipe,
        base,
        overrides,
        folder,
        losses=parsed.losses,
        weights=weights,
        seeds=parsed.seeds,
    )
    if parsed.dry_run:
        print("\n".join(describe(runs, folder, ranks=ranks)))
        return 0
    code = reproduce(runs, folder, ranks=ranks)
    if code != EXIT_CODE and any(run.evaluated for run in runs):
        write_table([folder], folder / REPORT, as_json=parsed.json)
    return code
