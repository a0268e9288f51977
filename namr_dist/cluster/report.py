"""What the nodes reported, side by side: what differs, and the table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rich.table import Table

from namr_dist.terminal import Console, plain

_NAMED = 4
"""Nodes that a line names; of more, their number."""
_SAME_ENVIRONMENT = "install the same environment on all nodes, or use one on a shared file system"


@dataclass(kw_only=True)
class Report:
    """What one node found; None: not looked at, or it was refused and `problems` says why."""

    versions: dict[str, str] | None = None
    gpus: list[str] | None = None
    search: str | None = None
    shards: dict[str, Any] | None = None
    """Fields of checks.ShardsFound."""
    weights: str | None = None
    free_bytes: int | None = None
    mib_per_s: float | None = None
    problems: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Fields that this version does not know are left out: another version's report shall be
        compared too."""
        known = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})


def compare(
    reports: Mapping[int, Report], names: Sequence[str], *, ranks_per_node: int | None
) -> list[str]:
    """A line for each thing that is wrong: of one node, of several alike, or of nodes unlike the
    first."""
    nodes_of: dict[str, list[str]] = {}
    for rank, report in sorted(reports.items()):
        problems = report.problems + (
            _differences(report, reports[0], names[0], ranks_per_node) if rank else []
        )
        for problem in problems:
            nodes_of.setdefault(problem, []).append(names[rank])
    return [f"{_listed(nodes, len(reports))}: {problem}" for problem, nodes in nodes_of.items()]


def _differences(report: Report, first: Report, name: str, ranks_per_node: int | None) -> list[str]:
    """What a node has otherwise than the first, called `name`."""
    problems = []
    if report.versions and first.versions:
        problems += [
            f"{package} is {report.versions.get(package, 'not installed')}, on {name} "
            f"{first.versions.get(package, 'not installed')}; {_SAME_ENVIRONMENT}"
            for package in differing(report, first)
        ]
    if report.gpus is not None and first.gpus is not None:
        here, there = len(report.gpus), len(first.gpus)
        if bool(here) != bool(there) or here < min(there, ranks_per_node or there):
            problems.append(
                f"has {here} GPUs, {name} has {there}; take nodes of one kind, or set --ranks-per-node to "
                "at most the fewest"
            )
    if (
        report.shards
        and first.shards
        and report.shards["manifest_sha256"] != first.shards["manifest_sha256"]
    ):
        problems.append(
            f"its shard set's manifest.json is another than on {name}; copy the shard set there again"
        )
    return problems


def differing(report: Report, first: Report) -> list[str]:
    """Names of what has two versions. A commit counts where both nodes know it."""
    here, there = report.versions or {}, first.versions or {}
    return [
        package
        for package in {**there, **here}
        if here.get(package) != there.get(package)
        and (package != "commit" or (package in here and package in there))
    ]


def _listed(nodes: Sequence[str], count: int) -> str:
    if len(nodes) == count > 1:
        return "all nodes"
    more = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
    return ", ".join(nodes[:_NAMED]) + more


_OF_A_JOB = {
    "--run-dir": "NAMR_RUN_DIR",
    "--ranks-per-node": "NAMR_RANKS_PER_NODE",
    "data.path": "NAMR_SHARDS",
}


def in_words_of_the_job(problem: str, environ: Mapping[str, str]) -> str:
    """A problem with the names by which a Slurm job of slurm/ is given what the command line calls
    otherwise; as it is anywhere else."""
    if "NAMR_LAUNCH" not in environ:
        return problem
    for word, variable in _OF_A_JOB.items():
        problem = re.sub(rf"(?<![\w.-]){re.escape(word)}(?![\w.-]*\w)", variable, problem)
    return problem


def show(reports: Mapping[int, Report], names: Sequence[str]) -> None:
    """Print a row a node to stderr."""
    console = Console(stderr=True)
    # A batch job's log is no terminal and taken for 80 columns.
    console = Console(stderr=True, width=max(120, console.width))
    table = Table(title="namr preflight", title_justify="left")
    for heading in (
        "node",
        "versions",
        "GPUs",
        "shards",
        "weights",
        "run folder",
        "search",
        "MiB/s",
    ):
        table.add_column(
            heading, overflow="fold", justify="right" if heading == "MiB/s" else "left"
        )
    for rank, name in enumerate(names):
        cells = (
            map(plain, _cells(reports[rank], reports[0]))
            if rank in reports
            else ["[red]no report[/]"]
        )
        table.add_row(plain(name), *cells)
    console.print(table)


def _cells(report: Report, first: Report) -> list[str]:
    shards = report.shards
    kinds = {kind: report.gpus.count(kind) for kind in report.gpus} if report.gpus else {}
    return [
        "–" if report.versions is None else ", ".join(differing(report, first)) or "ok",
        "–"
        if report.gpus is None
        else ", ".join(f"{number} × {kind}" for kind, number in kinds.items()) or "none",
        "–"
        if shards is None
        else f"{shards['files']}, {shards['size_bytes'] / 2**30:.1f} GiB"
        if shards["files"]
        else "remote",
        report.weights or "–",
        "–" if report.free_bytes is None else f"{report.free_bytes / 2**30:.0f} GiB free",
        report.search or "–",
        "–" if report.mib_per_s is None else f"{report.mib_per_s:.0f}",
    ]
