"""`namr bench data`: images a second of one core, stage by stage, beside WebDataset and
torchvision's ImageFolder."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from namr_dist.bench.data_providers import (
    STAGES,
    LapClock,
    Provider,
    Work,
    image_folder,
    namr,
    plain_webdataset,
    webdataset_torchvision,
)
from namr_dist.bench.example_set import make_example_set
from namr_dist.config import DataConfig
from namr_dist.csv_file import write_csv
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.model.torchvision_shim import make_torchvision_importable
from namr_dist.provenance import provenance
from namr_dist.terminal import Console

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way; medians over the repeats, with quartiles."""

    provider: str
    images_per_s: float
    images_per_s_q1: float
    images_per_s_q3: float
    ratio: float
    """Seconds an image over those of namr in the same repeat: how many times faster namr is."""
    ratio_q1: float
    ratio_q3: float
    read_us: float
    """Microseconds an image of each stage."""
    decode_us: float
    augment_us: float
    collate_us: float


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All ways on the same images."""

    set_name: str
    images: int
    mean_kib: float
    """Of a JPEG."""
    size: int
    """Side of the finished images in pixels."""
    repeats: int
    left_out: str
    """Why torchvision's rows are missing; empty where they are not."""
    rows: tuple[Measured, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields, with the machine, the commit and the versions of what was timed."""
        return {**dataclasses.asdict(self), **_provenance()}


def measure(folder: Path | None, *, images: int, size: int, repeats: int) -> Benchmark:
    """Time all ways in turn, `repeats` times, in this process and one thread, after a pass of each
    that is not counted and brings the files into the page cache. A second is one that this thread
    has a core.

    Takes the first images of the first split of the shard set in `folder`; None: of a set made for
    the purpose. Raises InputError as Manifest.load does.
    """
    with tempfile.TemporaryDirectory(prefix="namr-bench-") as name, _one_thread():
        temporary = Path(name)
        made, files = temporary / "shards", temporary / "files"
        made.mkdir()
        files.mkdir()
        manifest = Manifest.load(folder) if folder else make_example_set(made, images=images)
        whole = manifest.index(manifest.splits[0])
        index = whole.only(np.arange(min(images, len(whole))))
        work = Work(manifest=manifest, index=index, batch=_BATCH, size=size, data=DataConfig())
        left_out = _why_no_torchvision()
        ways = {"namr": namr(work), "WebDataset": plain_webdataset(work)}
        if not left_out:
            ways |= {
                "WebDataset, torchvision": webdataset_torchvision(work),
                "ImageFolder, torchvision": image_folder(work, files),
            }
        for way in ways.values():
            _seconds_per_image(way)
        # One after another within a repeat, so that what else the machine does meets all of them.
        timed = [
            {name: _seconds_per_image(way) for name, way in ways.items()} for _ in range(repeats)
        ]
    return Benchmark(
        set_name=manifest.name,
        images=len(index),
        mean_kib=float(index.length_N.mean() / 1024),
        size=size,
        repeats=repeats,
        left_out=left_out,
        rows=tuple(_measured(name, timed) for name in ways),
    )


def _seconds_per_image(way: Provider) -> dict[str, float]:
    """Of every stage, and of "all" together."""
    clock = LapClock()
    began = time.thread_time()
    images = sum(way(clock))
    clock.seconds["all"] = time.thread_time() - began
    return {stage: seconds / images for stage, seconds in clock.seconds.items()}


def _measured(name: str, timed: list[dict[str, dict[str, float]]]) -> Measured:
    rates = _quartiles([1 / repeat[name]["all"] for repeat in timed])
    ratios = _quartiles([repeat[name]["all"] / repeat["namr"]["all"] for repeat in timed])
    stage_us = {
        f"{stage}_us": 1e6 * statistics.median(repeat[name][stage] for repeat in timed)
        for stage in STAGES
    }
    return Measured(
        provider=name,
        images_per_s=rates[1],
        images_per_s_q1=rates[0],
        images_per_s_q3=rates[2],
        ratio=ratios[1],
        ratio_q1=ratios[0],
        ratio_q3=ratios[2],
        **stage_us,
    )


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    first, middle, third = np.percentile(values, (25, 50, 75))
    return float(first), float(middle), float(third)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _why_no_torchvision() -> str:
    try:
        make_torchvision_importable()
        import torchvision.datasets  # noqa: F401
    except Exception as error:  # a torchvision built for another torch fails in many ways
        return f"torchvision cannot be imported ({error})"
    return ""


def _provenance() -> dict[str, str]:
    installed = {
        entry.metadata["Name"].lower(): entry.version for entry in metadata.distributions()
    }
    libraries = ", ".join(
        f"{name} {installed[name.lower()]}"
        for name in ("Pillow", "simplejpeg", "webdataset", "torchvision")
        if name.lower() in installed
    )
    return {**provenance(), "libraries": libraries}


def show(benchmark: Benchmark) -> None:
    """Print the figures."""
    table = Table(
        title=f"{benchmark.images} images of {benchmark.mean_kib:.0f} KiB on average ({benchmark.set_name}) "
        f"→ {benchmark.size} px, one core, {benchmark.repeats} repeats",
        title_justify="left",
    )
    for heading in (
        "provider",
        "images/s (quartiles)",
        "namr is faster by",
        *(f"{stage} µs" for stage in STAGES),
    ):
        table.add_column(heading, justify="left" if heading == "provider" else "right")
    for row in benchmark.rows:
        table.add_row(
            row.provider,
            f"{row.images_per_s:.0f} ({row.images_per_s_q1:.0f}–{row.images_per_s_q3:.0f})",
            f"{row.ratio:.2f} ({row.ratio_q1:.2f}–{row.ratio_q3:.2f})",
            *(f"{getattr(row, stage + '_us'):.0f}" for stage in STAGES),
        )
    console = Console()
    console.print(table)
    if benchmark.left_out:
        console.print(f"Without the rows of torchvision: {benchmark.left_out}", markup=False)


def to_csv(benchmark: Benchmark, path: Path) -> None:
    """Write the figures with machine, versions and commit, a line a provider."""
    about = {
        "set": benchmark.set_name,
        "images": benchmark.images,
        "mean_kib": benchmark.mean_kib,
        "size": benchmark.size,
        "repeats": benchmark.repeats,
        **_provenance(),
    }
    write_csv(path, [{**dataclasses.asdict(row), **about} for row in benchmark.rows])
