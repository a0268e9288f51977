"""Files that others made, changed at random: each is read, or refused by a clear error, never by a
traceback.

Half of the changes are of bytes; the other half replace, remove and add values of the parsed JSON.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import hashlib
import io
import json
import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from conftest import make_shards, picture
from pictures import saved
from PIL import Image

from namr_dist import verified_json
from namr_dist.config import Config, DataConfig, ModelConfig, OptimConfig
from namr_dist.data.build.formats import folder as own_images
from namr_dist.data.build.normalise import Encoding, as_shard_jpeg, viewed
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.shards import check_jpeg
from namr_dist.data.shardset.verify import verify
from namr_dist.errors import InputError
from namr_dist.launchers.hostfile import node_command, read_hostfile, ssh_command
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.results import export
from namr_dist.results.page import write_report
from namr_dist.run.log import cut_log, read_log
from namr_dist.run.state import RunReader
from namr_dist.run.top import view
from namr_dist.terminal import Console
from namr_dist.train.checkpoints.network import initial_network, load_network, save_network
from namr_dist.train.checkpoints.parts import INDEX, Piece, finish, write_part
from namr_dist.train.checkpoints.state import open_state
from namr_dist.train.checkpoints.verified_file import (
    DamagedFileError,
)

SEED = 7
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    2**70,
    10**400,
    -(2**63),
    "",
    "x",
    "../../etc/passwd",
    "\x1b[31m",
    "[/]",
    "\0",
    "\ud800",
    "\u202e",
    "x" * 3000,
    [],
    {},
    [[]],
    {"a": 1},
]
HEADER = b'{"__metadata__":{"sha256":"'
CONFIG = Config(
    recipe="folder",
    data=DataConfig(path="shards", classes_per_batch=4, images_per_class=2, image_size=32),
    model=ModelConfig(backbone="conv4", width=8, structure_hidden=8),
    optim=OptimConfig(steps=20),
)


@dataclass(frozen=True)
class Case:
    """Makes a changed file's bytes, and reads them as the product does."""

    make: Callable[[random.Random], bytes]
    use: Callable[[bytes], object]


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(changed)) if changed else 0
        match rng.randrange(5):
            case 0 if changed:
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if changed:
                changed[at] = rng.choice(b'\0\xff\n",{}[]\\ A9-')
            case 2:
                del changed[at : at + rng.randrange(1, 64)]
            case 3:
                changed[at:at] = rng.randbytes(rng.randrange(1, 16))
            case _:
                start = rng.randrange(len(changed)) if changed else 0
                changed[at:at] = changed[start : start + rng.randrange(1, 80)]
    return bytes(changed)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        yield (*path, key)
        if isinstance(child, (dict, list)):
            yield from places(child, (*path, key))


def changed_json(rng: random.Random, value: Any) -> Any:
    changed = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2])):
        paths = list(places(changed))
        if not paths:
            break
        *above, key = rng.choice(paths)
        at = changed
        for step in above:
            at = at[step]
        kind = rng.random()
        if kind < 0.7:
            at[key] = rng.choice(VALUES)
        elif kind < 0.85:
            del at[key]
        elif isinstance(at, dict):
            at[rng.choice(["new", "z_s", "[/]_s", "\x1b_s"])] = rng.choice(VALUES)
        else:
            at.append(rng.choice(VALUES))
    return changed


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def json_or_bytes(data: bytes) -> Callable[[random.Random], bytes]:
    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return changed_bytes(rng, data)
        if rng.random() < 0.05:
            return rng.choice([b"[" * 100_000, b'{"a":' * 100_000, b"[" * 99 + b"]" * 99])
        return as_bytes(changed_json(rng, json.loads(data)))

    return make


def lines_of(data: bytes) -> Callable[[random.Random], bytes]:
    lines = data.splitlines(keepends=True)

    def make(rng: random.Random) -> bytes:
        changed = list(lines)
        for _ in range(rng.choice([1, 2, 3])):
            at = rng.randrange(len(changed))
            if rng.random() < 0.5:
                changed[at] = changed_bytes(rng, lines[at])
            else:
                changed[at] = as_bytes(changed_json(rng, json.loads(lines[at]))) + b"\n"
        return b"".join(changed)

    return make


def in_file(path: Path, use: Callable[[Path], object]) -> Callable[[bytes], object]:
    def write_and_use(data: bytes) -> object:
        path.write_bytes(data)
        return use(path)

    return write_and_use


