"""What must be right on a node before ranks start there: a function a subject, which returns what
it found.

They raise InputError for what would stop training. Files that stay are weights that were fetched
and the manifest of a remote set, which training would fetch too.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from namr_dist.config import Config, DataConfig
from namr_dist.data.location import open_shards
from namr_dist.data.shardset.manifest import FILE_NAME, Manifest, Shard
from namr_dist.errors import InputError
from namr_dist.provenance import provenance
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.network import initial_network

_PACKAGES = (
    "namr-dist",
    "torch",
    "triton",
    "deepspeed",
    "numpy",
    "webdataset",
    "simplejpeg",
    "timm",
    "safetensors",
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cu12",
    "faiss",
)
_STAT_THREADS = 16
_SEEN_S = 3.0
_EXCHANGED_BYTES = 32 << 20
_EXCHANGES = 3


def versions() -> dict[str, str]:
    """Version of Python and of each package that is installed; `commit` where this is a source
    checkout."""
    installed = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = provenance()["commit"]
    return installed if " " in commit or commit == "unknown" else {**installed, "commit": commit}


def gpus(environ: Mapping[str, str], ranks_per_node: int | None) -> list[str]:
    """Names of the GPUs, each of which has added numbers; none where nobody promised one.

    CUDA_VISIBLE_DEVICES is not asked: it may name GPUs that the driver or torch cannot open.
    """
    names = []
    for number in range(torch.cuda.device_count()):
        try:
            if torch.arange(1000, device=f"cuda:{number}").sum().item() != 499_500:
                raise InputError(f"GPU {number} adds wrongly; take this node out of use")
        except RuntimeError as error:
            raise InputError(
                f"GPU {number} cannot be used ({first_line(error)}); look at nvidia-smi there, or take "
                "this node out of use"
            ) from None
        names.append(torch.cuda.get_device_name(number))
    granted = _granted_gpus(environ)
    wanted = ranks_per_node or granted
    if granted and len(names) < wanted:
        raise InputError(
            f"Slurm gave {granted} GPUs, torch opens {len(names)} of {wanted} ({_driver()}; torch "
            f"{torch.__version__} is built for {_build()}); repair the driver or install a CUDA build of "
            "torch; for CPU ranks ask Slurm for no GPU: --gpus-per-node=0"
        )
    if names and len(names) < wanted:
        raise InputError(
            f"torch opens {len(names)} GPUs for {wanted} ranks a node; set --ranks-per-node to at most "
            f"{len(names)}"
        )
    return names


def _granted_gpus(environ: Mapping[str, str]) -> int:
    on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    if on_node.isdecimal():
        return int(on_node)
    return len(list(filter(None, environ.get("SLURM_JOB_GPUS", "").split(","))))


def _driver() -> str:
    try:
        said = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return (
            "nvidia-smi does not answer"
            if isinstance(error, subprocess.TimeoutExpired)
            else "no nvidia-smi"
        )
    lines = (said.stdout or said.stderr).strip().splitlines()
    return (
        f"nvidia-smi: {len(lines)} GPUs"
        if said.returncode == 0
        else f"nvidia-smi: {(lines or ['failed'])[0]}"
    )


def _build() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def compilers(environ: Mapping[str, str]) -> str:
    """What Triton compiles kernels with: a C compiler and ptxas, as it looks for them. Raises
    InputError, naming each that is missing."""
    compiler = environ.get("CC") or next(filter(shutil.which, ("clang", "gcc")), None)
    missing = []
    if compiler is None or shutil.which(compiler) is None:
        named = f"CC is {compiler}, which is not there" if compiler else "no C compiler"
        missing.append(f"{named}; install gcc, or set CC to a compiler")
    assembler = environ.get("TRITON_PTXAS_PATH") or _own_ptxas()
    if shutil.which(assembler) is None:
        missing.append(
            f"ptxas is not at {assembler}; install the triton package again, or set "
            "TRITON_PTXAS_PATH to the one of a CUDA toolkit"
        )
    if missing:
        raise InputError("; ".join(missing))
    return f"{compiler}, {assembler}"


def _own_ptxas() -> str:
    """Where the triton package has it, installed or not."""
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent if spec and spec.origin else Path("triton")
    return str(folder / "backends" / "nvidia" / "bin" / "ptxas")


@dataclass(frozen=True, kw_only=True)
class ShardsFound:
    """A shard set as one node sees it."""

    manifest_sha256: str
    files: int
    """Shards of the splits that are used, each there in its size; 0 of a remote set, which is
    fetched later."""
    size_bytes: int


def shards(data: DataConfig) -> ShardsFound:
    """The shard set, once every tar of the splits that are trained on, validated and tested is
    there in its size."""
    manifest = open_shards(data.path, data.remote)
    digest = hashlib.sha256((manifest.folder / FILE_NAME).read_bytes()).hexdigest()
    if manifest.source is not None:
        return ShardsFound(manifest_sha256=digest, files=0, size_bytes=0)
    used = manifest.shards_of(
        *data.train_splits, *filter(None, (data.validation_split, data.test_split))
    )
    # Each look is a question to the server where the folder is on a network file system.
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        wrong = list(filter(None, pool.map(lambda shard: _wrong(manifest, shard), used)))
    if wrong:
        raise InputError(
            f"{wrong[0]}; {len(wrong)} of {len(used)} shards are so: copy the shard set there again, or "
            "set data.path to where it is whole"
        )
    return ShardsFound(
        manifest_sha256=digest, files=len(used), size_bytes=sum(shard.bytes for shard in used)
    )


def _wrong(manifest: Manifest, shard: Shard) -> str | None:
    path = manifest.folder / shard.file
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"shard {path} cannot be read ({error.strerror})"
    return (
        None
        if size == shard.bytes
        else f"shard {path} has {size} bytes, its manifest says {shard.bytes}"
    )


def probe_path(run: Path) -> Path:
    """A new file's name in the run's folder, or in its nearest parent that exists."""
    RunFolder(run).check(overwrite=False, goes_on=True, need_bytes=0)
    folder = run.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder / f".namr-preflight-{secrets.token_hex(6)}"


def write_probe(probe: Path) -> None:
    """Write a few bytes to that file, flush them to disk and read them back. The caller removes it,
    also after an error."""
    try:
        with open(probe, "xb") as file:
            file.write(b"namr")
            file.flush()
            os.fsync(file.fileno())
        if probe.read_bytes() != b"namr":
            raise InputError(
                f"run folder {probe.parent} does not give back what is written; choose another with "
                "--run-dir"
            )
    except OSError as error:
        raise InputError(
            f"run folder {probe.parent} cannot be written ({error.strerror}); choose another with "
            "--run-dir"
        ) from None


def free_bytes(folder: Path) -> int:
    """Bytes that a run may fill there."""
    return shutil.disk_usage(folder).free


def see_probe(probe: Path) -> None:
    """Raise InputError if the file that the first node wrote is not there."""
    until_s = time.monotonic() + _SEEN_S
    # A network file system may show another node's file a little later.
    while not probe.exists():
        if time.monotonic() > until_s:
            raise InputError(
                f"a file that the first node wrote into {probe.parent} is not seen: that folder is not on "
                "a file system that the nodes share; choose one with --run-dir"
            )
        time.sleep(0.1)


def weights(config: Config, run: Path) -> str:
    """Where the backbone's weights come from, once they can be had here: a hub's are fetched. A job
    that goes on from a checkpoint in `run` needs no others."""
    model = config.model
    if RunFolder(run).has_parameters:
        return "checkpoint"
    if model.backbone == "conv4" or (not model.pretrained and model.weights is None):
        return "random"
    from_hub = model.backbone.startswith("timm:") and model.weights is None
    if from_hub and _in_cache(model.backbone.removeprefix("timm:")):
        return "cached"
    try:
        initial_network(config, device=torch.device("cpu"), pretrained=True)
    except InputError as error:
        if not from_hub:
            raise
        raise InputError(
            f"{str(error).rsplit('; ', 1)[0]}; compute nodes often have no internet: run namr preflight "
            "once where there is, with the same cache, or set model.weights to a file"
        ) from None
    return "fetched" if from_hub else "file" if model.weights else "package"


def _in_cache(name: str) -> bool:
    """Whether the hub's cache on this node has the weights of a timm model."""
    from namr_dist.model.torchvision_shim import make_torchvision_importable

    make_torchvision_importable()
    import timm
    from huggingface_hub import try_to_load_from_cache

    source = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    if source is None or not source.hf_hub_id:
        return False
    files = (
        [source.hf_hub_filename]
        if source.hf_hub_filename
        else ["model.safetensors", "pytorch_model.bin"]
    )
    return any(isinstance(try_to_load_from_cache(source.hf_hub_id, file), str) for file in files)


def all_reduce(store: dist.Store, *, rank: int, size: int, backend: str, seconds: float) -> float:
    """MiB/s at which all nodes add 32 MiB of fp32, once a sum of known numbers is right on this
    one.

    `backend` as training takes it: nccl, with each node's first GPU, or gloo.
    """
    # A failed collective is told here: NCCL's own thread would end the process.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
    )
    total = torch.tensor([rank + 1.0], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    if total.item() != size * (size + 1) / 2:
        raise InputError(
            f"{backend} adds 1 to {size} to {total.item():g}; take this node out of use"
        )
    data = torch.ones(_EXCHANGED_BYTES // 4, device=device)
    best_s = float("inf")
    for _ in range(_EXCHANGES):
        began_s = time.perf_counter()
        dist.all_reduce(data)
        data[0].item()  # a GPU works behind: this waits for it
        took = torch.tensor([time.perf_counter() - began_s], device=device)
        # All nodes stop after the same exchange; a slow network is no error.
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        best_s = min(best_s, took.item())
        if took.item() > 1:
            break
    return _EXCHANGED_BYTES / 2**20 / best_s


def first_line(error: BaseException) -> str:
    """The first line of its message, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
