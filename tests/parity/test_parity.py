"""Ranks compute what one process does: the loss and, as the optimizer gets them, all parameter
gradients."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from namr_dist.config import LossConfig, ModelConfig
from namr_dist.model.backbones import Backbone
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.parallel.pool import Ranks
from namr_dist.parity import report as parity_report
from namr_dist.parity.steps import (
    CONV4,
    LOSSES,
    Case,
    Step,
    make_batch,
    step_by_definition,
    step_on_rank,
)
from namr_dist.parity.table import LEARNT, Verdict, judge
from namr_dist.train.objective import TrainingModule

FROZEN = dataclasses.replace(CONV4, batchnorm="frozen")
TRANSFORMER = dataclasses.replace(FROZEN, backbone="timm:test_vit")
STAGES = ("ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3")


def case(**changes: object) -> Case:
    return dataclasses.replace(
        Case(loss="margin", namr=True, way="DDP", ranks=2, dtype="float64"), **changes
    )


def measured(pool: Ranks, of: Case) -> Verdict:
    return judge(of, pool(step_on_rank, of))


def check(verdict: Verdict) -> None:
    assert verdict.good, verdict


@pytest.mark.parametrize("namr", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_process_is_the_definition(loss: str, namr: bool) -> None:
    of = case(
        loss=loss, namr=namr, way="definition", ranks=1, learnt=LEARNT[loss] if namr else None
    )
    step = step_by_definition(of)
    check(judge(of, [step]))
    assert step.gradients["network.structure_head.layers.0.weight"].any() == namr
    for learnt in ("beta", "proxies"):
        gradient = step.gradients.get(f"objective.metric_loss.{learnt}")
        assert gradient is None or gradient.any()
    moves = step.gradients.get("objective.structure_loss.moves")
    assert moves.any() if namr else moves is None


@pytest.mark.dist
@pytest.mark.parametrize("namr", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_two_ranks_are_one(two_ranks: Ranks, loss: str, namr: bool) -> None:
    check(measured(two_ranks, case(loss=loss, namr=namr, learnt=LEARNT[loss] if namr else None)))


@pytest.mark.dist
@pytest.mark.parametrize("way", STAGES)
@pytest.mark.parametrize(
    ("loss", "namr", "learnt"), [("margin", True, None), ("proxy-anchor", False, "views")]
)
def test_every_stage_is_one_process(
    two_ranks: Ranks, way: str, loss: str, namr: bool, learnt: str | None
) -> None:
    check(measured(two_ranks, case(loss=loss, namr=namr, way=way, learnt=learnt)))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("loss", "way", "dtype"),
    [
        ("triplet semihard", "DDP", "float64"),
        ("proxy-anchor", "DDP", "float32"),
        ("multi-similarity", "ZeRO 2", "float64"),
        ("margin", "ZeRO 3", "float64"),
    ],
)
def test_four_ranks_are_one(four_ranks: Ranks, loss: str, way: str, dtype: str) -> None:
    check(measured(four_ranks, case(loss=loss, way=way, dtype=dtype, ranks=4)))


@pytest.mark.dist
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("rows", [(17, 7), (24, 0), (0, 24)])
def test_ranks_with_fewer_rows_or_none(
    two_ranks: Ranks, rows: tuple[int, ...], counted: bool
) -> None:
    for loss, learnt in (("triplet semihard", "views"), ("proxy-anchor", "ranking")):
        check(measured(two_ranks, case(loss=loss, rows=rows, counted=counted, learnt=learnt)))


class Collectives(TorchDispatchMode):
    """Notes every collective on this thread: its name, and the bytes that this rank puts in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            tensors = [
                leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor)
            ]
            self.seen.append((str(func), sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def observed(of: Case) -> tuple[Step, list[tuple[str, int]], int]:
    """A step, its collectives in order, and how often the backbone was run for it."""
    runs = []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: (
            runs.append(1) if isinstance(module, Backbone) and torch.is_grad_enabled() else None
        )
    )
    try:
        with Collectives() as collectives:
            step = step_on_rank(of)
    finally:
        handle.remove()
    return step, collectives.seen, len(runs)


@pytest.mark.dist
@pytest.mark.parametrize("model", [FROZEN, TRANSFORMER], ids=lambda model: model.backbone)
@pytest.mark.parametrize("way", STAGES)
def test_gradient_caching_changes_nothing(two_ranks: Ranks, way: str, model: ModelConfig) -> None:
    """The same gradients, reduced in as many calls of as many bytes, whatever the pieces."""
    whole, cached = (case(way=way, model=model, pieces=pieces) for pieces in (1, 3))
    answers = {of.pieces: two_ranks(observed, of) for of in (whole, cached)}
    for of in (whole, cached):
        check(judge(of, [step for step, _, _ in answers[of.pieces]]))
    reductions = [
        [[call for call in seen if "reduce" in call[0]] for _, seen, _ in answers[pieces]]
        for pieces in (1, 3)
    ]
    assert reductions[0] == reductions[1]
    assert sum(size for _, size in reductions[0][0]) > 200_000, (
        "the parameters' own gradients are among them"
    )
    assert [[runs for _, _, runs in answers[pieces]] for pieces in (1, 3)] == [[1, 1], [6, 6]]


@pytest.mark.dist
@pytest.mark.parametrize("rows", [None, (17, 7), (24, 0)])
def test_ranks_run_the_same_forwards_and_collectives(
    two_ranks: Ranks, rows: tuple[int, ...] | None
) -> None:
    """Under ZeRO 3, or they would wait for each other for ever."""
    of = case(way="ZeRO 3", model=FROZEN, pieces=3, rows=rows)
    (first, seen, runs), (second, others, other_runs) = two_ranks(observed, of)
    check(judge(of, [first, second]))
    assert len(seen) > 50 and [name for name, _ in seen] == [name for name, _ in others]
    assert runs == other_runs


def heads_through_engine(of: Case) -> tuple[int, list[Tensor], list[Tensor]]:
    """Engine forwards for one (z, s); that (z, s); the module's own, before it was an engine's."""
    from namr_dist.parity.steps import zero_engine

    module, images, _ = make_batch(of)
    with torch.no_grad():
        plain = [value.clone() for value in module.eval()(images)]
    engine = zero_engine(module, of)
    forwards = []
    engine.module.register_forward_pre_hook(lambda *_: forwards.append(1))
    engine.eval()
    with torch.no_grad():
        heads = [value.clone() for value in engine(images)]
    engine.destroy()
    return len(forwards), heads, plain


@pytest.mark.dist
def test_both_heads_come_from_one_forward(two_ranks: Ranks) -> None:
    for forwards, heads, plain in two_ranks(heads_through_engine, case(way="ZeRO 3")):
        assert forwards == 1 and len(heads) == len(plain) == 2
        for value, wanted in zip(heads, plain, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


def test_pieces_drop_the_same_with_and_without_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        network = EmbeddingNetwork(FROZEN, image_size=16, pieces=3)
        network.backbone.layers.append(nn.Dropout(0.5))
        module = (
            TrainingModule(network, LossConfig(), classes=4, images_per_class=3).double().train()
        )
        images = torch.randint(0, 256, (12, 16, 16, 3), dtype=torch.uint8)
        torch.manual_seed(5)
        module(images, torch.arange(4).repeat(3)).total.backward()
        return [value.grad for value in module.parameters() if value.grad is not None]

    cached = gradients()
    monkeypatch.setattr(
        "namr_dist.parallel.gradcache.checkpoint", lambda function, part, **_: function(part)
    )
    for ours, plain in zip(cached, gradients(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-15)


def step_without_factor(of: Case) -> Step:
    """What would come of the optimizer's mean over ranks if nothing undid it."""
    from namr_dist.train import objective

    kept = objective.for_averaged_gradients
    objective.for_averaged_gradients = lambda loss: loss
    try:
        return step_on_rank(of)
    finally:
        objective.for_averaged_gradients = kept


@pytest.mark.dist
def test_a_wrong_gradient_is_found(two_ranks: Ranks, tmp_path: Path) -> None:
    """Half the gradient, with the right loss, in every way; and what is said of it."""
    rows = []
    for way in ("DDP", "ZeRO 1"):
        of = case(way=way)
        wrong = judge(of, two_ranks(step_without_factor, of))
        assert not wrong.good and wrong.errors.gradient == pytest.approx(0.5, abs=1e-3)
        assert wrong.errors.loss < 1e-12
        rows += [parity_report.row(wrong), parity_report.row(measured(two_ranks, of))]
    assert [row.good for row in rows] == ["no", "yes"] * 2
    assert (
        len(parity_report.failures(rows)) == 2 and "DDP, 2 ranks" in parity_report.failures(rows)[0]
    )
    parity_report.write_csv(tmp_path / "parity.csv", rows, parity_report.origin())
    read, _ = parity_report.read_csv(tmp_path / "parity.csv")
    assert [row.good for row in read] == ["no", "yes"] * 2
    ((_, heading, lines),) = parity_report.tables(read)
    assert len(lines) == 1 and len(heading) == len(lines[0])


def test_csv_without_parity_is_refused(
    forked_namr: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = forked_namr("doctor", "--csv", "figures.csv")
    assert done.returncode == 2 and "figures.csv" in done.stderr and "--parity" in done.stderr


@pytest.mark.whole
@pytest.mark.dist
@pytest.mark.timeout(1800)
def test_doctor_finds_every_case_within_its_bounds(
    namr: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = namr("doctor", "--parity", "--json", timeout=1800)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["failures"] == []
    # (6 losses × on, off × float64, float32) × (1 + 5 ways × 3 numbers of ranks)
    assert sum(row["good"] == "yes" for row in told["rows"]) == 24 * 16
