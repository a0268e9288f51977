"""`namr export`: plain files, used as their model card says, beside what evaluation wrote."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from conftest import REPOSITORY, launch, small_run
from PIL import Image
from torch import Tensor, nn

from namr_dist.config import Config, DataConfig, ModelConfig, RemoteConfig
from namr_dist.data.read.stream import ShardImages
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.shards import decode_rgb
from namr_dist.errors import InputError
from namr_dist.reproduce.cells import read_cell
from namr_dist.results.evaluate_run import evaluate_run
from namr_dist.results.export import describe, difference, export_run, load
from namr_dist.results.page import write_report
from namr_dist.results.programs import trace
from namr_dist.results.record import read_run
from namr_dist.results.redact import shareable
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.network import load_network, save_network
from namr_dist.train.embed import test_transform as transform_of

MODELS = {"model.safetensors", "model.pt2", "model.onnx"}


@pytest.fixture(scope="module")
def run(
    shard_set: Manifest, forked_namr: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two steps at 32 px, evaluated on the middle three quarters of images at 48 px."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = forked_namr(
        "train",
        "homeware_conv4",
        "--run-dir",
        folder,
        *small_run(shard_set, steps=2),
        "--set.data.test_size",
        48,
        "--set.data.test_crop",
        0.75,
    )
    assert done.returncode == 0, done.stderr
    evaluate_run(folder)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, namr: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "small"
    done = namr("export", run, "--out", folder, "--license", "cc-by-4.0", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["size_bytes"] == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert said["differences"].keys() == MODELS
    assert all(0 <= value < 1e-5 for value in said["differences"].values())
    assert list(folder.parent.iterdir()) == [folder], "a temporary folder stayed"
    return folder


def test_what_is_written(run: Path, exported: Path, shard_set: Manifest) -> None:
    assert {path.name for path in exported.iterdir()} == {
        *MODELS,
        "config.json",
        "README.md",
        "SHA256SUMS",
    }
    state = safetensors.torch.load_file(exported / "model.safetensors")
    trained = safetensors.torch.load_file(RunFolder(run).final)
    assert state.keys() == trained.keys()
    assert all(torch.equal(state[name], trained[name]) for name in state)
    about = json.loads((exported / "config.json").read_text())
    assert (about["input"]["size"], about["output"]["width"]) == (48, 16)
    assert about["config"]["data"]["path"] == shard_set.folder.name
    for path in exported.iterdir():
        content = path.read_bytes()
        assert str(REPOSITORY).encode() not in content, f"{path.name} names folders of this machine"
        assert str(shard_set.folder.parent).encode() not in content, (
            f"{path.name} names folders of this machine"
        )
    card = (exported / "README.md").read_text()
    recall = json.loads((run / "metrics.json").read_text())["test"]["sample"]["R@1"]
    assert f"| trained, sample | {recall:.1f} |" in card
    assert shard_set.split_hash("test") in card
    assert card.startswith("---\n") and '\nlicense: "cc-by-4.0"\n---\n' in card


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("/home/me/shards", "shards"),
        ("https://me:se/cret@host/all/set?sig=se/cret", "set?…"),
        ("https://me:secret@host", "…@host"),
        ("s3://bucket/set/", "set"),
        (None, None),
        ("pipe:TOKEN=secret curl https://h/{}", "pipe:…"),
        ("pipe:/opt/get --key secret {}", "get …"),
    ],
)
def test_what_is_given_away_has_neither_folders_nor_credentials(
    location: str | None, told: str | None
) -> None:
    config = Config(
        recipe="sop",
        model=ModelConfig(weights=Path("/home/me/weights.pt")),
        data=DataConfig(
            path=location,
            class_list=Path("/home/me/list.txt"),
            remote=RemoteConfig(cache=Path("/scratch/me")),
        ),
    )
    given = describe(None, config, {})["config"]
    assert (
        given["data"]["path"],
        given["data"]["class_list"],
        given["data"]["remote"]["cache"],
        given["model"]["weights"],
    ) == (told, "list.txt", "me", "weights.pt")
    given["data"].update(path=config.data.path, class_list="/home/me/list.txt")
    given["data"]["remote"]["cache"], given["model"]["weights"] = (
        "/scratch/me",
        "/home/me/weights.pt",
    )
    assert given == json.loads(config.to_json()), "another field was changed"
    assert shareable({"data": None, "model": {}}) == {"data": None, "model": {}}


def test_a_report_has_neither_folders_nor_credentials(
    run: Path, tmp_path: Path, shard_set: Manifest
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["data"]["path"] = "https://me:secret@host/folder/set?sig=secret"
    (copy / "config.json").write_text(json.dumps(config))
    index = shard_set.index("test")
    images = ShardImages(shard_set, index, transform_of(Config.load(copy / "config.json")))
    page = write_report(copy, images.jpeg, index.keys, index.keys).read_text()
    assert "set?…" in page and "secret" not in page and "host/folder" not in page


@pytest.mark.parametrize(
    ("file", "absent"),
    [("model.safetensors", "deepspeed"), ("model.pt2", "namr_dist"), ("model.onnx", "torch")],
)
def test_model_card_does_what_it_says(
    run: Path, exported: Path, shard_set: Manifest, tmp_path: Path, file: str, absent: str
) -> None:
    """Its code in a process of its own, on image files: the embeddings are those of evaluation, at
    any batch size."""
    positions = (0, 7, 20, 33)
    source = ShardImages(
        shard_set, shard_set.index("test"), transform_of(Config.load(run / "config.json"))
    )
    for number, position in enumerate(positions):
        Image.fromarray(decode_rgb(source.jpeg(position), "an image")).save(
            tmp_path / f"{number}.png"
        )
    card = (exported / "README.md").read_text()
    prepare = re.findall(
        r"```python\n(.*?)```", card[card.index("## Prepare") : card.index("## Load")], re.S
    )[0]
    use = re.findall(r"```python\n(.*?)```", card[card.index(f"`{file}`, with") :], re.S)[0]
    files = [str(tmp_path / f"{number}.png") for number in range(len(positions))]
    assert '["photo.jpg"]' in prepare
    script = f"""{prepare.replace('["photo.jpg"]', repr(files))}
