"""The `namr` command: one verb, one small function, here or in the module of its subject beside
this one.

Verbs import what they need, so that --help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from namr_dist import __version__
from namr_dist.cli import bench, gallery, index, jobs, results, serve, shards
from namr_dist.config import Config
from namr_dist.errors import InputError, ReportedError, exit_code_of, in_one_line
from namr_dist.recipes.overrides import configure, configure_quietly, split_overrides
from namr_dist.text import say

_LAUNCHED = ("RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID", "SLURM_STEP_ID")
"""Variables of which a rank has one (parallel/ranks.py), looked at before torch is imported."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 2 for bad input and 74 for trouble that time
    may mend, each told in one line on stderr, or 75 for a training run that a signal ended and
    --resume goes on with."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parsed, overrides = _parse(words)
        return parsed.verb(parsed, overrides) or 0
    except ReportedError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader of the output (head, less) has left: nobody to tell, and nothing for Python to
        # flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell counts SIGPIPE
    except OSError as error:
        code = exit_code_of(error)
        if code is None:
            raise
        return _fail(in_one_line(error), code)
    except KeyboardInterrupt:
        return 130


def _fail(text: str, code: int) -> int:
    say(f"namr: error: {text}", file=sys.stderr)
    return code


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="namr", description="Train, evaluate and serve image-retrieval embeddings with NAMR."
    )
    parser.add_argument("--version", action="version", version=f"namr-dist {__version__}")
    verbs = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True
    )

    train = verbs.add_parser(
        "train",
        help="train a recipe",
        description="Train a recipe. Any of its settings can be changed with "
        "--set.SECTION.FIELD VALUE; --settings prints them all.",
    )
    train.add_argument("recipe", metavar="RECIPE", help="name of a recipe, such as homeware")
    # Not --run: torchrun's own parser takes that for a shortened option of its own, wherever it
    # stands.
    train.add_argument("--run-dir", type=Path, help="folder of the run (runs/RECIPE)")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run that is there from its newest checkpoint; without one, begin",
    )
    train.add_argument(
        "--settings", action="store_true", help="print every setting with its meaning, and stop"
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check what can be checked without starting, print how to start, and stop",
    )
    train.add_argument(
        "--ranks", type=int, metavar="W", help="ranks that --dry-run checks for (as launched)"
    )
    train.set_defaults(verb=_train)

    jobs.add_parser(verbs)
    results.add_parser(verbs)
    gallery.add_parser(verbs)
    index.add_parser(verbs)
    shards.add_parser(verbs)
    serve.add_parser(verbs)
    bench.add_parser(verbs, words)

    doctor = verbs.add_parser(
        "doctor", help="what is installed, which fast paths are on, what to do about the rest"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument(
        "--parity",
        action="store_true",
        help="instead, compare losses and gradients of 1, 2 and 4 CPU "
        "ranks under DDP and ZeRO 0 to 3 with those of one process (minutes); exit code 1 if one "
        "differs",
    )
    doctor.add_argument("--csv", type=Path, metavar="FILE", help="write the figures of --parity")
    doctor.set_defaults(verb=_doctor)

    own, overrides = split_overrides(words)
    parsed = parser.parse_args(own)
    if (
        overrides
        and parsed.command not in ("train", "preflight", "reproduce")
        and words[:2] != ["bench", "train"]
    ):
        parser.error(
            f"{overrides[0]} goes with `namr train`, `namr preflight`, `namr reproduce` and "
            "`namr bench train`"
        )
    return parsed, overrides


def _train(parsed: argparse.Namespace, overrides: list[str]) -> int:
    here_alone = parsed.settings or parsed.dry_run or not any(map(os.environ.get, _LAUNCHED))
    config = (
        configure(parsed.recipe, overrides, show_help=parsed.settings)
        if here_alone
        else configure_quietly(parsed.recipe, overrides)
    )
    if parsed.dry_run:
        assert isinstance(config, Config)
        _dry_run(parsed, overrides, config)
        return 0
    if parsed.ranks is not None:
        raise InputError(
            f"--ranks is {parsed.ranks}, which goes with --dry-run; torchrun, deepspeed, srun or mpirun "
            "say how many ranks train"
        )
    from namr_dist.parallel.meeting import Meeting
    from namr_dist.parallel.ranks import discover, shut_down
    from namr_dist.train.run import train
    from namr_dist.train.signals import EXIT_CODE, StopRequests

    rank = discover()
    meeting = Meeting(rank)
    with meeting.all_or_none():
        if isinstance(config, InputError):
            raise config
    finished = train(
        config,
        parsed.run_dir or Path("runs") / config.recipe,
        rank,
        meeting,
        StopRequests(speaks=rank.first, until_exit=True),
        overwrite=parsed.overwrite,
        resume=parsed.resume,
    )
    code = 0 if finished else EXIT_CODE
    shut_down(code)
    return code


def _dry_run(parsed: argparse.Namespace, overrides: list[str], config: Config) -> None:
    from namr_dist.parallel.ranks import read_launch
    from namr_dist.train.dry_run import dry_run

    launch = read_launch(os.environ)
    words = [
        parsed.recipe,
        *(["--run-dir", str(parsed.run_dir)] if parsed.run_dir else []),
        *(["--overwrite"] if parsed.overwrite else []),
        *(["--resume"] if parsed.resume else []),
        *overrides,
    ]
    lines = dry_run(
        config,
        parsed.run_dir or Path("runs") / config.recipe,
        ranks=launch.world_size if parsed.ranks is None else parsed.ranks,
        overwrite=parsed.overwrite,
        resume=parsed.resume,
        words=words,
    )
    if launch.rank == 0:
        say(*lines)


def _doctor(parsed: argparse.Namespace, _: list[str]) -> int:
    from namr_dist import doctor

    if parsed.parity:
        return doctor.parity(as_json=parsed.json, csv=parsed.csv)
    if parsed.csv:
        raise InputError(f"--csv is {parsed.csv}, which goes with --parity; add it")
    findings = doctor.examine()
    if parsed.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        doctor.show(findings)
    return 0