def manifest_case(folder: Path) -> Case:
    shards = make_shards(folder, classes={"train": 2, "test": 2}, images=2)

    def use(path: Path) -> None:
        manifest = Manifest.load(path.parent)
        manifest.index(*manifest.splits)
        manifest.split_hash(*manifest.splits)

    path = shards.folder / "manifest.json"
    return Case(make=json_or_bytes(path.read_bytes()), use=in_file(path, use))


def tar_case(folder: Path) -> Case:
    """Headers of a tar, which a manifest of the right size and hash names."""
    manifest = make_shards(folder, classes={"train": 2, "test": 2}, images=2)
    path = folder / manifest.shards[0].file
    whole, body = path.read_bytes(), json.loads((folder / "manifest.json").read_bytes())
    heads = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    sizes = [b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7, b"7" * 11 + b"\0", b"\xff" * 12, b"-1"]

    def make(rng: random.Random) -> bytes:
        tar = bytearray(whole)
        for _ in range(rng.choice([1, 2, 4])):
            head = rng.choice(heads)
            if rng.random() < 0.3:
                tar[head + 124 : head + 136] = rng.choice(sizes).ljust(12, b"\0")
            elif rng.random() < 0.3:
                tar[head + 156] = rng.choice(b"0123456789LKxgSDVN\0")
            else:
                tar[head + rng.randrange(512)] = rng.randrange(256)
            if rng.random() < 0.8:
                tar[head + 148 : head + 156] = b" " * 8
                tar[head + 148 : head + 156] = b"%06o\0 " % sum(tar[head : head + 512])
        return bytes(tar)

    def use(path: Path) -> None:
        tar = path.read_bytes()
        stated = copy.deepcopy(body)
        stated["shards"][0] |= {"bytes": len(tar), "sha256": hashlib.sha256(tar).hexdigest()}
        (folder / "manifest.json").write_bytes(as_bytes(stated))
        verify(Manifest.load(folder))

    return Case(make=make, use=in_file(path, use))


def config_case(folder: Path) -> Case:
    def use(path: Path) -> None:
        Config.load(path).check()

    data = CONFIG.to_json().encode()
    return Case(make=json_or_bytes(data), use=in_file(folder / "config.json", use))


def log_lines() -> bytes:
    lines: list[dict[str, Any]] = [{"step": 0, "resumed": "step-00000000", "time_s": 0.5}]
    for step in range(1, 21):
        lines.append({"step": step, "epoch": 0, "loss": 1 / step, "lr": 1e-4, "time_s": step})
        if step % 5 == 0:
            speed = {"img_per_s": 9.5, "data_s": 0.1, "forward_s": 0.2, "slowest_rank": 0}
            lines.append({"step": step, **speed, "slowest_host": "a", "slowest_s": 0.2})
            lines.append({"step": step, "val": {"R@1": 50.0, "MAP@R": 20.0}, "time_s": step})
    return b"".join(as_bytes(line) + b"\n" for line in lines)


def run_folder(folder: Path) -> Path:
    (folder / "config.json").write_text(CONFIG.to_json())
    (folder / "metrics.jsonl").write_bytes(log_lines())
    figures = {"R@1": 50.0, "MAP@R": 20.0, "R-precision": 30.0}
    test = {"sample": {**figures, "NMI": 0.5, "AMI": 0.4}, "structure": figures}
    metrics = {
        "test": test,
        "baselines": {"raw pixels": figures},
        "test_counts": {"queries": 12, "items": 12, "left_out": 0},
        "test_protocol": {"distance": "cosine"},
        "protocol": {"data set": "own", "test hash": "00", "test split": "test"},
        "own_modes": {"mine": {"sentence": "by chance", "looks_at_gallery": False}},
        "reidentification": {"modes": {}, "queries": 1, "gallery": 1, "draws": 1},
    }
    (folder / "metrics.json").write_bytes(as_bytes(metrics))
    z_ND = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    labels_N = np.arange(12) // 3
    (folder / "embeddings.safetensors").write_bytes(
        safetensors.numpy.save({"z": z_ND, "labels": labels_N})
    )
    return folder


def report(run: Path) -> None:
    jpeg = saved(Image.fromarray(picture(0, 0)), "JPEG")
    write_report(run, lambda image: jpeg, [f"n{image}" for image in range(12)], [""] * 12)


def report_case(folder: Path, name: str) -> Case:
    path = run_folder(folder) / name
    make = lines_of if name.endswith("l") else json_or_bytes
    return Case(make=make(path.read_bytes()), use=in_file(path, lambda path: report(folder)))


