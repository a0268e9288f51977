"""Backbones of a user's own: what they are given, how they are normalised, and which are
refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from namr_dist import named_code
from namr_dist.errors import InputError
from namr_dist.model.backbones import Backbone, build_backbone
from namr_dist.parallel.batchnorm import GlobalBatchNorm

CODE = """
import torch
from torch import nn

SEEN = []
NUMBER = 7

class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())

class Means(nn.Module):
    mean, std = torch.tensor([0.0, 0.5, 1.0]), (1, 2, 4)

    def forward(self, images):
        return images.mean((2, 3))

def told(*, pretrained, image_size=1, other=3):
    SEEN.append((pretrained, image_size, other))
    return Plain()

def greedy(width):
    return Plain()

def maps():
    return nn.Conv2d(3, 6, 3)

def pair():
    class Pair(nn.Module):
        def forward(self, images):
            return images.flatten(1), images.flatten(1)
    return Pair()

def large():
    return nn.Sequential(nn.Conv2d(3, 6, 99), nn.Flatten())

def number(pretrained):
    return 7

def two_means():
    module = Plain()
    module.mean = (0.5, 0.5)
    return module

def zero_std():
    module = Plain()
    module.std = (0.5, 0.5, 0.0)
    return module
"""


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Backbone]]:
    """Builds a backbone of nets_of_ones_own.py, which lies in the working folder."""
    monkeypatch.setattr(named_code, "_allowed", set())
    monkeypatch.chdir(tmp_path)
    Path("nets_of_ones_own.py").write_text(CODE)

    def build(name: str, **options) -> Backbone:
        named_code.allow([f"nets_of_ones_own:{name}"])
        return build_backbone(
            f"nets_of_ones_own:{name}",
            **{
                "batchnorm": "train",
                "pretrained": False,
                "weights": None,
                "image_size": 32,
                **options,
            },
        )

    yield build
    sys.modules.pop("nets_of_ones_own", None)


def test_its_features_are_measured_and_its_batch_norm_follows_the_setting(
    build: Callable[..., Backbone],
) -> None:
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    made = build("Plain")
    assert made.features == 6 == made(images).shape[1] and isinstance(
        made.layers[1], GlobalBatchNorm
    )
    torch.testing.assert_close(made.mean_3.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    frozen = build("Plain", batchnorm="frozen")
    assert not frozen.train().layers[1].training and not frozen.layers[1].weight.requires_grad
    assert type(frozen.layers[1]) is nn.BatchNorm2d


def test_its_own_normalisation_is_applied(build: Callable[..., Backbone]) -> None:
    images = torch.full((1, 8, 8, 3), 255, dtype=torch.uint8)
    torch.testing.assert_close(build("Means")(images), torch.tensor([[1.0, 0.25, 0.0]]))


def test_it_is_given_what_its_signature_names(build: Callable[..., Backbone]) -> None:
    build("told", pretrained=True, image_size=48)
    assert sys.modules["nets_of_ones_own"].SEEN == [(True, 48, 3)]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("NUMBER", r"is no function \(int\)"),
        (
            "greedy",
            "wants width, which nothing gives; let it take pretrained, image_size or neither",
        ),
        ("number", r"makes no nn.Module \(int\)"),
        ("maps", r"returns \(1, 6, 30, 30\), not one vector an image"),
        ("pair", "returns tuple, not one vector an image"),
        ("large", "does not take images of 32 px .*; change data.image_size"),
        ("two_means", r"has mean = \(0.5, 0.5\); give it three numbers, one a channel$"),
        ("zero_std", "has std = .*; give it three numbers, one a channel and above 0"),
    ],
)
def test_networks_that_do_not_serve(build: Callable[..., Backbone], name: str, told: str) -> None:
    with pytest.raises(InputError, match=f"^model.backbone nets_of_ones_own:{name} {told}"):
        build(name)


def test_weights_from_a_file_are_for_timm_alone(build: Callable[..., Backbone]) -> None:
    with pytest.raises(InputError, match="model.weights goes with timm: backbones"):
        build("Plain", weights=Path("weights.pt"))


def test_a_name_that_nobody_allowed_is_not_imported(build: Callable[..., Backbone]) -> None:
    with pytest.raises(InputError, match="--allow-code nets_of_ones_own:Plain"):
        build_backbone(
            "nets_of_ones_own:Plain",
            batchnorm="train",
            pretrained=False,
            weights=None,
            image_size=32,
        )
    assert "nets_of_ones_own" not in sys.modules
