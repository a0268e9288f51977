"""Centres that are learnt in whole runs: any ranks and ZeRO stages, resumed, and handed to the
network."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import small_run
from training_runs import Run, entries, start_parent

from namr_dist.config import Config, DataConfig, StructureConfig
from namr_dist.data.read.stream import ShardImages
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import InputError
from namr_dist.parallel.host import HostGroup
from namr_dist.parallel.ranks import Rank
from namr_dist.retrieval.evaluate import evaluate_sample
from namr_dist.structure.centres import HEAD_ROOM, Centres
from namr_dist.train.checkpoints.chosen import network_at
from namr_dist.train.embed import embed
from namr_dist.train.embed import test_transform as transform_of
from namr_dist.train.structure_fit import DEFAULT_GAMMA, Embedded, fit_structure

CENTRES = 9


@pytest.mark.dist
def test_any_ranks_and_stages_resumed_or_not(shard_set: Manifest, tmp_path: Path) -> None:
    """ZeRO-3 on two ranks, from the start and, bit for bit, from a checkpoint; and one process. At
    learning rates at which training amplifies no rounding."""
    start_parent()
    words = [
        "homeware_conv4",
        *small_run(shard_set, steps=12),
        "--set.data.workers=0",
        "--set.data.classes_per_batch=4",
        "--set.data.images_per_class=4",
        "--set.data.views=2",
        "--set.optim.backbone_lr=1e-5",
        "--set.optim.head_lr=1e-5",
        "--set.structure.form=learnt",
        "--set.structure.objective=views",
        f"--set.structure.centres={CENTRES}",
        "--set.structure.pull=0.5",
        "--set.train.validate_every=4",
        "--set.train.checkpoint_every=4",
    ]

    def trained(folder: Path, *more: object, ranks: int) -> str:
        run = Run(ranks, [*words, "--run-dir", folder, *more], tmp_path / "said.txt")
        assert run.wait() == [0] * ranks, run.said()
        return run.said()

    two, one = tmp_path / "two", tmp_path / "one"
    trained(two, "--set.train.zero_stage=3", ranks=2)
    expected, network = said_of(two), final(two)
    checkpoint_scores_as_validation_did(two, shard_set, step=8)
    (two / "checkpoints" / "final.safetensors").unlink()
    shutil.rmtree(two / "checkpoints" / "step-00000008")
    again = trained(two, "--set.train.zero_stage=3", "--resume", ranks=2)
    assert "resumed   at step 4 from" in again
    assert said_of(two) == expected
    assert all(torch.equal(value, network[name]) for name, value in final(two).items())

    trained(one, "--set.train.zero_stage=0", ranks=1)
    for ours, theirs in zip(said_of(one), expected, strict=True):
        assert ours.keys() == theirs.keys()
        if "loss" in ours:
            for part in ("loss", "structure_loss"):
                assert ours[part] == pytest.approx(theirs[part], rel=1e-4) and ours[part] > 0
    torch.testing.assert_close(
        final(one)["centres.centres_MD"], network["centres.centres_MD"], rtol=1e-3, atol=1e-4
    )
    fits = [entry["structure"] for entry in expected if "structure" in entry]
    assert len(fits) >= 2 and all(fit["learnt"] and fit["centres"] == CENTRES for fit in fits)
    # On unit vectors of no great spread: none has run away, and no two are one.
    centres_MD = network["centres.centres_MD"]
    assert (centres_MD.norm(dim=1) < 3).all() and torch.pdist(centres_MD).min() > 0


def checkpoint_scores_as_validation_did(folder: Path, manifest: Manifest, *, step: int) -> None:
    """What two ranks' parts make up embeds the validation images as the ranks did, whose centres
    were those of the step."""
    config = Config.load(folder / "config.json")
    network, trained = network_at(folder, config, f"step-{step}", device=torch.device("cpu"))
    assert (trained["steps"], trained["ranks"], trained["zero_stage"]) == (step, 2, 3)
    index = manifest.index("val")
    rank = Rank(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    images = ShardImages(manifest, index, transform_of(config))
    z_ND, s_ND = embed(network, images, rank=rank, batch_size=36, workers=0)
    entry, fitted = (
        next(line[block] for line in entries(folder) if line.get("step") == step and block in line)
        for block in ("val", "structure")
    )
    figures = evaluate_sample(z_ND, index.label_N, distance=config.distance)
    assert entry == {name: pytest.approx(figures[name]) for name in entry}
    assert network.centres is not None and network.centres.fitted
    assert (
        len(network.centres.centres_MD) == CENTRES and s_ND.shape[1] == network.centres.nearest + 1
    )
    assert float(network.centres.gamma) == pytest.approx(fitted["gamma"])


def said_of(folder: Path) -> list[dict]:
    """Lines of steps, validation and centres, but for the clock."""
    return [
        {name: value for name, value in entry.items() if name != "time_s"}
        for entry in entries(folder)
        if entry.keys() & {"loss", "val", "structure"}
    ]


def final(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "checkpoints" / "final.safetensors")


@pytest.mark.parametrize("unit", [True, False])
def test_learnt_centres_are_placed_at_the_scale_of_the_training_rows(unit: bool) -> None:
    rng = np.random.default_rng(0)
    z_ND = (5 * rng.standard_normal((60, 4)) + 2).astype(np.float32)
    training = Embedded(z_ND=z_ND, label_N=np.arange(60) % 30)
    learnt_MD = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    centres = Centres(centres=6, width=4, nearest=2, unit=unit)
    fitted = fit_structure(
        centres, training, None, gamma=None, seed=0, host=HostGroup(), learnt_MD=learnt_MD
    )
    rows_ND = torch.from_numpy(z_ND)
    if unit:
        rows_ND = torch.nn.functional.normalize(rows_ND, dim=1)
    want_MD = learnt_MD * torch.pdist(rows_ND).mean()
    torch.testing.assert_close(centres.centres_MD, want_MD, rtol=1e-5, atol=1e-6)
    rho_N = torch.cdist(rows_ND, want_MD).square().sort(dim=1).values[:, :2].mean(dim=1)
    assert float(centres.rho_max) == pytest.approx(HEAD_ROOM * float(rho_N.max()), rel=1e-5)
    # No class was held out from them that could choose.
    assert fitted.learnt and fitted.gamma == DEFAULT_GAMMA
    assert float(centres.gamma) == pytest.approx(DEFAULT_GAMMA)
    assert "default" in fitted.chosen_on and not fitted.figures


def test_views_need_views() -> None:
    learnt = StructureConfig(form="learnt", objective="views")
    config = Config(recipe="none", structure=learnt)
    with pytest.raises(
        InputError, match=r"structure\.objective views.*data\.views is 1.*at least 2"
    ):
        config.check()
    replace(config, data=DataConfig(views=2)).check()
    replace(config, structure=replace(learnt, form="centres")).check()
