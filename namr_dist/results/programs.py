"""A network as a program of its own: torch.export and ONNX, written and read back.

Shapes: b images (any number), H pixels a side (fixed), D width. A program maps uint8 (b, H, H, 3) →
z, s, both fp32 (b, D).
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from namr_dist.errors import InputError

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_onnx_packages() -> None:
    """Raise InputError unless all that writing and checking ONNX needs is installed."""
    if missing := [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"the format onnx needs {', '.join(missing)}, not installed here; install the extra with "
            "`pip install 'namr-dist[export]'`, or leave onnx out: --formats safetensors torch"
        )


def trace(network: nn.Module, *, size: int) -> ExportedProgram:
    """The network, in eval mode on the CPU, as a program for images of `size` px and any batch.

    Raises InputError for a network that torch.export cannot trace.
    """
    # Two images: a batch of one would be taken for a constant.
    images_bHH3 = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(
                network, (images_bHH3,), dynamic_shapes=_batch_is_dynamic()
            )
    except Exception as error:  # a model from elsewhere may fail to trace in any way
        raise InputError(
            f"the network cannot be traced by torch.export ({_first_line(error)}); "
            "export with --formats safetensors"
        ) from None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # holds source paths of this machine
    return program


def write_torch(program: ExportedProgram, path: Path) -> None:
    """Write a file that torch.export.load reads. Raises OSError where the disk does."""
    # To memory first: PyTorch's own writer does not tell a full disk from any other failure.
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


def read_torch(path: Path) -> Forward:
    """The function that a file of `write_torch` holds."""
    with _quiet():
        forward: Forward = torch.export.load(path).module()
    return forward


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """Write inputs `images` and outputs `z`, `s`. Raises InputError for a program without a
    translation."""
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["images"],
                output_names=["z", "s"],
                dynamic_shapes=_batch_is_dynamic(),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # an operator without a translation shows itself in many ways
        raise InputError(
            f"{path.name} cannot be made of this network ({_first_line(error)}); "
            "export with --formats safetensors torch"
        ) from None
    assert made is not None
    made.save(path)


def read_onnx(path: Path) -> Forward:
    """The function that a file of `write_onnx` holds, run by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def forward(images_bHH3: Tensor) -> tuple[Tensor, Tensor]:
        z_bD, s_bD = session.run(["z", "s"], {"images": images_bHH3.numpy()})
        return torch.from_numpy(z_bD), torch.from_numpy(s_bD)

    return forward


def _batch_is_dynamic() -> tuple[dict[int, Dim]]:
    return ({0: Dim("batch")},)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch warns here about its own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
