"""A cell of `namr reproduce --track features`, written a second time from docs/algorithm.md alone:
PyTorch's own layers, optimizer and autograd, scikit-learn's k-means, SciPy's distances in float64
and a full sort. Of the project it uses nothing but the data.

    python tests/reproduce/independent.py --features FILE [--seeds 3] [--loss triplet]

trains heads at full length on the features that the track left in its run folder
(features.safetensors), and compares their figures on homeware's test split with the committed
cells in docs/results/gains-features.

Shapes: V views, N images, F features, B rows of a batch, D width, M centres, C classes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sklearn
import torch
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from torch import Tensor, nn

GAMMAS = (0.0, 0.15, 0.25, 0.4, 0.5, 0.75, 1.0)
ROWS = ("sample", "structure", "structure_shuffled")
FIGURES = ("R@1", "MAP@R")
COSINE = {"triplet": False, "multi_similarity": True}
"""Whether a loss is searched between unit vectors."""

Batches = Iterable[tuple[Tensor, Tensor]]
Figures = dict[str, dict[str, float]]


class Split(NamedTuple):
    features_NF: Tensor
    label_N: np.ndarray


class Data(NamedTuple):
    views_VNF: Tensor
    train: Split
    validation: Split
    test: Split


class Settings(NamedTuple):
    """Those of the recipe homeware on the features track."""

    loss: str = "triplet"
    steps: int = 1000
    width: int = 128
    hidden: int = 512
    classes_per_batch: int = 20
    images_per_class: int = 4
    rate: float = 1e-3
    warmup: int = 10
    decay: float = 1e-4
    clip: float = 10.0
    ranking: float = 2.0


# The objective -----------------------------------------------------------------------------------


def distances(z_BD: Tensor, s_BD: Tensor | None = None) -> Tensor:
    """(B, B) Euclidean, or with the anchor's weights; no gradient where a distance is 0."""
    square_BBD = (z_BD[:, None] - z_BD[None]) ** 2
    if s_BD is not None:
        square_BBD = s_BD[:, None] * square_BBD
    return square_BBD.sum(dim=2).clamp_min(1e-30).sqrt()


def of_others(each_BB: Tensor) -> Tensor:
    """Mean over i ≠ j."""
    return each_BB[~torch.eye(len(each_BB), dtype=torch.bool)].mean()


def triplet(x_BD: Tensor, label_B: Tensor, margin: float = 0.2) -> Tensor:
    """Semi-hard: the nearest negative that is farther than the positive, else the nearest."""
    d_BB = distances(x_BD)
    same_BB = label_B[:, None] == label_B
    anchor_T, positive_T = (same_BB & ~torch.eye(len(x_BD), dtype=torch.bool)).nonzero().T
    reach_T = d_BB[anchor_T, positive_T]
    negative_TB = d_BB[anchor_T].masked_fill(same_BB[anchor_T], math.inf)
    farther_T = negative_TB.masked_fill(negative_TB <= reach_T[:, None], math.inf).amin(dim=1)
    chosen_T = torch.where(farther_T.isfinite(), farther_T, negative_TB.amin(dim=1))
    return (reach_T - chosen_T + margin).clamp_min(0).mean()


def multi_similarity(x_BD: Tensor, label_B: Tensor) -> Tensor:
    alpha, beta, base, epsilon = 2.0, 50.0, 0.5, 0.1
    unit_BD = nn.functional.normalize(x_BD, dim=1)
    similarity_BB = unit_BD @ unit_BD.T
    same_BB = label_B[:, None] == label_B
    positive_BB = same_BB & ~torch.eye(len(x_BD), dtype=torch.bool)
    hard_B1 = similarity_BB.masked_fill(same_BB, -math.inf).amax(dim=1, keepdim=True)
    easy_B1 = similarity_BB.masked_fill(~positive_BB, math.inf).amin(dim=1, keepdim=True)
    pull_BB = positive_BB & (similarity_BB - epsilon < hard_B1)
    push_BB = ~same_BB & (similarity_BB + epsilon > easy_B1)
    attract_B = (pull_BB * torch.exp(-alpha * (similarity_BB - base))).sum(dim=1)
    repel_B = (push_BB * torch.exp(beta * (similarity_BB - base))).sum(dim=1)
    return (torch.log1p(attract_B) / alpha + torch.log1p(repel_B) / beta).mean()


def multi_cluster_ranking(x_BD: Tensor, s_BD: Tensor) -> Tensor:
    """M = 2: a far centre and a near one."""
    spread, floor, sharpness = 3.0, 0.2, 10.0
    d_BB = distances(x_BD.detach())
    far = d_BB.mean()
    near = max(floor * far, far - spread * d_BB.std())
    adaptive_BB = distances(x_BD, s_BD)
    r_2BB = torch.stack([(adaptive_BB - far).abs(), (adaptive_BB - near).abs()])
    return of_others((torch.softmax(-sharpness * r_2BB, dim=0) * r_2BB).sum(dim=0))


