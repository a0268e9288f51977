"""From a listing of image files to a shard set: in parallel, the same bytes every time, resumed
where it broke off.

In the folder, beside the set itself: `build.json`, which says from the first moment what is built;
`skipped.csv`, the files that were left out; or, instead of a set, `broken.csv`, the files that
ended the build; and, until the manifest is written, a hidden file for each finished shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from namr_dist.atomic import write_atomic
from namr_dist.csv_file import write_csv
from namr_dist.data.build.layout import ShardPlan, shard_plans, tar_bytes, with_validation
from namr_dist.data.build.listing import Listing, SourceImage
from namr_dist.data.build.normalise import (
    TOO_LARGE,
    BrokenImageError,
    Encoding,
    as_shard_jpeg,
)
from namr_dist.data.build.progress import BuildProgress
from namr_dist.data.build.workers import Advance, run_tasks
from namr_dist.data.shardset.manifest import FILE_NAME, ImageClass, Manifest, Shard
from namr_dist.data.shardset.shards import Sample, write_shard
from namr_dist.errors import InputError
from namr_dist.json_file import parse_json

RECORD, SKIPPED, BROKEN = "build.json", "skipped.csv", "broken.csv"
"""Files that a build leaves: the second only if it left images out, the third only if such ended
it."""

_FORMAT = "namr-build/1"
_TOLD = 20
"""Broken files that an error names."""
_Broken = tuple[str, str, str]
"""A broken file: its path in the source, kind and detail."""
_UNREADABLE = "unreadable"
"""Kind of a broken file that the system would not read."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_FINISHED_SHARD = re.compile(r"\.(.+-\d{6}\.tar)\.json")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What, beside the images, decides the bytes of a shard set."""

    encoding: Encoding = field(default_factory=Encoding)
    shard_mib: float = 128.0
    """Aim for the size of a shard, in MiB, by the sizes of the source's files."""
    seed: int = 0
    """Of the order of classes, and of those for validation."""
    validation: float = 0.0
    """Share of the training classes that make a split "val"."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A shard set and what was done to its images."""

    manifest: Manifest
    treated: dict[str, int]
    """Images by normalise.Treatment."""
    skipped: dict[str, int]
    """Files that were left out, by kind of damage."""
    lost: tuple[str, ...]
    """Classes that are left out with all their images."""
    was_there: bool
    """Nothing was done: the same build had been finished before."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    plan: ShardPlan
    paths: tuple[str, ...]
    """Of its images inside their source."""
    classes: dict[int, ImageClass]
    depends: str
    """Digest of all that the shard's bytes follow from."""
    size: int
    """Of the sources together, in bytes."""
    tar_size: int
    """Of the tar if all of them keep their bytes."""


@dataclass(frozen=True, kw_only=True)
class _Finished:
    """A shard that is written, as its hidden file has it."""

    depends: str
    shard: Shard
    treated: dict[str, int]
    broken: list[_Broken]


