"""Losses whose candidates are the batch and memory rows: the definition against plain loops, the
ops against it."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from op_cases import OPS, PATHS, ROWS, UNEVEN, Batch, batch, device_of, on_ranks, use_path, worst
from torch import Tensor

from namr_dist.kernels import reference
from namr_dist.kernels.reference.mining import (
    distance_weighted_negatives,
    pairs_of,
    semihard_negatives,
)

B = sum(UNEVEN)
LATTICE = torch.randint(-2, 3, (B, 24), generator=torch.Generator().manual_seed(5)).double()
NAMES = [name for name in ROWS if name not in ("mean_distance", "proxy_anchor")]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on blocked PyTorch and on Triton's kernels."""
    use_path(request.param, monkeypatch)
    return request.param


def joined(given: Batch, memory: Batch) -> Batch:
    """z, x and labels of the batch and, behind them, of the memory."""
    return Batch(
        z=torch.cat([given.z, memory.z]),
        x=torch.cat([given.x, memory.x]),
        s=given.s,
        beta=given.beta,
        labels=torch.cat([given.labels, memory.labels]),
        proxies=given.proxies,
    )


def definition(memory: Batch) -> SimpleNamespace:
    """The reference's functions with these memory rows."""
    labels = {"memory_labels_Q": memory.labels}
    return SimpleNamespace(
        multi_cluster_ranking=partial(reference.multi_cluster_ranking, memory_QD=memory.z),
        triplet_loss=partial(reference.triplet_loss, memory_QD=memory.z, **labels),
        margin_loss=partial(reference.margin_loss, memory_QD=memory.x, **labels),
        multi_similarity_loss=partial(
            reference.multi_similarity_loss, memory_QD=memory.x, **labels
        ),
    )


def by_loops(name: str, given: Batch, memory: Batch) -> Tensor:
    """The loss of the first rows of a joined batch as anchors, pair by pair; only these rows carry
    gradients."""
    all_rows = joined(given, memory)
    labels, anchors, N = all_rows.labels.tolist(), range(len(given.z)), len(all_rows.z)
    # Chosen among all pairs of the joined batch, so with no thought of a memory.
    pairs = pairs_of(all_rows.labels)
    if name.startswith("ranking"):
        clusters, spread, sharpness = (5, 2.0, 10.0) if "anchor" in name else (2, 3.0, 10.0)
        d_BN = torch.cdist(given.z, all_rows.z).detach()
        total = torch.zeros((), dtype=torch.float64)
        for i in anchors:
            over = d_BN[i] if "anchor" in name else d_BN
            near = max(0.2 * over.mean(), over.mean() - spread * over.std())
            for j in range(N):
                if j == i:
                    continue
                D = (given.s[i] * (given.z[i] - all_rows.z[j]).square()).sum().sqrt()
                r = torch.stack(
                    [
                        (D - over.mean() + m / (clusters - 1) * (over.mean() - near)).abs()
                        for m in range(clusters)
                    ]
                )
                total = total + (torch.softmax(-sharpness * (clusters - 1) * r, 0) * r).sum()
        return total / (len(given.z) * (N - 1))
    if name == "multi_similarity":
        total = torch.zeros((), dtype=torch.float64)
        for i in anchors:
            s = all_rows.x @ given.x[i]
            positive = [j for j in range(N) if j != i and labels[j] == labels[i]]
            negative = [j for j in range(N) if labels[j] != labels[i]]
            if not positive or not negative:
                continue
            least, most = min(s[p].item() for p in positive), max(s[n].item() for n in negative)
            mined = [torch.exp(-2 * (s[p] - 0.5)) for p in positive if s[p].item() - 0.1 < most]
            total = total + torch.log1p(sum(mined, torch.zeros(()))) / 2
            mined = [torch.exp(50 * (s[n] - 0.5)) for n in negative if s[n].item() + 0.1 > least]
            total = total + torch.log1p(sum(mined, torch.zeros(()))) / 50
        return total / len(given.z)
    x = all_rows.x if name == "margin" else all_rows.z
    squared = torch.cdist(x, x).detach().square()
    if name == "hardest":
        chosen = [
            (
                i,
                int(squared[i].masked_fill(~pairs.same_BN[i], -1).argmax()),
                int(squared[i].masked_fill(~pairs.differ_BN[i], math.inf).argmin()),
            )
            for i in anchors
            if pairs.valid_BR[i].any()
        ]
    else:
        negative_BR = (
            semihard_negatives(squared, pairs)
            if name == "semihard"
            else distance_weighted_negatives(x, pairs, seed=7 if name == "margin" else 2**40 + 3)
        )
        chosen = [
            (i, int(pairs.positive_BR[i, r]), int(negative_BR[i, r]))
            for i in anchors
            for r in range(int(pairs.valid_BR[i].sum()))
        ]
    distances = [((x[i] - x[p]).norm(), (x[i] - x[n]).norm()) for i, p, n in chosen]
    if name != "margin":
        return torch.stack([torch.relu(far - near + 0.2) for far, near in distances]).mean()
    hinges = torch.cat(
        [torch.stack([far - given.beta + 0.2, given.beta - near + 0.2]) for far, near in distances]
    )
    return torch.relu(hinges).sum() / (hinges > 0).sum()


