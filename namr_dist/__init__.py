"""NAMR-dist: distributed training of image-retrieval embeddings.

In a source tree `kernels/` and `launchers/` stand beside this folder; they are found there, so that
one tree serves all imports whether it is installed, installed in editable form from elsewhere, or
not installed at all.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

_tree = _Path(__file__).resolve().parent.parent
if (_tree / "setup.py").is_file() and (_tree / "kernels" / "dispatch.py").is_file():
    __path__.append(str(_tree))