def build(
    listing: Listing,
    out: Path,
    options: BuildOptions,
    *,
    workers: int = 1,
    skip_broken: bool = False,
) -> Built:
    """Write the listing's images as a shard set into `out`, which is new, empty, or of the same
    build.

    Raises InputError for a folder with anything else in it, or with a finished set of which a tar
    is gone, for too little disk space, files that are broken (unless skipped), and a worker that
    dies; shards that are finished by then stay, and the same call goes on.
    """
    listing = with_validation(listing, share=options.validation, seed=options.seed)
    inside = _paths_inside(listing)
    tasks = _tasks(listing, inside, options)
    record = {
        "format": _FORMAT,
        "name": listing.name,
        "description": listing.description,
        "options": _options_json(options),
        "listing": _digest(_listing_lines(listing, inside)),
    }
    sources = _digest(task.depends for task in tasks)
    there = _read_record(out, record)
    if there.get("sources") and (out / FILE_NAME).is_file():
        if there["sources"] != sources:
            raise InputError(
                f"{out} is a finished set, and files of its source have changed since; give a new folder"
            )
        manifest = Manifest.load(out)
        _check_tars(manifest)
        _remove(out, _TEMPORARY, _FINISHED_SHARD)
        return Built(
            manifest=manifest,
            treated=there["treated"],
            skipped=there["skipped"],
            lost=tuple(there["lost"]),
            was_there=True,
        )
    finished = {
        task.plan.file: finished_shard
        for task in tasks
        if (finished_shard := _read_finished(out, task, skip_broken=skip_broken))
    }
    waiting = [task for task in tasks if task.plan.file not in finished]
    if options.encoding.size is None:  # else nobody knows what the smaller images will take
        _check_space(out, waiting)
    out.mkdir(parents=True, exist_ok=True)
    with _only_build(out):
        if not there:
            write_atomic(out / RECORD, json.dumps(record, indent=2) + "\n")
        _clear(out, keep=set(finished))
        finished |= _write(listing.name, out, waiting, options.encoding, workers)
        done = [finished[task.plan.file] for task in tasks]
        broken = [entry for one in done for entry in one.broken]
        if broken and not skip_broken:
            _write_broken(out / BROKEN, broken)
            raise InputError(_told(broken, out / BROKEN, images=len(listing.images)))
        built = _complete(listing, out, done, broken)
        write_atomic(
            out / RECORD,
            json.dumps(
                {
                    **record,
                    "sources": sources,
                    "treated": built.treated,
                    "skipped": built.skipped,
                    "lost": built.lost,
                },
                indent=2,
            )
            + "\n",
        )
        _remove(out, _FINISHED_SHARD)
    return built


def _write(
    name: str, out: Path, tasks: list[_Task], encoding: Encoding, workers: int
) -> dict[str, _Finished]:
    """Write these shards; returns them by file name."""
    if tasks:
        # Of a build killed at its very end, whose sources changed since.
        (out / FILE_NAME).unlink(missing_ok=True)
    finished = {}
    try:
        with BuildProgress(
            name,
            images=sum(len(task.plan.images) for task in tasks),
            size=sum(task.size for task in tasks),
        ) as progress:
            work = functools.partial(_make_shard, out, encoding)
            for one in run_tasks(work, tasks, workers=workers, advance=progress.read):
                finished[one.shard.file] = one
    finally:
        _remove(out, _TEMPORARY)
    return finished


def _check_tars(manifest: Manifest) -> None:
    """Raise InputError for a tar of a finished set that is missing or of another size."""
    for shard in manifest.shards:
        path = manifest.folder / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            state = (
                "is missing"
                if size is None
                else f"has {size} bytes, its manifest says {shard.bytes}"
            )
            raise InputError(
                f"{manifest.folder} is a finished set, but {shard.file} {state}; remove the folder and "
                "build again"
            )


def _paths_inside(listing: Listing) -> dict[str, str]:
    """Each image's path inside its source, by key."""
    inside = functools.cache(lambda folder: os.path.relpath(folder, listing.root))
    return {
        image.key: os.path.normpath(os.path.join(inside(folder), name))
        for image in listing.images
        for folder, name in [os.path.split(image.path)]
    }


def _tasks(listing: Listing, inside: dict[str, str], options: BuildOptions) -> list[_Task]:
    stat_of = {image.key: image.path.stat() for image in listing.images}
    size_of = {key: stat.st_size for key, stat in stat_of.items()}
    classes = {entry.label: entry for entry in listing.classes}
    plans = shard_plans(
        listing, size_of, target_bytes=int(options.shard_mib * 2**20), seed=options.seed
    )
    tasks = []
    for plan in plans:
        own = {image.label: classes[image.label] for image in plan.images}
        lines = [repr((_FORMAT, plan.file, options.encoding, *own.values()))]
        for image in plan.images:
            lines.append(
                f"{_image_line(image, inside)}\t{size_of[image.key]}\t{stat_of[image.key].st_mtime_ns}"
            )
        tasks.append(
            _Task(
                plan=plan,
                paths=tuple(inside[image.key] for image in plan.images),
                classes=own,
                depends=_digest(lines),
                size=sum(size_of[image.key] for image in plan.images),
                tar_size=sum(tar_bytes(size_of[image.key]) for image in plan.images),
            )
        )
    return tasks