def objective(
    z_BD: Tensor, s_BD: Tensor, label_B: Tensor, *, loss: str, ranking: float = 2.0
) -> Tensor:
    x_BD = z_BD / of_others(distances(z_BD))
    metric = {"triplet": triplet, "multi_similarity": multi_similarity}[loss]
    return metric(x_BD, label_B) + ranking * multi_cluster_ranking(x_BD, s_BD)


# Training ----------------------------------------------------------------------------------------


def random_batches(data: Data, settings: Settings, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(view (B,), image (B,)): a pass draws each class at most once, `images_per_class` images of
    it."""
    rng = np.random.default_rng([seed, 1])
    images = [
        np.flatnonzero(data.train.label_N == label) for label in np.unique(data.train.label_N)
    ]
    per_batch = settings.classes_per_batch
    while True:
        order_C = rng.permutation(len(images))
        for start in range(0, len(order_C) - per_batch + 1, per_batch):
            index_B = np.concatenate(
                [
                    rng.choice(images[label], settings.images_per_class, replace=False)
                    for label in order_C[start : start + per_batch]
                ]
            )
            view_B = rng.integers(len(data.views_VNF), size=len(index_B))
            yield torch.from_numpy(view_B), torch.from_numpy(index_B)


def train(
    data: Data, settings: Settings, *, seed: int, batches: Batches | None = None
) -> nn.Linear:
    """The sample head. batches: other ones than `random_batches`."""
    torch.manual_seed(seed)
    features = data.train.features_NF.shape[1]
    sample_head = nn.Linear(features, settings.width)
    structure_head = nn.Sequential(
        nn.Linear(features, settings.hidden),
        nn.BatchNorm1d(settings.hidden),
        nn.Linear(settings.hidden, settings.width),
        nn.BatchNorm1d(settings.width),
        nn.Sigmoid(),
    )
    parameters = [*sample_head.parameters(), *structure_head.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [value for value in parameters if value.dim() == 2]},
            {"params": [value for value in parameters if value.dim() == 1], "weight_decay": 0.0},
        ],
        lr=settings.rate,
        weight_decay=settings.decay,
    )
    warmup, steps = settings.warmup, settings.steps

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    label_N = torch.from_numpy(data.train.label_N)
    drawn = batches or random_batches(data, settings, seed)
    for _, (view_B, index_B) in zip(range(steps), drawn, strict=False):
        rows_BF = data.views_VNF[view_B, index_B]
        s_BD = 1 + 0.5 * (2 * structure_head(rows_BF) - 1)
        loss = objective(
            sample_head(rows_BF),
            s_BD,
            label_N[index_B],
            loss=settings.loss,
            ranking=settings.ranking,
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        schedule.step()
    return sample_head


# Searching ---------------------------------------------------------------------------------------


class Embedded(NamedTuple):
    """In the geometry that is searched, float64."""

    train_ND: np.ndarray
    validation_ND: np.ndarray
    test_ND: np.ndarray


def embedded(train_ND: np.ndarray, *others: np.ndarray, cosine: bool) -> Embedded:
    rows = [np.asarray(z_ND, dtype=np.float64) for z_ND in (train_ND, *others)]
    if cosine:
        rows = [z_ND / np.linalg.norm(z_ND, axis=1, keepdims=True) for z_ND in rows]
    return Embedded(*rows)


def figures(
    z_ND: np.ndarray, label_N: np.ndarray, subtracted_N: np.ndarray | float = 0.0
) -> dict[str, float]:
    """R@1 and MAP@R in percent, every image a query among all others, by ‖z_q − z_j‖² less a
    number of the item."""
    key_NN = cdist(z_ND, z_ND, "sqeuclidean") - subtracted_N
    np.fill_diagonal(key_NN, np.inf)
    relevant_N = np.bincount(label_N)[label_N] - 1
    order_NR = np.argsort(key_NN, axis=1, kind="stable")[:, : relevant_N.max()]
    right_NR = label_N[order_NR] == label_N[:, None]
    place_R = np.arange(1, right_NR.shape[1] + 1)
    precision_NR = right_NR.cumsum(axis=1) / place_R
    counted_NR = right_NR & (place_R <= relevant_N[:, None])
    return {
        "R@1": 100 * float(right_NR[:, 0].mean()),
        "MAP@R": 100 * float(((precision_NR * counted_NR).sum(axis=1) / relevant_N).mean()),
    }


def k_means(
    rows_ND: np.ndarray, *, seed: int, start_N: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Centres (M, D), and the sum of squared distances to the nearest. start_N: numbers of the rows
    to begin at; None: scikit-learn draws them."""
    count = min(512, len(rows_ND) // 4)
    fitted = KMeans(
        count,
        init="random" if start_N is None else rows_ND[start_N],
        n_init=1,
        max_iter=100,
        tol=0.0,
        random_state=seed,
    ).fit(rows_ND)
    return fitted.cluster_centers_, fitted.inertia_


def rho(rows_ND: np.ndarray, centres_MD: np.ndarray, *, nearest: int = 10) -> np.ndarray:
    return np.sort(cdist(rows_ND, centres_MD, "sqeuclidean"), axis=1)[:, :nearest].mean(axis=1)


def search(
    z: Embedded,
    centres_MD: np.ndarray,
    validation_label: np.ndarray,
    test_label: np.ndarray,
    *,
    seed: int,
    nearest: int = 10,
    sign: int = 1,
) -> tuple[float, Figures]:
    """γ, and the figures of the test rows. seed: of the permutation that shuffles ρ. nearest, sign:
    k, and that of γ, which a wrong implementation would have otherwise."""
    train_N, validation_N, test_N = (rho(z_ND, centres_MD, nearest=nearest) for z_ND in z)
    chosen = {
        gamma: figures(z.validation_ND, validation_label, sign * gamma * validation_N)["MAP@R"]
        for gamma in GAMMAS
    }
    gamma = max(GAMMAS, key=chosen.__getitem__)
    limit = 2 * max(train_N.max(), validation_N.max())
    bonus_N = sign * gamma * np.minimum(test_N, limit)
    order_N = np.random.default_rng(seed).permutation(len(bonus_N))
    return gamma, {
        "sample": figures(z.test_ND, test_label),
        "structure": figures(z.test_ND, test_label, bonus_N),
        "structure_shuffled": figures(z.test_ND, test_label, bonus_N[order_N]),
    }


@torch.no_grad()
def embed(head: nn.Linear, data: Data, *, cosine: bool) -> Embedded:
    splits = (data.train, data.validation, data.test)
    return embedded(*(head(split.features_NF).numpy() for split in splits), cosine=cosine)


def cell(data: Data, settings: Settings, *, seed: int) -> tuple[float, Figures]:
    """γ and figures of heads with random draws of their own."""
    head = train(data, settings, seed=seed)
    z = embed(head, data, cosine=COSINE[settings.loss])
    centres_MD, _ = k_means(z.train_ND, seed=seed)
    return search(z, centres_MD, data.validation.label_N, data.test.label_N, seed=seed)


# Comparing ---------------------------------------------------------------------------------------


def interval(first: list[float], second: list[float], *, level: float = 0.99) -> tuple[float, ...]:
    """(low, high) of the difference of two means by Student's t with a pooled deviation."""
    found = stats.ttest_ind(first, second).confidence_interval(level)
    return float(found.low), float(found.high)


def homeware(file: Path) -> Data:
    """The features of the track, and the set's labels."""
    from safetensors.torch import load_file

    from namr_dist.data.location import open_shards
    from namr_dist.recipes.homeware import homeware as recipe

    data = recipe().data
    manifest, tensors = open_shards(data.path, data.remote), load_file(file)
    splits = {
        name: Split(tensors[name], np.unique(manifest.index(split).label_N, return_inverse=True)[1])
        for name, split in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    return Data(views_VNF=tensors["views"], **splits)


def committed(folder: Path, loss: str) -> list[Figures]:
    """Of all seeds there, in their order."""
    paths = sorted(
        folder.glob(f"{loss}-ranking-*/metrics.json"),
        key=lambda path: int(path.parent.name.rpartition("-")[2]),
    )
    return [json.loads(path.read_text())["test"] for path in paths]


def compare(
    own: list[Figures], theirs: list[Figures], say: Callable[[str], None], rows: Iterable[str]
) -> bool:
    """Whether every difference's interval holds 0."""
    agree = True
    for row in rows:
        for figure in FIGURES:
            first, second = ([each[row][figure] for each in cells] for cells in (own, theirs))
            low, high = interval(first, second)
            agree &= low <= 0 <= high
            say(
                f"{row:<18} {figure:<5}  independent {np.mean(first):6.2f} "
                f"({' '.join(f'{value:.2f}' for value in first)})  "
                f"committed, the same seeds {np.mean(second[: len(first)]):6.2f}, "
                f"all {len(second)} {np.mean(second):6.2f} ± {np.std(second, ddof=1):.2f}  "
                f"difference {np.mean(first) - np.mean(second):+.2f}, 99 % [{low:+.2f}, {high:+.2f}]"
            )
    return agree


def main() -> int:
    parser = argparse.ArgumentParser(description="An independent check of the features track.")
    parser.add_argument("--features", type=Path, required=True, help="features.safetensors")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on; at least 2")
    parser.add_argument("--loss", choices=tuple(COSINE), default="triplet")
    parser.add_argument("--steps", type=int, default=Settings().steps)
    words = parser.parse_args()
    cells = Path(__file__).parents[2] / "docs" / "results" / "gains-features"
    theirs, data = committed(cells, words.loss), homeware(words.features)
    settings = Settings(loss=words.loss, steps=words.steps)
    print(
        f"{words.loss} + 2 × multi-cluster ranking, {settings.steps} steps, {len(data.views_VNF)} views; "
        f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, numpy {np.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} thread(s); percent on the test split",
        flush=True,
    )
    own = []
    for seed in range(words.seeds):
        gamma, of_seed = cell(data, settings, seed=seed)
        own.append(of_seed)
        print(f"seed {seed}: γ = {gamma:g}", flush=True)
    agree = compare(own, theirs, print, ROWS)
    print("every interval holds 0" if agree else "an interval does not hold 0")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
