"""What heads on frozen features are trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from namr_dist.recipes.homeware import homeware
from namr_dist.reproduce.heads import Features, _batches
from namr_dist.train.checks import check_run


def test_an_image_that_is_shown_twice_in_a_row_is_shown_in_two_views() -> None:
    """`data.views` is the run's, whatever the features were made with."""
    base = homeware()
    base = replace(base, data=replace(base.data, verify=False), optim=replace(base.optim, steps=30))
    training_set = check_run(base, world_size=1, local_rank=0)
    nothing = torch.zeros(len(training_set.index), 1)
    features = Features(
        views_VNF=torch.zeros(8, *nothing.shape),
        train_NF=nothing,
        validation=(nothing, training_set.index),
        test=(nothing, training_set.index),
        training_set=training_set,
    )
    label_N = training_set.index.label_N
    starts: set[int] = set()
    twice = replace(base, data=replace(base.data, views=2))
    for view_B, index_B in _batches(features, twice):
        view_H2, index_H2 = view_B.reshape(-1, 2).numpy(), index_B.reshape(-1, 2).numpy()
        assert (index_H2[:, 0] == index_H2[:, 1]).all()
        assert ((view_H2[:, 1] - view_H2[:, 0]) % 8 == 1).all()
        assert (np.unique(label_N[index_B], return_counts=True)[1] == 4).all()
        starts |= set(view_H2[:, 0])
    assert starts == set(range(8))
    once = [index_B.reshape(-1, 4) for _, index_B in _batches(features, base)]
    assert len(once) == 30 and all(len(set(row.tolist())) == 4 for row in once[0])
