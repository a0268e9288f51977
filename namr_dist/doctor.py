"""`namr doctor`: what is installed, which fast paths are on, and what to do about what is
missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table

from namr_dist import __version__
from namr_dist.atomic import check_target
from namr_dist.errors import InputError
from namr_dist.terminal import Console, plain, transient_bar

Status = Literal["ok", "slow", "missing"]

_PACKAGES = ("torch", "triton", "deepspeed", "webdataset", "numpy", "simplejpeg", "timm")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor: `slow` works though not at its best, `missing` stops something."""

    what: str
    status: Status
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at everything; never raises for what it finds."""
    findings = [
        Finding(
            what="namr-dist",
            status="ok",
            found=f"{__version__}, Python {platform.python_version()}, {Path(__file__).parent}",
        )
    ]
    findings += [_package(name) for name in _PACKAGES]
    checks: tuple[Callable[[], Finding], ...] = (
        _device,
        _precision,
        _kernels,
        _compilers,
        _search,
        _zero,
        _data,
        _space,
    )
    for check in checks:
        try:
            findings.append(check())
        except Exception as error:  # a doctor that falls over its patient is of no use
            findings.append(
                Finding(
                    what=check.__name__.strip("_"),
                    status="missing",
                    found=f"{type(error).__name__}: {error}",
                    remedy="run make setup again",
                )
            )
    return findings


def show(findings: list[Finding]) -> None:
    """Print the findings as a table."""
    table = Table(title="namr doctor", title_justify="left")
    table.add_column("")
    for heading in ("what", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    marks = {"ok": "[green]ok[/]", "slow": "[yellow]slow[/]", "missing": "[red]missing[/]"}
    for finding in findings:
        table.add_row(
            marks[finding.status], *map(plain, (finding.what, finding.found, finding.remedy))
        )
    Console().print(table)


def parity(*, as_json: bool, csv: Path | None) -> int:
    """Measure the parity table, print it, write it to `csv`; 1 if anything is above its bound, else
    0.

    Raises InputError if the file has no folder.
    """
    from namr_dist.parity import report

    if csv:
        check_target("--csv", csv)
    with transient_bar() as bar:
        task = bar.add_task("parity", total=None)
        rows = report.run(lambda done, total: bar.update(task, completed=done, total=total))
    made = report.origin()
    if csv:
        report.write_csv(csv, rows, made)
    failures = report.failures(rows)
    if as_json:
        print(
            json.dumps(
                {**made, "failures": failures, "rows": [asdict(row) for row in rows]}, indent=2
            )
        )
        return int(bool(failures))
    # Seventeen columns: a narrower terminal breaks the lines, and no figure is cut.
    console = Console(width=max(120, Console().width))
    library = report.library_table(rows)
    for title, heading, lines in [*report.tables(rows), *([library] if library else [])]:
        table = Table(title=title, title_justify="left", box=None, padding=(0, 0, 0, 1))
        for number, column in enumerate(heading):
            table.add_column(
                column.replace(" ", "\n"), justify="left" if number < 2 else "right", no_wrap=True
            )
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for failure in failures:
        console.print(f"[red]above its bound[/] {failure}")
    if not failures:
        console.print(
            f"all {sum(row.good == 'yes' for row in rows)} cases within their bounds (docs/parity.md)"
        )
    return int(bool(failures))


def _package(name: str) -> Finding:
    try:
        return Finding(what=name, status="ok", found=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(what=name, status="missing", found="not installed", remedy="run make setup")


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
        return Finding(
            what="device",
            status="ok",
            found=f"{torch.cuda.device_count()} × {', '.join(sorted(names))}",
        )
    driver = shutil.which("nvidia-smi") is not None
    remedy = (
        "a driver is here, but this torch sees no GPU: remove .venv and run make setup"
        if driver
        else "none, if this machine has no GPU"
    )
    return Finding(
        what="device",
        status="slow",
        found=f"CPU, {os.cpu_count()} cores, torch {torch.__version__}",
        remedy=remedy,
    )


def _precision() -> Finding:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding(what="precision", status="ok", found="bf16 on the GPU")
    return Finding(
        what="precision", status="slow", found="fp32", remedy="bf16 needs a GPU of sm_80 or later"
    )


def _kernels() -> Finding:
    import torch

    from namr_dist import kernels

    if torch.cuda.is_available():
        return Finding(what="losses", status="ok", found=kernels.describe(torch.device("cuda")))
    return Finding(
        what="losses",
        status="slow",
        found=kernels.describe(torch.device("cpu")),
        remedy="an NVIDIA GPU of sm_80 or later, with its driver",
    )


def _compilers() -> Finding:
    import torch

    from namr_dist.cluster.checks import compilers

    try:
        return Finding(what="compilers", status="ok", found=compilers(os.environ))
    except InputError as error:
        needed = torch.cuda.is_available()
        found, _, remedy = str(error).partition("; ")
        return Finding(
            what="compilers",
            status="missing" if needed else "slow",
            found=found,
            remedy=remedy if needed else "none, if this machine has no GPU",
        )


def _search() -> Finding:
    from namr_dist.retrieval.search import search_backend

    backend = search_backend()
    return Finding(
        what="search",
        status="ok",
        found=f"{backend.name}: {backend.reason}",
        remedy="",
    )


def _zero() -> Finding:
    import torch.distributed as dist

    backends = [
        name
        for name, have in (("nccl", dist.is_nccl_available()), ("gloo", dist.is_gloo_available()))
        if have
    ]
    return Finding(
        what="ranks",
        status="ok" if backends else "missing",
        found=", ".join(backends) or "no backend",
    )


def _data() -> Finding:
    from namr_dist.data.location import open_shards
    from namr_dist.data.shardset.shards import verify_shards

    manifest = open_shards(None)
    images = verify_shards(manifest, manifest.splits)
    return Finding(
        what="homeware", status="ok", found=f"{images} images, hashes as the manifest says"
    )


def _space() -> Finding:
    free_mib = shutil.disk_usage(Path.cwd()).free / 2**20
    shm = Path("/dev/shm")
    shm_mib = shutil.disk_usage(shm).free / 2**20 if shm.is_dir() else 0.0
    small = shm_mib < 64
    return Finding(
        what="space",
        status="slow" if small else "ok",
        found=f"{free_mib:,.0f} MiB here, {shm_mib:,.0f} MiB shared memory",
        remedy="give the container more shared memory, or set data.workers 0" if small else "",
    )