def _image_line(image: SourceImage, inside: dict[str, str]) -> str:
    return "\t".join(
        (image.key, str(image.label), image.split, image.role, image.group, inside[image.key])
    )


def _listing_lines(listing: Listing, inside: dict[str, str]) -> Iterator[str]:
    yield from map(repr, listing.classes)
    for image in listing.images:
        yield _image_line(image, inside)
    yield repr(sorted(listing.subsets.items()))


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _options_json(options: BuildOptions) -> dict[str, Any]:
    values = dataclasses.asdict(options)
    return {**values.pop("encoding"), **values}


def _read_record(out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What a build of this before has left in build.json; empty for a new folder. Raises InputError
    for another's."""
    if not out.exists() or (
        out.is_dir() and all(_TEMPORARY.fullmatch(path.name) for path in out.iterdir())
    ):
        return {}
    try:
        existing = parse_json((out / RECORD).read_bytes(), str(out / RECORD), "")
    except (OSError, InputError):
        existing = None
    if not isinstance(existing, dict) or existing.get("format") != _FORMAT:
        raise InputError(f"{out} is there and not from a build; give a new folder")
    for option, value in record["options"].items():
        if existing["options"].get(option) != value:
            raise InputError(
                f"{out} is of a build with other options ({option} {existing['options'].get(option)}, "
                f"here {value}); give the same, or a new folder"
            )
    if any(existing[key] != record[key] for key in ("name", "description", "listing")):
        raise InputError(
            f"{out} is of a build from another listing ({existing['name']}: {existing['description']}); "
            "give a new folder"
        )
    return existing


def _finished_path(out: Path, file: str) -> Path:
    return out / f".{file}.json"


def _read_finished(out: Path, task: _Task, *, skip_broken: bool) -> _Finished | None:
    """The shard, if it is written and all it depends on is as it was then.

    Not one with broken files that are not to be skipped: a repair may keep size and time. Nor one
    with files that the system would not read, which says nothing of the files.
    """
    try:
        path = _finished_path(out, task.plan.file)
        value = parse_json(path.read_bytes(), str(path), f"remove {path}")
        size = (out / task.plan.file).stat().st_size
    except FileNotFoundError:
        return None
    if value["depends"] != task.depends or size != value["shard"]["bytes"]:
        return None
    if any(kind == _UNREADABLE or not skip_broken for _, kind, _ in value["broken"]):
        return None
    return _Finished(
        **{
            **value,
            "shard": Shard.from_json(value["shard"]),
            "broken": [tuple(entry) for entry in value["broken"]],
        }
    )


def _check_space(out: Path, waiting: list[_Task]) -> None:
    needed = sum(task.tar_size for task in waiting)
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"the shards need about {needed / 2**20:,.0f} MiB, and {there} has {free / 2**20:,.0f} MiB "
            "free; free some space or give another folder"
        )


@contextlib.contextmanager
def _only_build(out: Path) -> Iterator[None]:
    """Two builds in one folder would remove each other's unfinished files."""
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another build is writing into {out}; wait until it ends") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(folder)


def _clear(out: Path, *, keep: set[str]) -> None:
    """Remove what a build that was killed left unfinished, and shards whose sources have changed
    since."""
    _remove(out, _TEMPORARY)
    for path in list(out.iterdir()):
        match = _FINISHED_SHARD.fullmatch(path.name)
        if match and match[1] not in keep:
            (out / match[1]).unlink(missing_ok=True)
            path.unlink()


def _remove(out: Path, *patterns: re.Pattern[str]) -> None:
    """Remove the files with such names."""
    for path in list(out.iterdir()):
        if any(pattern.fullmatch(path.name) for pattern in patterns):
            path.unlink(missing_ok=True)


