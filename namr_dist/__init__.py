"""NAMR-dist: distributed training of image-retrieval embeddings.

In a source tree `kernels/` and `launchers/` stand beside this folder; they are found there, so that
one tree serves all imports whether it is installed, installed in editable form from elsewhere, or
not installed at all.

    model = namr_dist.load("runs/demo")
    gallery = namr_dist.open_index("photos.index")

What it offers is imported once it is asked for: `import namr_dist` loads no torch.
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from namr_dist.api import Gallery, Hit, Model, load, open_index

__version__ = "0.1.0"
__all__ = ["Gallery", "Hit", "Model", "load", "open_index"]

_tree = _Path(__file__).resolve().parent.parent
if (_tree / "setup.py").is_file() and (_tree / "kernels" / "dispatch.py").is_file():
    __path__.append(str(_tree))


def __getattr__(name: str) -> _Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from namr_dist import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
