"""The list of losses: each entry leads to a loss, no name trains another one, and reading it needs
no torch."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from conftest import REPOSITORY, copy_tree, launch, small_run

from namr_dist import kernels
from namr_dist.config import Config, LossConfig, RankingConfig, StructureConfig
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import InputError
from namr_dist.kernels import reference
from namr_dist.losses import registry
from namr_dist.losses.centres import CentresObjective
from namr_dist.losses.rows import RowsLoss
from namr_dist.train.objective import build_metric_loss

SIZES = {"classes": 5, "images_per_class": 4, "width": 7}


@pytest.mark.parametrize("loss", registry.LOSSES, ids=registry.NAMES)
def test_an_entry_leads_to_its_loss(loss: registry.MetricLoss) -> None:
    made = build_metric_loss(LossConfig(metric=loss.name), **SIZES)
    assert type(made) is loss.load() and isinstance(made, RowsLoss)
    assert type(made).__module__.rpartition(".")[2] == loss.name
    assert callable(getattr(kernels, loss.op)) and callable(getattr(reference, loss.op))
    assert {type(settings) for settings in loss.checked.values()} == {
        type(loss.settings(LossConfig()))
    }


def test_settings_and_losses_have_the_same_names() -> None:
    fields = [entry.name for entry in dataclasses.fields(registry.MetricLossConfig)]
    assert fields == ["metric", "options", *registry.NAMES]
    source = Path(registry.__file__).read_text()
    explained = source[source.index("metric: str = ") : source.index("options: str = ")]
    assert all(name in explained for name in registry.NAMES)


def test_settings_and_kernels_know_the_same_choices() -> None:
    """The settings import no torch, and so not the kernels' lists."""
    mining = get_type_hints(registry.TripletConfig)["mining"]
    statistics = get_type_hints(RankingConfig)["statistics"]
    assert get_args(mining) == kernels.MINING
    assert get_args(statistics) == kernels.STATISTICS
    assert get_type_hints(StructureConfig)["objective"] == CentresObjective


def test_the_losses_of_a_sweep_are_known() -> None:
    script = (REPOSITORY / "slurm" / "sweep.sh").read_text()
    default = re.search(r"\$\{LOSSES:-(.*?)\}", script)
    assert default and set(default[1].split()) <= set(registry.NAMES)


def test_settings_reach_the_loss() -> None:
    config = LossConfig(
        metric="proxy_anchor", proxy_anchor=registry.ProxyAnchorConfig(alpha=7.0, margin=0.3)
    )
    assert (
        build_metric_loss(config, **SIZES).extra_repr()
        == "classes=5, width=7, alpha=7.0, margin=0.3"
    )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "contrastive",
            "known are triplet, margin, multi_similarity, proxy_anchor, and module:NAME",
        ),
        ("proxy-anchor", "did you mean proxy_anchor?"),
        ("", "known are"),
    ],
)
def test_an_unknown_name_trains_nothing(name: str, told: str) -> None:
    config = LossConfig(metric=name)
    for refuse in (config.check, lambda: build_metric_loss(config, **SIZES)):
        with pytest.raises(InputError, match=re.escape(told)):
            refuse()


def test_help_and_the_configuration_need_no_torch() -> None:
    code = (
        "import sys\nfrom namr_dist import recipes\nfrom namr_dist.cli.main import main\n"
        "recipes.find('homeware').check()\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'numpy', 'triton', 'deepspeed'} & sys.modules.keys()))"
    )
    for words in (["--help"], ["reproduce", "--help"], ["train", "homeware", "--settings"]):
        done = launch(sys.executable, "-c", code, *words)
        assert done.stdout.splitlines()[-1] == "[]", (words, done.stderr)


_CONTRASTIVE = '''
"""Contrastive loss of one rank's rows among all."""

from __future__ import annotations

import torch
from torch import Tensor

from namr_dist.losses.registry import ContrastiveConfig
from namr_dist.losses.rows import Batches, Rows, RowsLoss


class ContrastiveRows(RowsLoss):
    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin

    @classmethod
    def configured(cls, settings: ContrastiveConfig, batches: Batches) -> ContrastiveRows:
        return cls(settings.margin)

    def forward(self, rows: Rows, *, seed: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z_ND = rows.z_ND.detach().requires_grad_()
            loss = self.definition(z_ND, rows.labels_N, seed=seed)
            grad_ND, = torch.autograd.grad(loss, z_ND)
        return loss.detach(), grad_ND[rows.offset : rows.offset + len(rows.z_bD)]

    def definition(self, x_BD: Tensor, labels_B: Tensor, *, seed: int) -> Tensor:
        d_BB = torch.cdist(x_BD, x_BD)
        same_BB = labels_B[:, None] == labels_B
        return torch.where(same_BB, d_BB, (self.margin - d_BB).relu()).mean()
'''


@pytest.mark.slow
def test_a_new_loss_is_its_module_and_its_rows_in_the_registry(
    shard_set: Manifest, tmp_path: Path
) -> None:
    """In a copy of the tree, two files are touched; the command line, training, evaluation and the
    report know it."""
    copy_tree(tmp_path)
    losses = tmp_path / "namr_dist" / "losses"
    (losses / "contrastive.py").write_text(_CONTRASTIVE)
    listed = (losses / "registry.py").read_text()
    for before, added in (
        (
            "@dataclass(frozen=True, kw_only=True)\nclass MetricLossConfig:",
            "@dataclass(frozen=True, kw_only=True)\nclass ContrastiveConfig:\n    margin: float = 0.8\n"
            '    """Distance beyond which negatives are left alone."""\n\n\n',
        ),
        (
            "    triplet: TripletConfig = field(",
            "    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)\n",
        ),
        (
            ")\nNAMES: tuple[str, ...]",
            '    MetricLoss(name="contrastive", title="contrastive loss", op="mean_pairwise_distance",\n'
            '               module="namr_dist.losses.contrastive:ContrastiveRows"),\n',
        ),
    ):
        assert listed.count(before) == 1, before
        listed = listed.replace(before, added + before)
    (losses / "registry.py").write_text(listed)

    train = ["train", "homeware_conv4", "--run-dir", "run", *small_run(shard_set, steps=3)]
    train += ["--set.loss.metric", "contrastive", "--set.loss.contrastive.margin", "1.5"]
    told = _namr(
        tmp_path, ["train", "homeware_conv4", "--settings"], ["reproduce", "--help"], train
    )
    assert "--set.loss.contrastive.margin" in told
    assert "contrastive" in told.split("--losses")[-1]  # the help of reproduce
    with pytest.raises(InputError, match="contrastive"):  # this tree knows it not
        Config.load(tmp_path / "run" / "config.json")
    _namr(tmp_path, ["evaluate", "run"], ["report", "run"])
    assert "with the contrastive loss" in (tmp_path / "run" / "report.html").read_text()


def _namr(tree: Path, *commands: list[object]) -> str:
    """What the commands of a source tree say, one after the other in a process; training, which
    ends it, is the last."""
    code = (
        "import json, sys\n"
        "from namr_dist.cli.main import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        code = main(words)\n"
        "    except SystemExit as ended:\n"
        "        code = ended.code\n"
        "    assert not code, words\n"
    )
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = launch(sys.executable, "-c", code, words, cwd=tree)
    assert done.returncode == 0, done.stderr
    return done.stdout