def _make_shard(out: Path, encoding: Encoding, task: _Task, advance: Advance) -> _Finished:
    """Write one shard, and after it the hidden file that says so. Broken images are left out and
    named."""
    treated: Counter[str] = Counter()
    broken: list[_Broken] = []

    def samples() -> Iterator[Sample]:
        for image, path in zip(task.plan.images, task.paths, strict=True):
            try:
                data = _read(image.path)
                advance(1, len(data))
                jpeg, treatment = as_shard_jpeg(data, encoding)
            except BrokenImageError as error:
                broken.append((path, error.kind, error.detail))
                continue
            except MemoryError:
                raise InputError(
                    f"{image.path} needs more memory than there is; give the same command again with "
                    "fewer --workers: finished shards are kept"
                ) from None
            treated[treatment] += 1
            yield Sample(
                key=image.key,
                jpeg=jpeg,
                label=image.label,
                source=path,
                role=image.role,
                group=image.group,
            )

    shard = write_shard(out, task.plan.file, task.plan.split, samples(), task.classes)
    finished = _Finished(depends=task.depends, shard=shard, treated=dict(treated), broken=broken)
    write_atomic(_finished_path(out, shard.file), json.dumps(dataclasses.asdict(finished)))
    return finished


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BrokenImageError(_UNREADABLE, str(error.strerror)) from None


def _told(broken: list[_Broken], path: Path, *, images: int) -> str:
    kinds = ", ".join(
        f"{number} {kind}"
        for kind, number in sorted(Counter(kind for _, kind, _ in broken).items())
    )
    named = ", ".join(
        f"{file} ({f'{kind}: {detail}' if kind == TOO_LARGE else kind})"
        for file, kind, detail in broken[:_TOLD]
    )
    more = f" and {len(broken) - _TOLD} more" if len(broken) > _TOLD else ""
    return (
        f"{len(broken)} of {images} images are broken ({kinds}): {named}{more}; all are in {path}; add "
        "--skip-broken to leave them out, or repair them: finished shards are kept (to delete them would change "
        "the listing, which takes a new folder)"
    )


def _write_broken(path: Path, broken: list[_Broken]) -> None:
    write_csv(
        path,
        [
            {"path": file, "reason": f"{kind} ({detail})" if detail else kind}
            for file, kind, detail in broken
        ],
    )


def _complete(listing: Listing, out: Path, done: list[_Finished], broken: list[_Broken]) -> Built:
    """Write the manifest, and before it the list of what was left out."""
    shards = tuple(one.shard for one in done if one.shard.keys)
    keys = {key for shard in shards for key in shard.keys}
    labels = {label for shard in shards for label in shard.labels}
    if not keys:
        raise InputError(
            f"no image of {listing.name} is whole: there is nothing to build; unpack the download again"
        )
    for one in done:
        if not one.shard.keys:
            (out / one.shard.file).unlink(missing_ok=True)
    subsets = {
        name: tuple(key for key in members if key in keys)
        for name, members in listing.subsets.items()
    }
    manifest = Manifest(
        name=listing.name,
        description=listing.description,
        classes=tuple(entry for entry in listing.classes if entry.label in labels),
        shards=shards,
        folder=out,
        subsets={name: members for name, members in subsets.items() if members},
    )
    (out / BROKEN).unlink(missing_ok=True)
    if broken:
        _write_broken(out / SKIPPED, broken)
    else:  # a build that skipped some and was killed may have left it
        (out / SKIPPED).unlink(missing_ok=True)
    manifest.save()
    treated: Counter[str] = Counter()
    for one in done:
        treated.update(one.treated)
    return Built(
        manifest=manifest,
        treated=dict(sorted(treated.items())),
        skipped=dict(sorted(Counter(kind for _, kind, _ in broken).items())),
        lost=tuple(entry.name for entry in listing.classes if entry.label not in labels),
        was_there=False,
    )
