"""A training state goes to disk and back: every bit, every ZeRO stage, other numbers of ranks,
damaged files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from training_runs import start_parent

from namr_dist.config import Config
from namr_dist.errors import DamagedFileError, InputError
from namr_dist.parallel.batchnorm import GlobalBatchNorm
from namr_dist.parallel.host import HostGroup
from namr_dist.parallel.pool import RankError, Ranks
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.network import save_network
from namr_dist.train.checkpoints.parts import INDEX, Piece, SavedTensors, finish, write_part
from namr_dist.train.checkpoints.policy import CheckpointPolicy
from namr_dist.train.checkpoints.resume import check_same, find_start
from namr_dist.train.checkpoints.state import (
    HostMemory,
    SavedState,
    check_fits,
    check_saveable,
    open_state,
    take_snapshot,
    versions,
    write_snapshot,
)
from namr_dist.train.checkpoints.verified_file import (
    TensorSpec,
    VerifiedFileWriter,
    read_tensors,
    write_tensors,
)
from namr_dist.train.checkpoints.zero_fragments import full_shape

ROWS, WIDTH = 8, 5
CONFIG = Config(recipe="none")


class Oddities(nn.Module):
    """What makes parameters hard to store: odd sizes, buffers, frozen, unused and never optimized
    ones."""

    def __init__(self, *, dropout: float, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(width, 7)
        self.norm = GlobalBatchNorm(7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.outside = nn.Parameter(torch.ones(3))
        self.last = nn.Linear(7, 3, bias=False)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.register_buffer("least", torch.tensor(float("inf")))

    def forward(self, rows_bW: Tensor) -> Tensor:
        hidden_b7 = self.dropout(self.frozen(self.norm(self.first(rows_bW)).relu()))
        return (self.last(hidden_b7) * self.scale).square().mean()


def build(stage: int, *, dropout: float = 0.0):  # type: ignore[no-untyped-def]
    """A fresh engine over all ranks of the pool, set as training sets it."""
    import torch.distributed as dist

    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
        LOCAL_RANK=str(dist.get_rank()),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    module = Oddities(dropout=dropout)
    groups = [
        {"params": [module.first.weight, module.last.weight], "weight_decay": 0.1},
        {
            "params": [
                module.first.bias,
                module.norm.weight,
                module.norm.bias,
                module.unused,
                module.scale,
            ],
            "weight_decay": 0.0,
        },
    ]
    settings = {
        "train_batch_size": ROWS,
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": 0,
        },
    }
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(groups, lr=1e-2),
        config=settings,
        dist_init_required=False,
    )
    engine.train()
    return engine


def advance(engine, steps: range) -> list[str]:  # type: ignore[no-untyped-def]
    """Train on data that the step alone decides; this rank's losses, in hexadecimal."""
    import torch.distributed as dist

    share = ROWS // dist.get_world_size()
    losses = []
    for step in steps:
        rows_BW = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = engine(rows_BW[dist.get_rank() * share :][:share])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item().hex())
    return losses


def save(engine, path: Path, step: int, host: HostGroup) -> str | None:  # type: ignore[no-untyped-def]
    """Take a snapshot and write it at once."""
    snapshot = take_snapshot(engine, HostMemory(), step=step, config=CONFIG, data_hash="d")
    return write_snapshot(snapshot, path, host)


def write(path: Path, stage: int, steps: int, dropout: float, after: int) -> list[str]:
    """Train, and go on while the state in between is still to be written; the losses from there
    on."""
    import torch.distributed as dist

    torch.manual_seed(dist.get_rank())
    engine, host = build(stage, dropout=dropout), HostGroup()
    torch.manual_seed(100 + dist.get_rank())
    advance(engine, range(steps))
    snapshot = take_snapshot(engine, HostMemory(), step=steps, config=CONFIG, data_hash="d")
    losses = advance(engine, range(steps, steps + after))
    assert write_snapshot(snapshot, path, host) is None
    save(engine, path.with_name("end"), steps + after, host)
    return losses


def resume(path: Path, stage: int, dropout: float, after: int) -> list[str]:
    """A fresh engine, filled from the file and trained on; its losses."""
    import torch.distributed as dist

    from namr_dist.train.checkpoints.state import load_state

    engine, host = build(stage, dropout=dropout), HostGroup()
    saved = open_state(path) if dist.get_rank() == 0 else None
    load_state(engine, saved, host=host, seed=0)
    step = host.from_first(saved.step if saved else None)
    losses = advance(engine, range(step, step + after))
    save(engine, path.with_name("resumed"), step + after, host)
    return losses


