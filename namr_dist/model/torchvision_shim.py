"""Let torchvision import beside a CPU build of torch.

Its published wheels are built against the CUDA build, and importing one elsewhere stops at
"operator torchvision::nms does not exist". Declaring the two schemas that it looks up is enough for
all that timm uses; calling them still fails, as it should. Nothing on the main path needs
torchvision: only `timm:` backbones do.
"""

from __future__ import annotations

import sys

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A library's declarations end with its last reference.
_library: torch.library.Library | None = None


def make_torchvision_importable() -> None:
    """Declare torchvision's missing operators if, and only if, a plain import fails for want of
    them."""
    global _library
    if _library is not None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS.values():
            _library.define(schema)
