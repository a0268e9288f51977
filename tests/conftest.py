"""What all tests share: a small real shard set, the command line as a process, and the rule on
skips."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from bad_server import BadServer
from training_runs import fork_namr, fork_python, start_parent

from namr_dist.config import RemoteConfig
from namr_dist.data.read.augment import TrainTransform
from namr_dist.data.read.plan import Sampling
from namr_dist.data.remote import address
from namr_dist.data.remote import transfer as transport
from namr_dist.data.shardset.manifest import ImageClass, Manifest
from namr_dist.data.shardset.shards import Sample, write_shard
from namr_dist.parallel.pool import Ranks

REPOSITORY = Path(__file__).parent.parent

TRANSFORM = TrainTransform(
    size=32,
    crop_scale=(0.3, 1.0),
    crop_ratio=(0.75, 1.33),
    flip=True,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
)
SAMPLING = Sampling(classes_per_batch=4, images_per_class=3)

# One thread a process: tests start several at a time on few cores, and results then never depend on
# how many.
torch.set_num_threads(1)
# The tests' servers are on this machine, where no proxy finds them.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
# Without torch.compile, which training has no use for: DeepSpeed imports a compiled function, and
# that takes seconds.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "160",
    "NO_COLOR": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
ON_GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
"""What tests marked gpu change of it: one GPU."""

# Otherwise to ask whether there is a GPU would start CUDA, which a process must not have done that
# forks others.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# Triton's kernels run on CPU tensors in these processes, by its interpreter; with a GPU they are
# compiled instead. Read when a kernel is defined, hence here, and after the environment of launched
# programs is fixed.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start several processes come first: they take longest, and one left to the end
    would run alone."""
    long = {item.path for item in items if item.get_closest_marker("dist")}
    items.sort(key=lambda item: item.path not in long)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked gpu wait for one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):  # type: ignore[no-untyped-def]
    """With NAMR_NO_SKIPS set (CI), a skipped test fails, unless it waits for a GPU."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("NAMR_NO_SKIPS") and "gpu" not in item.keywords:
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be: {report.longrepr}"


def picture(label: int, view: int, *, size: int = 48) -> np.ndarray:
    """A class's colours and stripes, shifted and shaded by view: learnable, and never twice the
    same."""
    rng = np.random.default_rng([label, view])
    base, stripe = np.random.default_rng(label).uniform(30, 225, (2, 3))
    rows, columns = np.mgrid[:size, :size]
    wave = (
        np.sin((rows * (1 + label % 5) + columns * (1 + label % 3) + 9 * view) * 2 * np.pi / size)
        > 0
    )
    image = np.where(wave[..., None], stripe, base) * rng.uniform(0.7, 1.2) + rng.normal(
        0, 12, (size, size, 3)
    )
    return np.clip(image, 0, 255).astype(np.uint8)


def make_shards(
    folder: Path, *, classes: dict[str, int], images: int = 6, size: int = 48
) -> Manifest:
    """A shard set of synthetic pictures with so many classes in each split."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[int, ImageClass] = {}
    shards = []
    for split, count in classes.items():
        first = len(entries)
        for label in range(first, first + count):
            entries[label] = ImageClass(
                label=label, name=f"thing {label}", category=f"kind {label % 3}", split=split
            )
        samples = [
            Sample(
                key=f"{label:03d}_{view}",
                label=label,
                jpeg=simplejpeg.encode_jpeg(picture(label, view, size=size), quality=90),
            )
            for label in range(first, first + count)
            for view in range(images)
        ]
        half = len(samples) // images // 2 * images
        for number, part in enumerate((samples[:half], samples[half:])):
            shards.append(write_shard(folder, f"{split}-{number}.tar", split, part, entries))
    manifest = Manifest(
        name="synthetic",
        description="stripes",
        classes=tuple(entries.values()),
        shards=tuple(shards),
        folder=folder,
    )
    manifest.save()
    return manifest


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """12 training, 4 validation and 6 test classes of six 48 px images each. Not to be changed."""
    return make_shards(
        tmp_path_factory.mktemp("shards"), classes={"train": 12, "val": 4, "test": 6}
    )


@pytest.fixture
def own_shard_set(tmp_path: Path) -> Manifest:
    """The same, for a test that damages it."""
    return make_shards(tmp_path / "shards", classes={"train": 12, "val": 4, "test": 6})


@pytest.fixture
def server(shard_set: Manifest) -> Iterator[BadServer]:
    """Serves the shard set."""
    with BadServer(shard_set.folder) as server:
        yield server


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteConfig:
    """A cache of its own and short pauses between tries. A pause of the tests' process is not taken
    for a stall."""
    monkeypatch.setattr(transport, "_FIRST_WAIT_S", 0.01)
    # What a host that is none says, a proxy would say in its own words; and no store of s3 is
    # asked.
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # fsspec's store in this process's memory stands for those that need a network.
    monkeypatch.setattr(address, "STORES", address.STORES | {"memory"})
    return RemoteConfig(cache=tmp_path / "cache", retries=2, stall_seconds=10)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two gloo processes for the whole session."""
    start_parent()
    with Ranks(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """Four of them."""
    start_parent()
    with Ranks(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def namr() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line as a process of its own."""

    def run(*words: object, **options) -> subprocess.CompletedProcess[str]:  # type: ignore[no-untyped-def]
        return launch(sys.executable, "-m", "namr_dist.cli", *words, **options)

    return run


@pytest.fixture(scope="session")
def forked_namr(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same in a fork of a process that has imported all, which saves the seconds that a start
    takes. For tests of what a command does; that it starts, the others show."""
    start_parent()
    folder, counter = tmp_path_factory.mktemp("forked"), itertools.count()
    return lambda *words, **options: fork_namr(folder / str(next(counter)), *words, **options)


@pytest.fixture(scope="session")
def forked_python(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program's text as `python -c` does, in such a fork; Triton's kernels are not
    interpreted there."""
    start_parent()
    folder, counter = tmp_path_factory.mktemp("scripts"), itertools.count()
    return lambda text, *words: fork_python(folder / str(next(counter)), text, *words)


def launch(
    *words: object, timeout: float = 240, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run any program with the tests' environment and return what it said."""
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**ENVIRONMENT, **(env or {})},
        check=False,
    )


def copy_tree(folder: Path) -> None:
    """A second checkout in a folder: the code, without homeware's images."""
    for name in ("namr_dist", "kernels", "launchers"):
        shutil.copytree(
            REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("*.tar", "__pycache__")
        )
    shutil.copy(REPOSITORY / "setup.py", folder)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may still wait to be asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it goes while it is read
        return False


def small_run(manifest: Manifest, *, steps: int = 6) -> list[object]:
    """Overrides that make homeware_conv4 a matter of seconds on the synthetic shard set."""
    return [
        "--set.data.path",
        manifest.folder,
        "--set.data.classes_per_batch",
        6,
        "--set.data.images_per_class",
        3,
        "--set.data.image_size",
        32,
        "--set.data.workers",
        1,
        "--set.model.width",
        16,
        "--set.model.structure_hidden",
        24,
        "--set.optim.steps",
        steps,
        "--set.optim.warmup_steps",
        2,
        "--set.train.validate_every",
        1000,
    ]