@pytest.fixture(scope="module")
def pools(two_ranks: Ranks, four_ranks: Ranks) -> Iterator[dict[int, Ranks]]:
    with Ranks(1) as one_rank:
        yield {1: one_rank, 2: two_ranks, 4: four_ranks}


def tensors(path: Path) -> dict[str, Tensor]:
    saved = SavedTensors(path, open_state(path).files)
    return {name: saved.get(name) for name in saved.specs}


@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_is_unbroken(
    pools: dict[int, Ranks], tmp_path: Path, ranks: int, stage: int
) -> None:
    """Losses and every byte of the state three steps later, with a dropout that draws from each
    rank's generator."""
    path = tmp_path / "step"
    unbroken = pools[ranks](write, path, stage, 4, 0.5, 3)
    resumed = pools[ranks](resume, path, stage, 0.5, 3)
    assert resumed == unbroken
    assert len(set(unbroken[0])) == 3
    end, again = tensors(tmp_path / "end"), tensors(tmp_path / "resumed")
    assert end.keys() == again.keys()
    for name, value in end.items():
        assert value.numpy().tobytes() == again[name].numpy().tobytes(), name


def there_and_back(stage: int) -> list[tuple[bytes, int, bytes]]:
    """Of each optimized parameter, a moment with every kind of number as it was set, and this
    rank's piece of it: its start and its bytes."""
    from namr_dist.train.checkpoints.zero_fragments import (
        MOMENTS,
        optimizer_step,
        own_moment,
        set_moments,
    )

    engine = build(stage)
    kinds = torch.tensor([-0.0, 0.0, 1e-42, -1e-42, float("inf"), 3.0, -1.5, float("nan")])
    pairs = []
    for name, parameter in engine.module.named_parameters():
        if name == "outside" or name.startswith("frozen"):
            continue
        shape = torch.Size(full_shape(parameter))
        moment = kinds.repeat(shape.numel())[: shape.numel()].reshape(shape)
        set_moments(engine, parameter, {key: moment for key in MOMENTS}, torch.tensor(7.0))
        assert optimizer_step(engine, parameter) == 7
        start, values = own_moment(engine, parameter, MOMENTS[0])
        pairs.append((moment.numpy().tobytes(), start, values.numpy().tobytes()))
    return pairs


@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_moments_keep_every_bit(two_ranks: Ranks, stage: int) -> None:
    """Each rank has all of a moment, or the ranks' pieces make it up."""
    by_rank = two_ranks(there_and_back, stage)
    assert [len(moments) for moments in by_rank] == [7, 7]
    for put, *pieces in zip([put for put, _, _ in by_rank[0]], *by_rank, strict=True):
        if stage == 0:
            assert [got for _, _, got in pieces] == [put, put]
        else:
            assert b"".join(got for _, _, got in sorted(pieces, key=lambda one: one[1:])) == put


