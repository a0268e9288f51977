"""The verbs for a trained run: `namr evaluate`, `report` and `export`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from namr_dist import named_code
from namr_dist.atomic import check_target
from namr_dist.cli.pictures import add_allow_code
from namr_dist.errors import InputError
from namr_dist.run.folder import (
    EMBEDDINGS,
    FINAL,
    METRICS,
    REPORT,
    Evaluation,
    RunFolder,
    runs_in,
    step_name,
)
from namr_dist.text import say


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `evaluate`, `report` and `export` to the `namr` command."""
    evaluate = verbs.add_parser(
        "evaluate",
        help="measure a trained run on its test split",
        description=f"Measure a run on its test split: {METRICS}, {EMBEDDINGS}. Also on many ranks: "
        "torchrun or deepspeed start them with --module namr_dist.launchers.evaluate RUN, srun and "
        "mpirun with the command as it is; the figures are the same.",
    )
    evaluate.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    _add_shards(evaluate)
    other = Evaluation(folder=Path(), split="NAME")
    evaluate.add_argument(
        "--split",
        metavar="NAME",
        help="another test split or subset; its files are "
        f"{other.path(METRICS)} and {other.path(EMBEDDINGS)}",
    )
    evaluate.add_argument(
        "--checkpoint",
        metavar="NAME",
        help=f"{FINAL}, or the step of a training state, such as {step_name(100)}, whose files are "
        f"{Evaluation(folder=Path(), step=100).path(METRICS)} and so on ({FINAL}, and of a run that has "
        "not finished, its newest)",
    )
    evaluate.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder that the files go to, made if it is not there (the run's)",
    )
    evaluate.add_argument(
        "--mode",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="measure a retrieval mode of your own, a Mode, with the others; may be given again",
    )
    add_allow_code(evaluate)
    evaluate.add_argument(
        "--recall-at",
        type=int,
        nargs="+",
        default=[],
        metavar="K",
        help="the k of R@k (as trained)",
    )
    evaluate.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="METRIC",
        help="further metrics: mAP@k, precision@k (as mAP@10; as OML defines them), MRR",
    )
    evaluate.add_argument(
        "--without-own-group",
        action="store_true",
        help="leave items of the query's class and group (camera, sequence) out of its results, as "
        "Market-1501 does",
    )
    evaluate.add_argument(
        "--json", action="store_true", help="print the figures as JSON instead of a table"
    )
    evaluate.set_defaults(verb=_evaluate)

    report = verbs.add_parser(
        "report",
        help=f"write a run's {REPORT}, or one table over many runs",
        description=f"Write a run's {REPORT}. Of several runs, or a folder that holds runs: "
        "one table with one row per setting, over its seeds, as text and as a page.",
    )
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folders of evaluated runs, or of runs"
    )
    _add_shards(report)
    add_allow_code(report)
    report.add_argument(
        "--split", metavar="NAME", help="another split that was evaluated (the runs' test split)"
    )
    report.add_argument(
        "--checkpoint",
        metavar="NAME",
        help=f"of one run, {FINAL} or a step that was evaluated ({FINAL}, and of a run that has not "
        "finished, the newest that was)",
    )
    report.add_argument(
        "--out",
        type=Path,
        metavar="PLACE",
        help=f"the page, or the folder that it goes to ({REPORT} in the run, or in the folder that "
        "holds the runs); figures of one run that `namr evaluate --out` left in that folder are shown",
    )
    report.add_argument(
        "--json", action="store_true", help="print the figures, or the table, as JSON"
    )
    report.set_defaults(verb=_report)

    export = verbs.add_parser(
        "export",
        help="write a trained network as plain files that need no DeepSpeed",
        description="Write a trained run's network into a new folder with its configuration "
        "and a model card, which a model hub takes as it is. Every model is read back and compared "
        "with the network.",
    )
    export.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    export.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the folder to make"
    )
    _add_shards(export)
    add_allow_code(export)
    formats = ("safetensors", "torch", "onnx")
    export.add_argument(
        "--formats",
        nargs="+",
        choices=formats,
        default=formats,
        metavar="FORMAT",
        help="any of safetensors, torch (torch.export) and onnx; by default all",
    )
    export.add_argument(
        "--license",
        metavar="ID",
        help="licence of the weights, for the model card: a model hub's identifier, such as apache-2.0 (not stated)",
    )
    export.add_argument("--json", action="store_true", help="print JSON")
    export.set_defaults(verb=_export)