import json, sys
every = images
for images in (every, every[:1]):
    exec({use!r})
    print(json.dumps([z.tolist(), s.tolist()]))
assert not {{{absent!r}, "deepspeed"}} & sys.modules.keys()
"""
    done = launch(sys.executable, "-c", script, cwd=exported)
    assert done.returncode == 0, done.stderr
    evaluated = safetensors.torch.load_file(run / "embeddings.safetensors")
    for line, count in zip(done.stdout.splitlines(), (4, 1), strict=True):
        for vectors, right in zip(json.loads(line), (evaluated["z"], evaluated["s"]), strict=True):
            np.testing.assert_allclose(
                vectors, right[list(positions[:count])], rtol=1e-4, atol=1e-5
            )


def test_loading_leaves_the_generator_alone(exported: Path) -> None:
    torch.manual_seed(5)
    right = torch.rand(3)
    torch.manual_seed(5)
    load(exported)
    assert torch.equal(torch.rand(3), right)


def test_difference(exported: Path) -> None:
    """What is doubled is off by all of itself; what is not a number is infinitely far."""
    images = [torch.randint(0, 256, (count, 48, 48, 3), dtype=torch.uint8) for count in (1, 3)]
    network, other = load(exported), load(exported)
    with torch.no_grad():
        expected = [network(batch) for batch in images]
        assert difference(other, images, expected) == 0
        doubled = [(2 * z_bD, s_bC) for z_bD, s_bC in expected]
        assert difference(other, images, doubled) == pytest.approx(0.5, rel=1e-5)
        other.sample_head.bias[0] = float("nan")
        assert difference(other, images, expected) == float("inf")


def test_too_large_a_difference_leaves_nothing(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"model\.safetensors differs from the network by 0\.0e\+00"
    ):
        export_run(run, tmp_path / "out", ["safetensors"], tolerance=-1)
    assert not list(tmp_path.iterdir())


def test_damaged_export(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged .*export the run again"):
        load(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        load(folder)
    weights.write_bytes(whole)
    about = json.loads(config.read_text())
    about["config"]["model"]["width"] = 8
    config.write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"config\.json is damaged .* remove its field sha256"):
        load(folder)
    del about["sha256"]
    config.write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"does not fit .*config\.json"):
        load(folder)
    config.write_text((exported / "README.md").read_text())
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        load(folder)
    config.write_text("{}")
    with pytest.raises(InputError, match="has format None"):
        load(folder)
    config.unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        load(folder)


def test_flipped_bits_of_every_file_are_found(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What training, evaluation and export write; two hundred of each, a quarter of them at its
    beginning, where the hash lies."""
    mine, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, mine)
    shutil.copytree(exported, out)
    config = Config.load(mine / "config.json")

    def check_sums() -> None:
        done = subprocess.run(
            ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"],
            cwd=out,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise InputError(done.stdout + done.stderr)

    readers: dict[Path, tuple[Callable[[], object], int]] = {
        RunFolder(mine).final: (
            lambda: load_network(RunFolder(mine).final, config, device=torch.device("cpu")),
            200,
        ),
        RunFolder(mine).embeddings: (lambda: read_run(mine), 200),
        RunFolder(mine).metrics: (lambda: read_run(mine), 200),
        RunFolder(mine).classes: (lambda: read_cell(mine), 200),
        out / "config.json": (lambda: load(out), 200),
        out / "model.safetensors": (lambda: load(out), 200),
        # These are for other programs to read.
        **{out / name: (check_sums, 8) for name in ("model.pt2", "model.onnx", "README.md")},
    }
    rng = np.random.default_rng(5)
    for path, (read, flips) in readers.items():
        read()
        whole = path.read_bytes()
        for number in range(flips):
            position = int(rng.integers(len(whole) if number % 4 else min(400, len(whole))))
            changed = bytearray(whole)
            changed[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            with pytest.raises(InputError, match=re.escape(path.name)):
                read()
        path.write_bytes(whole)
    assert "carries no SHA-256" not in capsys.readouterr().err


def test_files_of_a_version_without_hashes_are_read(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "run"
    shutil.copytree(run, mine)
    files, config = RunFolder(mine), Config.load(mine / "config.json")
    for path in (files.final, files.embeddings):
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        del metadata["sha256"]
        safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)
    metrics = json.loads(files.metrics.read_text())
    del metrics["sha256"]
    files.metrics.write_text(json.dumps(metrics))
    network, _ = load_network(files.final, config, device=torch.device("cpu"))
    right = load(exported).state_dict()
    assert all(torch.equal(value, right[name]) for name, value in network.state_dict().items())
    assert read_run(mine).metrics == metrics
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(
        f"WARNING: {path} carries no SHA-256" in line
        for path, line in zip((files.final, files.embeddings), said, strict=True)
    )


def test_runs_that_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="is not the folder of a run"):
        export_run(tmp_path, out)
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    (broken / "metrics.json").write_text("[]")
    with pytest.raises(InputError, match=r"metrics\.json holds a list, not an object"):
        export_run(broken, out)
    (broken / "metrics.json").unlink()
    config = Config.load(broken / "config.json")
    state = safetensors.torch.load_file(RunFolder(run).final)
    state["sample_head.bias"][3] = float("nan")
    save_network(RunFolder(broken).final, state, config, trained={})
    with pytest.raises(InputError, match="does not give finite values"):
        export_run(broken, out)
    RunFolder(broken).final.write_bytes(RunFolder(run).final.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"final.safetensors is damaged .* with --resume"):
        export_run(broken, out)
    RunFolder(broken).final.unlink()
    with pytest.raises(InputError, match="the run has not finished"):
        export_run(broken, out)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_folders_that_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="there exists already"):
        export_run(run, tmp_path / "there")
    with pytest.raises(InputError, match="in a folder that does not exist"):
        export_run(run, tmp_path / "no" / "out")


def test_missing_package_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even before the run is looked at."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # Python then takes it for not installed
    with pytest.raises(InputError, match=r"onnx needs onnxruntime, .*namr-dist\[export\]"):
        export_run(tmp_path / "no-run", tmp_path / "out")
    with pytest.raises(InputError, match="is not the folder of a run"):
        export_run(tmp_path / "no-run", tmp_path / "out", ["safetensors", "torch"])


def test_network_that_cannot_be_traced() -> None:
    class Branches(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return (images, images) if images.sum() > 9 else (images + 1, images)

    with pytest.raises(InputError, match="cannot be traced by torch.export"):
        trace(Branches(), size=4)
