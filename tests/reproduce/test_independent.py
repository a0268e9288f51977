"""A cell of the features track compared with independent.py, which shares nothing with it but the
data: the objective and its gradient; training on the same draws; centres, ρ, γ and figures of the
same embeddings; and figures with random draws of each side's own.

The features are made: clusters whose spread differs between classes, under homeware's labels and
splits. independent.py itself runs on the real ones, at full length (docs/experiments.md).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from independent import (
    COSINE,
    FIGURES,
    ROWS,
    Data,
    Embedded,
    Settings,
    Split,
    cell,
    embed,
    embedded,
    interval,
    k_means,
    objective,
    rho,
    search,
    train,
)

from namr_dist.config import Config
from namr_dist.recipes.homeware import homeware
from namr_dist.reproduce.features import measure
from namr_dist.reproduce.heads import Features, Trained, Training, _batches, train_heads
from namr_dist.structure.k_means import starting_rows
from namr_dist.train.checks import check_run
from namr_dist.train.objective import Objective

pytestmark = pytest.mark.slow

LOSSES = tuple(COSINE)
SEEDS = (0, 1, 2)
CLASSES = {"train": 100, "val": 50, "test": 120}
WIDTH, HIDDEN, VIEWS, STEPS = 24, 48, 2, 40
FEWER_STEPS = 12
"""for training on the same draws: rounding errors grow with every step"""


def config_of(loss: str, *, seed: int = 0, steps: int = STEPS) -> Config:
    base = homeware()
    return replace(
        base,
        data=replace(base.data, verify=False),
        model=replace(base.model, width=WIDTH, structure_hidden=HIDDEN),
        loss=replace(base.loss, metric=loss, ranking=replace(base.loss.ranking, rise_passes=0.0)),
        optim=replace(base.optim, steps=steps),
        train=replace(base.train, seed=seed),
    )


def settings_of(loss: str, *, steps: int = STEPS) -> Settings:
    return Settings(loss=loss, steps=steps, width=WIDTH, hidden=HIDDEN)


@cache
def features() -> Features:
    """48 numbers an image, of which 16 say what class it is of, and how surely depends on it."""
    whole = check_run(config_of("triplet"), world_size=1, local_rank=0)
    manifest, rng = whole.manifest, np.random.default_rng(0)
    mixed = rng.normal(size=(16, 48)) / 4

    def made(label_N: np.ndarray) -> torch.Tensor:
        label_N = np.unique(label_N, return_inverse=True)[1]
        centre_CH = rng.normal(size=(label_N.max() + 1, 16))
        spread_C = rng.lognormal(-0.4, 0.6, size=len(centre_CH))
        hidden_NH = centre_CH[label_N] + spread_C[label_N, None] * rng.normal(
            size=(len(label_N), 16)
        )
        noise_NF = 0.3 * rng.normal(size=(len(label_N), 48))
        return torch.from_numpy(hidden_NH @ mixed + noise_NF).float()

    parts = {}
    for split, count in CLASSES.items():
        index = manifest.index(split)
        index = index.only(np.flatnonzero(np.isin(index.label_N, np.unique(index.label_N)[:count])))
        parts[split] = made(index.label_N), index
    train_NF, index = parts["train"]
    noise_VNF = 0.2 * rng.normal(size=(VIEWS, *train_NF.shape))
    return Features(
        views_VNF=train_NF + torch.from_numpy(noise_VNF).float(),
        train_NF=train_NF,
        validation=parts["val"],
        test=parts["test"],
        training_set=replace(whole, index=index),
    )


@cache
def data() -> Data:
    given = features()
    sides = (
        (given.train_NF, given.training_set.index),
        given.validation,
        given.test,
    )
    return Data(
        given.views_VNF,
        *(Split(rows, np.unique(index.label_N, return_inverse=True)[1]) for rows, index in sides),
    )


class Product(NamedTuple):
    trained: Trained
    figures: dict[str, dict[str, float]]


@cache
def product(loss: str, seed: int = 0, steps: int = STEPS) -> Product:
    config = config_of(loss, seed=seed, steps=steps)
    trained = train_heads(features(), config, Training())
    return Product(trained, measure(trained, features(), config)[0]["test"])


def searched(loss: str, trained: Trained) -> Embedded:
    z = trained.z
    return embedded(z["train"], z["validation"], z["test"], cosine=COSINE[loss])


def searched_again(loss: str, centres_MD: np.ndarray, **mutation: int) -> tuple[float, Any]:
    """γ and figures of the product's embeddings, by independent.py."""
    z = searched(loss, product(loss).trained)
    labels = data().validation.label_N, data().test.label_N
    return search(z, centres_MD, *labels, seed=0, **mutation)