def top_case(folder: Path) -> Case:
    path = run_folder(folder) / "metrics.jsonl"

    def use(path: Path) -> None:
        Console(file=io.StringIO(), width=100).print(view(RunReader(folder).look()))

    return Case(make=lines_of(path.read_bytes()), use=in_file(path, use))


def resume_case(folder: Path) -> Case:
    def use(path: Path) -> None:
        read_log(path)
        cut_log(path, 11)

    return Case(make=lines_of(log_lines()), use=in_file(folder / "metrics.jsonl", use))


def hostfile_case(folder: Path) -> Case:
    def use(path: Path) -> None:
        hosts = read_hostfile(path)
        for node, host in enumerate(hosts):
            ssh_command(host, node_command(hosts, node, port=1, words=["homeware"]))
            assert host.isprintable()

    data = b"# two\nnode-a slots=8\nnode-b slots=8 # x\n10.0.0.3 slots=4\n"
    return Case(make=lambda rng: changed_bytes(rng, data), use=in_file(folder / "hosts", use))


def table_case(folder: Path) -> Case:
    text = io.StringIO()
    writer = csv.writer(text)
    columns = ("path", "label", "split", "is_query", "is_gallery", "category", "group")
    writer.writerow(columns)
    for image in range(8):
        (folder / f"{image}.jpg").write_bytes(b"x")
        split = "train" if image < 4 else "test"
        flags = ("", "") if image < 4 else ("true", "false") if image % 2 else ("false", "true")
        writer.writerow((f"{image}.jpg", f"c{image // 2}", split, *flags, "k", "g"))
    data = text.getvalue().encode()
    use = in_file(folder / "t.csv", own_images.read)
    return Case(make=lambda rng: changed_bytes(rng, data), use=use)


