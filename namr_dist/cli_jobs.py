"""The verbs around a job that trains: `namr preflight` before it, `namr top` while it runs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from namr_dist.cli_settings import configure_quietly
from namr_dist.errors import InputError

_LONGEST_LIMIT_S = 86_400


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `preflight` and `top` to the `namr` command."""
    preflight = verbs.add_parser(
        "preflight", help="check the nodes of a job before it trains",
        description="Check, with one process a node, whether a recipe can train there: srun --ntasks-per-node=1 namr "
        "preflight RECIPE. Ends within --limit seconds, with exit code 0 or 2 on all nodes.")
    preflight.add_argument("recipe", metavar="RECIPE", help="name of a recipe, with --set… as for namr train")
    preflight.add_argument("--run-dir", type=Path, help="folder of the run (runs/RECIPE)")
    preflight.add_argument("--ranks-per-node", type=int, metavar="N", help="ranks that will train on each node (one a "
                           "GPU, or one)")
    preflight.add_argument("--limit", type=int, default=30, metavar="SECONDS", help="seconds in which all nodes must "
                           "have answered, imports included; at least 5 (%(default)s)")
    preflight.set_defaults(verb=_preflight)

    top = verbs.add_parser("top", help="watch a run", description="Progress, losses, speed and checkpoints of a run, "
                           "from any machine that sees its folder; live on a terminal, until it is finished or Ctrl-C.")
    top.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    top.add_argument("--once", action="store_true", help="print it once, also on a terminal")
    top.add_argument("--json", action="store_true", help="print it once, as JSON")
    top.set_defaults(verb=_top)


def _preflight(parsed: argparse.Namespace, overrides: list[str]) -> None:
    from namr_dist.cluster.deadline import EXIT_CODE, Deadline

    if not 5 <= parsed.limit <= _LONGEST_LIMIT_S:
        raise InputError(f"--limit is {parsed.limit}; set it to at least 5 seconds, and at most {_LONGEST_LIMIT_S}")
    deadline = Deadline(parsed.limit)  # before torch is imported, which may take long from a slow file system
    if parsed.ranks_per_node is not None and parsed.ranks_per_node < 1:
        raise InputError(f"--ranks-per-node is {parsed.ranks_per_node}; set it to at least 1")
    config = configure_quietly(parsed.recipe, overrides)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # one line says what is wrong, and not torch's traces in C++
    from namr_dist.cluster.preflight import preflight

    try:
        code = preflight(config, parsed.run_dir or Path("runs") / parsed.recipe, ranks_per_node=parsed.ranks_per_node,
                         deadline=deadline)
    except InputError as error:
        print(f"namr: error: {error}", file=sys.stderr)
        code = EXIT_CODE
    sys.stderr.flush()
    os._exit(code)  # a call that hangs has left a thread behind, which the usual end would wait for


def _top(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.cluster.top import top

    top(parsed.run, once=parsed.once, as_json=parsed.json)