def differences(one: Any, other: Any, rows: tuple[str, ...] = ROWS) -> list[float]:
    return [one[row][figure] - other[row][figure] for row in rows for figure in FIGURES]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_objective_and_its_gradient_are_those_of_autograd_in_float64(loss: str) -> None:
    rng = torch.Generator().manual_seed(0)
    label_B = torch.arange(10).repeat_interleave(4)
    z_BD = torch.randn(40, 12, generator=rng, dtype=torch.float64) + 0.3 * label_B[:, None]
    s_BD = 0.5 + torch.rand(40, 12, generator=rng, dtype=torch.float64)
    made = Objective(config_of(loss).loss, classes=10, images_per_class=4, width=12)
    found = []
    for of in (
        lambda z_BD, s_BD: made(z_BD, s_BD, label_B, counts_W=(40,)).total,
        lambda z_BD, s_BD: objective(z_BD, s_BD, label_B, loss=loss),
    ):
        leaves = z_BD.clone().requires_grad_(), s_BD.clone().requires_grad_()
        value = of(*leaves)
        found.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loss", LOSSES)
def test_heads_trained_on_the_same_draws_are_the_same(loss: str) -> None:
    """Layers, first values, schedule, decay, clipping and optimizer.

    Euclidean distances have no gradient for the bias of z, which the optimizer therefore moves by
    rounding errors: those embeddings are compared around their mean.
    """
    config = config_of(loss, steps=FEWER_STEPS)
    theirs = product(loss, steps=FEWER_STEPS).trained
    ours = train(
        data(),
        settings_of(loss, steps=FEWER_STEPS),
        seed=0,
        batches=_batches(features(), config),
    )
    z = embed(ours, data(), cosine=False)
    for name, z_ND in zip(("train", "validation", "test"), z, strict=True):
        moved_D = 0 if COSINE[loss] else (theirs.z[name] - z_ND).mean(axis=0)
        np.testing.assert_allclose(theirs.z[name] - moved_D, z_ND, atol=1e-4 * z_ND.std())


@pytest.mark.parametrize("loss", LOSSES)
def test_the_search_of_the_same_embeddings_and_centres_gives_the_same_figures(loss: str) -> None:
    trained, figures = product(loss)
    centres_MD = trained.centres.centres_MD.double().numpy()
    gamma, again = searched_again(loss, centres_MD)
    assert gamma == trained.fitted.gamma > 0
    assert differences(figures, again) == pytest.approx([0.0] * 6, abs=1e-6)
    z = searched(loss, trained)
    np.testing.assert_allclose(trained.rho["test"], rho(z.test_ND, centres_MD), rtol=1e-5)


@pytest.mark.parametrize("mutation", [{"sign": -1}, {"nearest": 1}])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_wrong_search_gives_other_figures(loss: str, mutation: dict[str, int]) -> None:
    trained, figures = product(loss)
    _, again = searched_again(loss, trained.centres.centres_MD.double().numpy(), **mutation)
    assert max(map(abs, differences(figures, again))) > 0.01


@pytest.mark.parametrize("loss", LOSSES)
def test_centres_are_those_of_scikit_learn(loss: str) -> None:
    trained, figures = product(loss)
    centres_MD = trained.centres.centres_MD.double().numpy()
    z = searched(loss, trained)
    start_M = starting_rows(len(z.train_ND), len(centres_MD), seed=0)
    again_MD, _ = k_means(z.train_ND, seed=0, start_N=start_M)
    np.testing.assert_allclose(centres_MD, again_MD, atol=1e-5 * z.train_ND.std())
    # From rows that it draws, the figures of the same embeddings are those of another seed.
    others = [
        searched_again(loss, k_means(z.train_ND, seed=seed)[0])[1]["structure"] for seed in SEEDS
    ]
    for figure in FIGURES:
        assert figures["structure"][figure] == pytest.approx(
            np.mean([each[figure] for each in others]), abs=2.0
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_figures_with_draws_of_their_own_agree(loss: str) -> None:
    """The 99 % intervals, by Student's t, of the differences of means over three seeds hold 0."""
    theirs = [product(loss, seed).figures for seed in SEEDS]
    ours = [cell(data(), settings_of(loss), seed=seed + 100)[1] for seed in SEEDS]
    for row in ROWS:
        for figure in FIGURES:
            one, other = ([each[row][figure] for each in cells] for cells in (ours, theirs))
            low, high = interval(one, other)
            assert low <= 0 <= high, (row, figure, one, other)