def image_case(folder: Path) -> Case:
    image = Image.fromarray(picture(0, 0))
    files = [saved(image, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP")]
    files += [saved(image, "JPEG", progressive=True), saved(image.convert("RGBA"), "PNG")]

    def use(data: bytes) -> None:
        for read in (
            lambda: as_shard_jpeg(data, Encoding(size=20)),
            lambda: viewed(data),
            lambda: check_jpeg(data, "x", decode=True),
        ):
            with contextlib.suppress(InputError):
                read()

    return Case(make=lambda rng: changed_bytes(rng, rng.choice(files)), use=use)


def checkpoint_case(folder: Path) -> Case:
    """An index, or the header of a part, whose hash is right."""
    path = folder / "step-00000015"
    about: dict[str, Any] = {"format": "namr-training/2", "version": "0", "versions": {}}
    about |= {
        "step": 15,
        "ranks": 1,
        "zero_stage": 0,
        "data": "d",
        "config": json.loads(CONFIG.to_json()),
    }
    pieces = {
        "model/x": Piece(values=torch.arange(6.0), shape=(2, 3)),
        "rank/00000/rng_cpu": Piece(values=torch.arange(4), shape=(4,)),
    }
    finish(path, about, [write_part(path, 0, pieces)])
    part = path / "rank-00000.safetensors"
    index, whole = (path / INDEX).read_bytes(), part.read_bytes()
    of_index = json.loads(index)
    del of_index["sha256"]
    end = 8 + int.from_bytes(whole[:8], "little")
    start = 8 + len(HEADER) + 64

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            text = json.dumps(changed_json(rng, of_index), indent=1)
            return changed_bytes(rng, text.encode()) if rng.random() < 0.3 else text.encode()
        if rng.random() < 0.5:
            header = whole[8:start] + changed_bytes(rng, whole[start:end])
        else:
            parsed = json.loads(whole[8:end])
            if rng.random() < 0.5:
                cut = {"model/x": {"start": 0, "shape": [2, 3]}}
                parsed["__metadata__"]["cut"] = json.dumps(changed_json(rng, cut))
            else:
                parsed = changed_json(rng, parsed)
            header = json.dumps(parsed, separators=(",", ":")).encode()
        data = len(header).to_bytes(8, "little") + header + whole[end:]
        at = 8 + len(HEADER)
        digest = hashlib.sha256(data[:at] + b"0" * 64 + data[at + 64 :]).hexdigest().encode()
        return data[:at] + digest + data[at + 64 :]

    def use(data: bytes) -> object:
        if data[8 : 8 + len(HEADER)] != HEADER:
            (path / INDEX).write_bytes(data)
            part.write_bytes(whole)
            return open_state(path)
        part.write_bytes(data)
        digest = data[8 + len(HEADER) :][:64].decode("latin-1")
        parts = [{"file": part.name, "bytes": len(data), "sha256": digest}]
        (path / INDEX).write_text(verified_json.dumps({**of_index, "parts": parts}))
        return open_state(path)

    return Case(make=make, use=use)


def small_network() -> EmbeddingNetwork:
    return initial_network(CONFIG, device=torch.device("cpu"), pretrained=False)


def network_case(folder: Path) -> Case:
    path = folder / "final.safetensors"
    save_network(path, small_network().state_dict(), CONFIG, trained={"steps": 1})
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")

    def use(path: Path) -> None:
        load_network(path, CONFIG, device=torch.device("cpu"))

    return Case(
        make=lambda rng: changed_bytes(rng, whole[:end]) + whole[end:], use=in_file(path, use)
    )


def export_case(folder: Path, name: str) -> Case:
    state = small_network().state_dict()
    weights = safetensors.torch.save({key: value.contiguous() for key, value in state.items()})
    (folder / "model.safetensors").write_bytes(weights)
    about = {"format": "namr-export/1", "config": json.loads(CONFIG.to_json())}
    (folder / "config.json").write_bytes(as_bytes(about))
    use = in_file(folder / name, lambda path: export.load(folder))
    if name == "config.json":
        return Case(make=json_or_bytes(as_bytes(about)), use=use)
    end = 8 + int.from_bytes(weights[:8], "little")
    return Case(make=lambda rng: changed_bytes(rng, weights[:end]) + weights[end:], use=use)


CASES: dict[str, tuple[Callable[[Path], Case], int]] = {
    "manifest": (manifest_case, 60),
    "tar headers": (tar_case, 30),
    "config": (config_case, 60),
    "top": (top_case, 30),
    "resume": (resume_case, 60),
    "log in report": (lambda folder: report_case(folder, "metrics.jsonl"), 5),
    "metrics in report": (lambda folder: report_case(folder, "metrics.json"), 10),
    "config in report": (lambda folder: report_case(folder, "config.json"), 5),
    "hostfile": (hostfile_case, 100),
    "table": (table_case, 60),
    "images": (image_case, 60),
    "checkpoint header": (checkpoint_case, 60),
    "network header": (network_case, 30),
    "export's config": (lambda folder: export_case(folder, "config.json"), 30),
    "export's header": (lambda folder: export_case(folder, "model.safetensors"), 30),
}
"""The corpus, and how many changes `make test` tries."""


@dataclass
class Outcomes:
    """What came of the changed files of a case."""

    read: int = 0
    refused: int = 0
    tracebacks: list[str] = field(default_factory=list)


def outcomes(case: Case, count: int) -> Outcomes:
    found = Outcomes()
    for number in range(count):
        data = case.make(random.Random(f"{SEED} {number}"))
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                case.use(data)
            found.read += 1
        except (InputError, DamagedFileError):
            found.refused += 1
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                found.refused += 1  # printed as one line, with the file
                continue
            at = traceback.extract_tb(error.__traceback__)[-1]
            own = [
                f"{Path(frame.filename).name}:{frame.lineno}"
                for frame in traceback.extract_tb(error.__traceback__)
                if "namr_dist" in frame.filename or "launchers" in frame.filename
            ]
            found.tracebacks.append(
                f"{number}: {type(error).__name__} {error} at {Path(at.filename).name}:{at.lineno} "
                f"by {', '.join(own[-3:])}: {data[:40]!r}"[:600]
            )
    return found


Record = Callable[[str, object], None]


def check(case: Case, count: int, record_property: Record) -> None:
    """The numbers go into pytest's report, where tools/make_reliability.py reads them."""
    found = outcomes(case, count)
    record_property("changes", count)
    record_property("read", found.read)
    record_property("refused", found.refused)
    record_property("tracebacks", len(found.tracebacks))
    assert not found.tracebacks


@pytest.mark.parametrize("name", CASES)
def test_a_changed_file_is_read_or_refused_in_words(
    name: str, tmp_path: Path, record_property: Record
) -> None:
    make, count = CASES[name]
    check(make(tmp_path), count, record_property)


@pytest.mark.whole
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_five_hundred_changed_files_are_read_or_refused(
    name: str, tmp_path: Path, record_property: Record
) -> None:
    make, _ = CASES[name]
    check(make(tmp_path), 500, record_property)