@pytest.mark.parametrize("name", NAMES)
def test_the_definition_is_what_loops_say(name: str) -> None:
    memory, given = batch(13, 6, seed=8), batch(9, 6, seed=1).leaves(torch.float64)
    value, gradients = OPS[name].value_and_gradients(definition(memory), given)
    want = by_loops(name, given, memory)
    torch.testing.assert_close(value, want.detach(), rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(want, [getattr(given, field) for field in OPS[name].by])
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)
        assert gradient.abs().max() > 0
    alone, _ = OPS[name].value_and_gradients(reference, given)
    empty, _ = OPS[name].value_and_gradients(
        definition(batch(0, 6, labels=memory.labels[:0])), given
    )
    assert not torch.isclose(value, alone, rtol=1e-3) and torch.equal(empty, alone)


MEMORIES = {
    "random": (batch(B, 24, seed=6), batch(45, 24, seed=7)),
    "without a positive": (batch(B, 24, seed=6), batch(45, 24, seed=8, labels=torch.arange(45) + 20)),
    # Small integers: equal distances are equal bits everywhere. Some copies keep their label, some
    # get another.
    "copies of the batch": (batch(B, 24, z=LATTICE), batch(
        12, 24, z=LATTICE[5:17], labels=batch(B, 24).labels[5:17] + (torch.arange(12) > 8))),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "counts"),
    [
        ("random", UNEVEN),
        ("without a positive", (B,)),
        ("copies of the batch", (B,)),
        ("copies of the batch", UNEVEN),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_definition(path: str, name: str, case: str, counts: tuple[int, ...]) -> None:
    given, memory = (part.rounded(torch.float32) for part in MEMORIES[case])
    want_loss, wanted = OPS[name].value_and_gradients(
        definition(memory), given.leaves(torch.float64)
    )
    dtype, bound = (torch.float64, 1e-9) if path == "cpu" else (torch.float32, 1e-4)
    plain = joined(given, memory).to(dtype, device_of(path))
    results = on_ranks(counts, lambda i, j, gather: ROWS[name][1](plain, i, j, gather))
    for loss, *_ in results:
        assert abs(float(loss) - float(want_loss)) <= 0.1 * bound * float(want_loss)
    for position, (argument, want) in enumerate(zip(OPS[name].by, wanted, strict=True), start=1):
        shares = [result[position] for result in results]
        got = torch.stack(shares).sum(0) if argument == "beta" else torch.cat(shares)
        assert worst(got, want) <= bound


def test_memory_and_labels_belong_together() -> None:
    given = batch(9, 4)
    with pytest.raises(ValueError, match="pass both or neither"):
        reference.triplet_loss(given.z, given.labels, memory_QD=given.z)
    with pytest.raises(ValueError, match="as wide as the rows"):
        reference.multi_cluster_ranking(given.z, given.s, memory_QD=given.z[:, :3])
    with pytest.raises(ValueError, match=r"shape \(9,\), one per row"):
        reference.margin_loss(
            given.x,
            given.labels,
            beta=given.beta,
            memory_QD=given.x,
            memory_labels_Q=given.labels[:5],
        )