def _add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shards",
        metavar="FOLDER",
        help="where the run's shard set is now, a folder or a URL (where it was trained from)",
    )


def _evaluate(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.parallel.ranks import discover, shut_down
    from namr_dist.results.evaluate_run import evaluate_run

    named_code.allow([*parsed.allow_code, *parsed.mode])
    rank = discover()
    metrics = evaluate_run(
        parsed.run,
        shards=parsed.shards,
        split=parsed.split,
        checkpoint=parsed.checkpoint,
        recall_at=tuple(parsed.recall_at),
        modes=parsed.mode,
        also=parsed.also,
        without_own_group=parsed.without_own_group,
        out=parsed.out,
        rank=rank,
    )
    if rank.first and parsed.json:
        print(json.dumps(metrics, indent=2))
    elif rank.first:
        from namr_dist.results.tables import results_table
        from namr_dist.terminal import Console

        Console().print(results_table(metrics))
    shut_down(0)


def _report(parsed: argparse.Namespace, _: list[str]) -> None:
    run = parsed.runs[0]
    if len(parsed.runs) > 1 or (runs_in(run) and not RunFolder(run).config.exists()):
        _compare(parsed)
        return
    from namr_dist.results.evaluate_run import evaluation_of, report_run
    from namr_dist.results.record import read_metrics

    named_code.allow(parsed.allow_code)
    evaluation = evaluation_of(
        run, split=parsed.split, checkpoint=parsed.checkpoint, out=parsed.out
    )
    page = report_run(run, shards=parsed.shards, evaluation=evaluation, out=parsed.out)
    if parsed.json:
        print(json.dumps(read_metrics(evaluation), indent=2))
    else:
        say(str(page))


def _compare(parsed: argparse.Namespace) -> None:
    for option, value in (
        ("--shards", parsed.shards),
        ("--checkpoint", parsed.checkpoint),
        ("--allow-code", " ".join(parsed.allow_code)),
    ):
        if value:
            raise InputError(f"{option} is {value}, which goes with one run; leave it out")
    if parsed.out is None and len(parsed.runs) > 1:
        raise InputError("the table of several runs needs a place; give --out FILE.html")
    out = parsed.out or parsed.runs[0]
    if out.is_dir():
        out = Evaluation(folder=out, split=parsed.split).path(REPORT)
    check_target("--out", out)
    write_table(parsed.runs, out, as_json=parsed.json, split=parsed.split)


def write_table(
    folders: Sequence[Path], out: Path, *, as_json: bool, split: str | None = None
) -> None:
    """The table over all runs in these folders: on stdout, as text or JSON, and as the page
    `out`. split: as `compare` takes it."""
    from namr_dist.results.comparison import compare, find_runs
    from namr_dist.results.comparison_page import print_comparison, write_comparison

    comparison = compare(find_runs(folders), split=split)
    write_comparison(comparison, out)
    if as_json:
        print(json.dumps(dataclasses.asdict(comparison), indent=2))
        return
    print_comparison(comparison)
    say(str(out))


def _export(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.results.export import export_run

    named_code.allow(parsed.allow_code)
    exported = export_run(
        parsed.run, parsed.out, parsed.formats, shards=parsed.shards, licence=parsed.license
    )
    if parsed.json:
        print(json.dumps(dataclasses.asdict(exported), indent=2, default=str))
        return
    for file, size in exported.size_bytes.items():
        compared = (
            f"  differs from the network by {exported.differences[file]:.1e} at most"
            if file in exported.differences
            else ""
        )
        say(f"{exported.folder / file}  {size / 2**20:.1f} MiB{compared}")
