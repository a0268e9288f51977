"""One bit changed in a file: who finds it?"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reliability.processes import PROTOCOL, finish, make_set, settings, start_parent
from reliability.text import table

from namr_dist import verified_json
from namr_dist.config import Config
from namr_dist.data.location import open_shards
from namr_dist.data.read.stream import ShardImages
from namr_dist.data.shardset.manifest import FILE_NAME, Manifest
from namr_dist.data.shardset.verify import verify
from namr_dist.errors import DamagedFileError, InputError
from namr_dist.results import export
from namr_dist.results.record import read_run
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.network import load_network
from namr_dist.train.checkpoints.resume import check_same
from namr_dist.train.checkpoints.state import open_state
from namr_dist.train.embed import test_transform

EACH, SEED, STEPS = 200, 0, 12
FOUND, MISSED, HARMLESS, TRACEBACK = "found", "not found", "changes nothing", "traceback"
_JSON_HEADER_BYTES = 128
"""Where a file's own hash stands, if it carries one."""
_TAR_BLOCK_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file, and who reads it."""

    name: str
    path: Path
    read_by: str
    read: Callable[[], str | None]
    """Raises InputError or DamagedFileError where the change is found; else says what came of it,
    None for MISSED"""
    header: Callable[[bytes], list[range]]
    """Which bytes of the whole file are its header"""


def measure(folder: Path, trial: int | None) -> dict[str, Any]:
    """Flips in each kind of file. trial: so many instead of EACH."""
    shards, run = make_set(folder / "set"), RunFolder(folder / "run")
    start_parent()
    more = ("--set.train.checkpoint_every", 5)
    for words in (
        ["train", *settings(run.path, shards, STEPS, *more)],
        ["evaluate", run.path],
        ["export", run.path, "--out", folder / "export", "--formats", "safetensors"],
    ):
        finish(words, folder / "said")
    torch.set_num_threads(1)
    kinds = []
    for kind in _kinds(run, folder / "export", shards):
        kinds.append(_flips(kind, trial or EACH, folder))
        print(kinds[-1], flush=True)
    return {
        "protocol": f"One bit of the whole file, drawn with seed {SEED}; each fourth in its header "
        f"(that of safetensors, a tar's blocks of names and sizes, the first {_JSON_HEADER_BYTES} "
        f"bytes of JSON). The files of a run: {PROTOCOL}",
        "kinds": kinds,
    }


def _flips(kind: Kind, count: int, folder: Path) -> dict[str, Any]:
    whole, place = kind.path.read_bytes(), bytes(folder)
    shown = whole.replace(place, b"." * len(place))  # a folder of this machine
    header = [at for part in kind.header(whole) for at in part]
    rng = random.Random(f"{SEED} {kind.name}")
    outcomes: Counter[str] = Counter()
    missed = []
    for number in range(count):
        at = rng.choice(header) if number % 4 == 0 else rng.randrange(len(whole))
        bit = rng.randrange(8)
        changed = bytearray(whole)
        changed[at] ^= 1 << bit
        kind.path.write_bytes(changed)
        try:
            outcome = kind.read() or MISSED
        except (InputError, DamagedFileError):
            outcome = FOUND
        except Exception as error:
            # Of the operating system's errors, every command prints one line, with the file.
            ours = isinstance(error, OSError) and error.errno is not None
            outcome = FOUND if ours else TRACEBACK
            if not ours:
                missed.append(f"byte {at}, bit {bit}: {type(error).__name__}: {error}"[:300])
        if outcome == MISSED:
            missed.append(f"byte {at}, bit {bit}, in {shown[max(0, at - 20) : at + 20]!r}")
        outcomes[outcome] += 1
    kind.path.write_bytes(whole)
    assert kind.read() in (MISSED, HARMLESS, None), "the whole file is not read as it was"
    return {
        "kind": kind.name,
        "bytes": len(whole),
        "flips": count,
        "read_by": kind.read_by,
        "outcomes": dict(outcomes),
        "not_found": missed,
    }


def _kinds(run: RunFolder, exported: Path, shards: Path) -> list[Kind]:
    config = Config.load(run.config)
    _, checkpoint = run.checkpoints()[-1]
    device = torch.device("cpu")

    def kind(name: str, path: Path, read_by: str, read: Callable[[], object]) -> Kind:
        tensors = path.suffix == ".safetensors"

        def discarded() -> None:
            read()

        return Kind(
            name=name,
            path=path,
            read_by=read_by,
            read=discarded,
            header=_of_tensors if tensors else lambda data: [range(_JSON_HEADER_BYTES)],
        )

    def state() -> None:
        open_state(checkpoint)

    of_state = "`--resume` (`open_state`)"
    parts = sorted(checkpoint.rglob("*") if checkpoint.is_dir() else [checkpoint], key=_size)
    kinds = [kind(f"step checkpoint, {_generic(parts[-1], run)}", parts[-1], of_state, state)]
    kinds += [
        kind(f"step checkpoint, {_generic(path, run)}", path, of_state, state)
        for path in parts[:-1]
        if path.suffix == ".json"
    ]
    shard = shards / "train-0.tar"
    return [
        *kinds,
        kind(
            "final.safetensors",
            run.final,
            "`namr evaluate`, `export`, `embed` (`load_network`)",
            lambda: load_network(run.final, config, device=device),
        ),
        kind(
            "embeddings.safetensors",
            run.embeddings,
            "`namr report` (`read_run`)",
            lambda: read_run(run.path),
        ),
        kind("metrics.json", run.metrics, "`namr report` (`read_run`)", lambda: read_run(run.path)),
        kind(
            "classes.json",
            run.classes,
            "`namr reproduce` (`verified_json`)",
            lambda: verified_json.loads_object(run.classes.read_bytes(), str(run.classes), "–"),
        ),
        kind(
            "model.safetensors of an export",
            exported / "model.safetensors",
            "`export.load`",
            lambda: export.load(exported),
        ),
        kind(
            "config.json of an export",
            exported / "config.json",
            "`export.load`",
            lambda: export.load(exported),
        ),
        Kind(
            name="a shard (tar)",
            path=shard,
            read_by="`namr shards verify`",
            read=lambda: _verified(shards),
            header=_of_tar,
        ),
        Kind(
            name="a shard (tar)",
            path=shard,
            read_by="training (CRC-32 of each image)",
            read=_trains_as_before(shards, config),
            header=_of_tar,
        ),
        Kind(
            name="manifest.json of a set",
            path=shards / FILE_NAME,
            read_by="every command",
            read=_reads_manifest(shards, verified=False),
            header=lambda data: [range(_JSON_HEADER_BYTES)],
        ),
        Kind(
            name="manifest.json of a set",
            path=shards / FILE_NAME,
            read_by="`namr shards verify`",
            read=_reads_manifest(shards, verified=True),
            header=lambda data: [range(_JSON_HEADER_BYTES)],
        ),
        Kind(
            name="config.json of a run",
            path=run.config,
            read_by="`namr evaluate` and others",
            read=lambda: _config(run.config, config, resume=False),
            header=lambda data: [range(_JSON_HEADER_BYTES)],
        ),
        Kind(
            name="config.json of a run",
            path=run.config,
            read_by="`--resume`, which is given the settings again",
            read=lambda: _config(run.config, config, resume=True),
            header=lambda data: [range(_JSON_HEADER_BYTES)],
        ),
    ]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _generic(path: Path, run: RunFolder) -> str:
    """Its name in the folder of checkpoints, with any step."""
    name = str(path.relative_to(run.checkpoint_folder))
    return name.replace(f"{run.checkpoints()[-1][0]:08d}", "…")


def _of_tensors(data: bytes) -> list[range]:
    return [range(8 + int.from_bytes(data[:8], "little"))]


def _of_tar(data: bytes) -> list[range]:
    return [
        range(at, at + _TAR_BLOCK_BYTES)
        for at in range(0, len(data), _TAR_BLOCK_BYTES)
        if data[at + 257 : at + 262] == b"ustar"
    ]


def _verified(shards: Path) -> None:
    if problems := verify(Manifest.load(shards)).problems:
        raise InputError(problems[0])


def _trains_as_before(shards: Path, config: Config) -> Callable[[], str | None]:
    """Reads every training image as training does, with the set opened again, and compares those
    that are read with the ones from before: training reads no byte of a tar but its images'."""

    def read() -> list[bytes]:
        manifest = Manifest.load(shards)
        index = manifest.index("train")
        images = ShardImages(manifest, index, test_transform(config))
        return [images.jpeg(position) for position in range(len(index))]

    before = read()
    return lambda: HARMLESS if read() == before else None


def _reads_manifest(shards: Path, *, verified: bool) -> Callable[[], str | None]:
    before = Manifest.load(shards)

    def read() -> str | None:
        if verified:
            _verified(shards)
        return HARMLESS if Manifest.load(shards) == before else None

    return read


def _config(path: Path, before: Config, *, resume: bool) -> str | None:
    there = Config.load(path)
    there.check()
    open_shards(there.data.path, there.data.remote)
    if resume:
        check_same(path, there, before)
    return HARMLESS if there == before else None


def tables(record: dict[str, Any]) -> list[str]:
    """A line a kind and reader."""
    names = (FOUND, HARMLESS, MISSED, TRACEBACK)
    lines = [
        [
            one["kind"],
            one["read_by"],
            f"{one['bytes']:,}",
            str(one["flips"]),
            *(str(one["outcomes"].get(name, 0)) for name in names),
        ]
        for one in record["kinds"]
    ]
    return table(["file", "read by", "bytes", "flips", *names], lines, words=2)