@pytest.mark.dist
@pytest.mark.parametrize(
    ("before", "after"), [((2, 2), (1, 2)), ((1, 2), (2, 2)), ((4, 2), (2, 2)), ((2, 3), (4, 0))]
)
def test_other_ranks_and_stages_go_on(
    pools: dict[int, Ranks], tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """(ranks, ZeRO stage): the state arrives bit for bit, and the same batches go on to the same
    losses."""
    path = tmp_path / "step"
    (ranks, stage), (other_ranks, other_stage) = before, after
    unbroken = mean(pools[ranks](write, path, stage, 4, 0.0, 8))
    pools[other_ranks](resume, path, other_stage, 0.0, 0)
    saved, again = tensors(path), tensors(tmp_path / "resumed")
    for name in (name for name in saved if not name.startswith("rank/")):
        assert saved[name].numpy().tobytes() == again[name].numpy().tobytes(), name
    resumed = mean(pools[other_ranks](resume, path, other_stage, 0.0, 8))
    assert resumed == pytest.approx(unbroken, rel=1e-6)


def mean(by_rank: list[list[str]]) -> list[float]:
    """Over ranks: each loss is the mean of a rank's own rows."""
    return [sum(map(float.fromhex, losses)) / len(losses) for losses in zip(*by_rank, strict=True)]


def small_checkpoint(path: Path, *, parts: int = 1, **about: Any) -> Path:
    """What a checkpoint of Oddities holds of the model, written without an engine; `first.weight`
    is divided among the parts."""
    values = {f"model/{name}": value for name, value in Oddities(dropout=0.0).state_dict().items()}
    divided = values.pop("model/first.weight")
    written = []
    for part in range(parts):
        pieces = {}
        if part == 0:
            pieces = {
                name: Piece(values=value, shape=tuple(value.shape))
                for name, value in values.items()
            }
        rows = divided if parts == 1 else divided.reshape(-1).chunk(parts)[part]
        start = part * -(-divided.numel() // parts)
        pieces["model/first.weight"] = Piece(values=rows, start=start, shape=tuple(divided.shape))
        written.append(write_part(path, part, pieces))
    index = {
        "format": "namr-training/2",
        "version": "0",
        "versions": {},
        "step": 4,
        "ranks": parts,
        "zero_stage": 1,
        "data": "d",
        "config": json.loads(CONFIG.to_json()),
        **about,
    }
    finish(path, index, written)
    return path


def test_flipped_and_missing_bytes_are_found(tmp_path: Path) -> None:
    """In the index and in each part; a part of another checkpoint is not taken for this one's."""
    path = small_checkpoint(tmp_path / "step", parts=2)
    files = ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert open_state(path) == SavedState(
        path=path,
        step=4,
        ranks=2,
        zero_stage=1,
        data_hash="d",
        config=CONFIG,
        versions={},
        files=tuple(files),
    )
    for name in (INDEX, *files):
        file = path / name
        whole = file.read_bytes()
        for position in [*range(200), *range(200, len(whole), 17)]:
            flipped = bytes([whole[position] ^ 32])
            file.write_bytes(whole[:position] + flipped + whole[position + 1 :])
            with pytest.raises(DamagedFileError, match=name):
                open_state(path)
        for length in (0, 5, 30, 200, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(DamagedFileError, match=name):
                open_state(path)
        file.write_bytes(whole + b"\0")
        with pytest.raises(DamagedFileError, match=name):
            open_state(path)
        file.unlink()
        with pytest.raises(DamagedFileError, match=f"{name}: No such file"):
            open_state(path)
        file.write_bytes(whole)
    (path / files[1]).write_bytes((path / files[0]).read_bytes())
    with pytest.raises(DamagedFileError, match="not the part that its index names"):
        open_state(path)


def test_foreign_checkpoints(tmp_path: Path) -> None:
    foreign = small_checkpoint(tmp_path / "foreign")
    file = foreign / "rank-00000.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, file, {"format": "pt"})
    with pytest.raises(DamagedFileError, match="no SHA-256 of itself"):
        open_state(foreign)
    with pytest.raises(
        InputError, match="has format 'namr-training/3', expected 'namr-training/2'"
    ):
        open_state(small_checkpoint(tmp_path / "newer", format="namr-training/3"))
    saved = open_state(small_checkpoint(tmp_path / "step", parts=3))
    check_fits(saved, Oddities(dropout=0.5))
    with pytest.raises(InputError, match=r"first.weight is \(7, 5\) there and \(7, 6\) here"):
        check_fits(saved, Oddities(dropout=0.0, width=6))
    with pytest.raises(InputError, match=r"bias is missing there and \(2,\) here"):
        check_fits(saved, nn.Linear(2, 2))


def test_pieces_that_do_not_make_a_tensor_are_refused(tmp_path: Path) -> None:
    """Hashes are right: somebody wrote them so."""
    whole = torch.arange(12.0)
    about = {"format": "namr-training/2", "version": "0", "versions": {}, "step": 4, "ranks": 2}
    about["zero_stage"] = 0
    for number, (first, second) in enumerate(
        [
            (Piece(values=whole[:6], start=0, shape=(3, 4)), None),
            (
                Piece(values=whole[:6], start=0, shape=(3, 4)),
                Piece(values=whole[7:], start=7, shape=(3, 4)),
            ),
            (
                Piece(values=whole[:6], start=0, shape=(3, 4)),
                Piece(values=whole[5:], start=5, shape=(3, 4)),
            ),
            (
                Piece(values=whole[:6], start=0, shape=(3, 4)),
                Piece(values=whole[6:].int(), start=6, shape=(3, 4)),
            ),
            (Piece(values=whole, shape=(12,)), Piece(values=whole, shape=(12,))),
            (Piece(values=whole[:0], shape=(1 << 32, 1 << 32)), None),
        ]
    ):
        path = tmp_path / str(number)
        written = [
            write_part(path, rank, {"model/x": piece})
            for rank, piece in enumerate((first, second))
            if piece
        ]
        config = json.loads(CONFIG.to_json())
        finish(path, {**about, "data": "d", "config": config}, written)
        with pytest.raises(InputError, match=r"do not make it up|another part otherwise"):
            open_state(path)


def test_parts_are_plain_safetensors(tmp_path: Path) -> None:
    path = small_checkpoint(tmp_path / "step", parts=3)
    expected = Oddities(dropout=0.0).state_dict()
    stored = tensors(path)
    assert {f"model/{name}" for name in expected} == stored.keys()
    for name, value in expected.items():
        assert torch.equal(stored[f"model/{name}"], value)
    flat = [
        safetensors.torch.load_file(path / f"rank-{rank:05d}.safetensors")["model/first.weight"]
        for rank in range(3)
    ]
    assert torch.equal(torch.cat(flat), expected["first.weight"].reshape(-1))
    assert sorted(file.name for file in path.iterdir()) == [
        INDEX,
        *(f"rank-{rank:05d}.safetensors" for rank in range(3)),
    ]
    assert list(tmp_path.iterdir()) == [path], "a temporary folder stayed"


def test_every_flipped_bit_of_a_verified_file_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the flip makes it look like a file that never carried a hash, which is read."""
    values = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "none": torch.empty(0, 4),
        "one": torch.tensor(2.5, dtype=torch.float64),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    path = tmp_path / "some.safetensors"
    write_tensors(path, values, {"about": "é"})
    assert list(tmp_path.iterdir()) == [path], "a temporary file stayed"
    for stored in (safetensors.torch.load_file(path), read_tensors(path)[0]):
        assert stored.keys() == values.keys()
        assert all(torch.equal(stored[name], values[name]) for name in values)
    assert read_tensors(path)[1]["about"] == "é"
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            path.write_bytes(
                whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :]
            )
            with pytest.raises(DamagedFileError):
                read_tensors(path)
    assert capsys.readouterr().err == ""
    safetensors.torch.save_file({"one": values["one"]}, path, {"format": "pt"})
    assert torch.equal(read_tensors(path)[0]["one"], values["one"])
    assert f"WARNING: {path} carries no SHA-256" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match="not a whole safetensors file"):
        read_tensors(path)


def test_versions_that_wrote_a_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.config.write_text(CONFIG.to_json())
    path = run.checkpoint(4)
    path.parent.mkdir()
    for written, said in (
        (versions(), ()),
        ({**versions(), "torch": "1.13.1"}, (f"torch 1.13.1, here {torch.__version__}: the run",)),
        ({}, ("does not say which versions of torch and DeepSpeed wrote it",)),
    ):
        small_checkpoint(path, versions=written)
        start = find_start(run, CONFIG, data_hash="d")
        assert start.step == 4 and len(start.warnings) == len(said)
        for line, part in zip(start.warnings, said, strict=True):
            assert str(path) in line and part in line and line.endswith("would have")
            assert "numpy" not in line


def test_a_damaged_trained_network_ends_no_run_unseen(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.config.write_text(CONFIG.to_json())
    state = {"weight": torch.arange(40.0)}
    save_network(run.final, state, CONFIG, trained={"steps": 4})
    finished = find_start(run, CONFIG, data_hash="d")
    assert finished.finished and finished.warnings == ()
    whole = bytearray(run.final.read_bytes())
    whole[-5] ^= 0x80  # a sign
    run.final.write_bytes(whole)
    with pytest.raises(InputError, match=r"final.safetensors is damaged .*, and no checkpoint is"):
        find_start(run, CONFIG, data_hash="d")
    small_checkpoint(run.checkpoint(4), versions=versions())
    again = find_start(run, CONFIG, data_hash="d")
    assert again.step == 4 and not again.finished
    assert len(again.warnings) == 1 and "it is made again from a checkpoint" in again.warnings[0]
    # As a version without hashes left it.
    safetensors.torch.save_file(state, run.final, {"format": "namr-network/1"})
    (run.checkpoint_folder / "step-00000004.safetensors").touch()
    older = find_start(run, CONFIG, data_hash="d")
    assert older.finished and "carries no SHA-256" in older.warnings[0]
    run.final.write_bytes(b"")
    with pytest.raises(InputError, match="was written by an older version of namr-dist"):
        find_start(run, CONFIG, data_hash="d")


def test_a_run_that_stops_at_damaged_images_may_go_on_replacing_them() -> None:
    stop, replace = (
        dataclasses.replace(
            CONFIG, data=dataclasses.replace(CONFIG.data, damaged_images=damaged_images)
        )
        for damaged_images in ("stop", "replace")
    )
    check_same(Path("config.json"), stop, replace)
    with pytest.raises(InputError, match="data.damaged_images is stop, there replace"):
        check_same(Path("config.json"), replace, stop)


def test_what_the_disk_changed_is_never_accepted(tmp_path: Path) -> None:
    values = torch.arange(1000.0)
    path = tmp_path / "step"
    path.write_bytes(b"the older one")
    writer = VerifiedFileWriter(path, {}, {"values": TensorSpec.of(values)})
    writer.add(values)
    (temporary,) = tmp_path.glob(".*.tmp")
    with open(temporary, "r+b") as file:
        file.seek(-7, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(OSError, match="differs from what was written"):
        writer.commit()
    writer.discard()
    assert path.read_bytes() == b"the older one" and list(tmp_path.iterdir()) == [path]


def save_on_a_small_disk(path: Path) -> tuple[str | None, int, list[str]]:
    """What saving says where files may have 1,000 bytes, the files that are left, and whether
    training goes on."""
    import resource

    import torch.distributed as dist

    engine, host = build(2), HostGroup()
    advance(engine, range(2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        trouble = save(engine, path, 2, host)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = len(list(path.parent.iterdir()))
    dist.barrier()
    return trouble, left, advance(engine, range(2, 4))


@pytest.mark.dist
def test_disk_that_refuses_is_reported_on_every_rank(
    pools: dict[int, Ranks], tmp_path: Path
) -> None:
    unbroken = pools[2](write, tmp_path / "step", 2, 2, 0.0, 2)
    (tmp_path / "small").mkdir()
    path = tmp_path / "small" / "step"
    assert [(f"File too large: {path}", 0, losses) for losses in unbroken] == pools[2](
        save_on_a_small_disk, path
    )


def test_a_snapshot_is_a_copy_of_any_tensor() -> None:
    """Of odd sizes and all widths, into memory that is used again; or an error that training can go
    on from."""
    memory, device = HostMemory(), torch.device("cpu")
    values = {
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.int8),
        "half": torch.arange(7.0).to(torch.bfloat16),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "none": torch.empty(0, 4),
        "one": torch.tensor(2.5, dtype=torch.float64),
    }
    pieces = {name: Piece(values=value, shape=tuple(value.shape)) for name, value in values.items()}
    for _ in range(2):
        copied = memory.copy(pieces, device)
        expected = {name: value.clone() for name, value in values.items()}
        for value in values.values():
            value.zero_()
        assert copied.keys() == expected.keys()
        for name, piece in copied.items():
            assert piece.whole and TensorSpec.of(piece.values) == TensorSpec.of(expected[name])
            assert torch.equal(piece.values, expected[name]), name
    endless = torch.zeros(1).expand(1 << 50)
    with pytest.raises(MemoryError, match=r"no 4194304.0 GiB of memory left"):
        memory.copy({"endless": Piece(values=endless, shape=(1 << 50,))}, device)
    assert torch.equal(memory.copy(pieces, device)["flags"].values, values["flags"])


def save_where_nothing_can_be_removed(folder: Path) -> tuple[list[bool], list[str], list[str]]:
    """Of two checkpoints, the second where their folder is a file: whether each was written, the
    lines on them, and losses of training on."""
    import torch.distributed as dist

    engine, host, first = build(2), HostGroup(), dist.get_rank() == 0
    advance(engine, range(2))
    run = RunFolder(folder)
    config = dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, keep_checkpoints=1)
    )
    policy = CheckpointPolicy(
        engine,
        run,
        config,
        data_hash="d",
        host=host,
        first=first,
        timeout=timedelta(minutes=2),
    )
    written, news = [], []
    for step in (2, 3):
        policy.save(step)
        written.append(policy.finish())
        news += policy.news()
        dist.barrier()
        if first and step == 2:
            run.checkpoint_folder.rename(folder / "aside")
            run.checkpoint_folder.write_text("")
        dist.barrier()
    return written, news, advance(engine, range(2, 4))


@pytest.mark.dist
def test_a_disk_that_removes_nothing_ends_no_training(
    pools: dict[int, Ranks], tmp_path: Path
) -> None:
    """Neither an older checkpoint, here one whose temporary name would be too long, nor what a
    failed one leaves."""
    folder = tmp_path / "run"
    older = folder / "checkpoints" / f"step-{1:0240d}"
    older.mkdir(parents=True)
    unbroken = pools[2](write, tmp_path / "step", 2, 2, 0.0, 2)
    (written, news, losses), (others_written, no_news, others_losses) = pools[2](
        save_where_nothing_can_be_removed, folder
    )
    assert written == others_written == [True, False] and no_news == []
    assert [losses, others_losses] == unbroken
    done, stays, failed = news
    assert done.startswith("checkpoint at step 2 in ")
    assert stays == f"WARNING: an older checkpoint stays: File name too long: {older}"
    assert failed.startswith("WARNING: no checkpoint at step 3: Not a directory: ")
    assert failed.endswith("goes on from the beginning")


def of_another_folder(folder: Path) -> str:
    """What starting says where the second rank sees a folder of its own."""
    import torch.distributed as dist

    from namr_dist.train import start

    start._SEEN_S = 0.3
    own = RunFolder(folder / str(dist.get_rank()))
    trouble = start._not_shared(own, HostGroup())
    here = start._not_shared(RunFolder(folder / "0"), HostGroup())
    return f"{trouble} {here}"


def replace_what_another_rank_does_not_see(folder: Path) -> None:
    """Start with --overwrite; the second rank ends."""
    import torch.distributed as dist

    from namr_dist.train import start

    start._SEEN_S = 0.3
    own = RunFolder(folder / str(dist.get_rank()))
    module: Any = Oddities(dropout=0.0)
    start.begin(module, CONFIG, own, "d", HostGroup(), overwrite=True, resume=False)


@pytest.mark.dist
def test_ranks_that_see_another_folder_are_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    """Also if it holds a run, as one of yesterday."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "config.json").write_text(f"of rank {rank}")
    first, _ = two_ranks(of_another_folder, tmp_path)
    assert "is not the one that" in first and "on storage that all nodes share" in first
    assert first.endswith(" None")


@pytest.mark.dist
def test_a_run_that_another_rank_does_not_see_is_not_replaced(tmp_path: Path) -> None:
    start_parent()
    run = RunFolder(tmp_path / "0")
    small_checkpoint(run.checkpoint(4))
    run.config.write_text(CONFIG.to_json())
    pool = Ranks(2)
    try:
        # Of the first rank or the second, whichever the pool hears of first.
        with pytest.raises(RankError, match=r"is not the one that|ended without an answer"):
            pool(replace_what_another_rank_does_not_see, tmp_path)
    finally:
        pool.close()
    assert open_state(run.checkpoint(4)).step == 4


def test_a_part_that_the_first_rank_does_not_see_makes_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "step"
    piece = {"model/x": Piece(values=torch.arange(3.0), shape=(3,))}
    parts = [write_part(path, rank, piece) for rank in range(2)]
    (tmp_path / ".step.tmp" / parts[1]["file"]).unlink()
    with pytest.raises(OSError, match=r"rank-00001.safetensors is not there: .* all nodes share"):
        finish(path, {}, parts)
    assert not path.exists()


class _WithState(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}


def test_a_state_that_no_checkpoint_can_hold_is_refused_before_training() -> None:
    check_saveable(Oddities(dropout=0.0))
    turning = nn.Module()
    turning.register_buffer("turns", torch.zeros(2, dtype=torch.complex64))
    for module, said in ((turning, "turns is torch.complex64"), (_WithState(), "is dict")):
        with pytest.raises(InputError, match=said):
            check_saveable(module)
