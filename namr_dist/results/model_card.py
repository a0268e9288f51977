"""The README.md of an exported folder: what the model is, how to load it, what was measured.

It begins with the metadata that model hubs read, YAML between two lines of dashes; its fields are
those of Hugging Face's model cards (huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import PIL
import torch

from namr_dist import __version__
from namr_dist.data import picture
from namr_dist.data.shardset.shards import MOST_PIXELS
from namr_dist.errors import InputError
from namr_dist.losses import registry
from namr_dist.named_code import is_named_code
from namr_dist.results.tables import (
    Row,
    baseline_rows,
    columns,
    mean_and_deviation,
    mode_rows,
    number,
    reidentification_rows,
)
from namr_dist.retrieval.reidentification import METRICS
from namr_dist.text import printable

_LOADING = {
    "model.safetensors": (
        "with namr-dist installed (neither DeepSpeed nor a process group is used)",
        """\
import torch
from namr_dist.results.export import load

network = load(".")
with torch.no_grad():
    z, s = network(torch.from_numpy(images))
""",
    ),
    "model.pt2": (
        "with PyTorch alone (written by version {torch})",
        """\
import torch

network = torch.export.load("model.pt2").module()
with torch.no_grad():
    z, s = network(torch.from_numpy(images))
""",
    ),
    "model.onnx": (
        "with ONNX Runtime alone",
        """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
z, s = session.run(["z", "s"], {"images": images})
""",
    ),
}

_EMBED = """\
import namr_dist

model = namr_dist.load(".")
z = model.embed(["photo.jpg"])
"""

_IMAGES = """

images = np.stack([prepare(file, size={size}, share={share!r}) for file in ["photo.jpg"]])
# uint8 (b, {size}, {size}, 3)
"""


def model_card(
    *,
    name: str,
    about: Mapping[str, Any],
    sizes: Mapping[str, int],
    differences: Mapping[str, float],
    tolerance: float,
    metrics: Mapping[str, Any] | None,
    licence: str | None = None,
) -> str:
    """Markdown. `about` is the content of config.json; `sizes` (bytes) and `differences` go by file
    of a model; `licence` is an identifier that `check_licence` lets pass."""
    size, output, trained = about["input"]["size"], about["output"], about["trained"]
    share = about["preprocessing"]["crop_share_of_shorter_side"]
    model, loss = about["config"]["model"], about["config"]["loss"]
    ranking = (
        f"multi-cluster ranking (λ = {loss['ranking']['weight']:g}, M = {loss['ranking']['clusters']})"
        if loss["ranking"]["weight"]
        else "no multi-cluster ranking"
    )
    parts = [
        _metadata(licence),
        f"# {printable(name)}",
        f"An image-retrieval network, exported by namr-dist {__version__}: {model['backbone']}, trained for "
        f"{trained['steps']} steps with the {registry.title(loss['metric'])} and {ranking}. It maps an image "
        f"to a sample embedding z ({output['width']} numbers; the nearer two images' z by "
        f"{about['distance']} distance, the more alike the images) and a structure embedding s ("
        f"{_structure(output, about['distance'])}).",
        "## Files",
        f"Each model was read back and compared with the trained network on images of the test split: "
        f"‖difference‖ / ‖embedding‖, the largest over images, z and s. More than {tolerance:g} stops an export.",
        _table(
            ["file", "bytes", "largest relative difference"],
            [[file, f"{sizes[file]:,}", f"{value:.1e}"] for file, value in differences.items()],
        ),
        "`config.json` has the input, the preprocessing and the run's configuration. "
        "`sha256sum --check SHA256SUMS` finds any change of a file; `namr_dist.results.export.load` verifies "
        "`config.json` and `model.safetensors`.",
        *(
            [
                "## Use",
                "Embeddings z of image files, with namr-dist installed:",
                _code(_EMBED),
                "Or in two steps: prepare images, then load a model.",
            ]
            if "model.safetensors" in differences
            else []
        ),
        "## Prepare images",
        f"The middle square, {share:g} of the shorter side, resized to {size} × {size}, bicubic: RGB, 8 bits, height × "
        "width × channel, upright, on white where the image is transparent. Normalisation happens inside the models. "
        f"With NumPy and Pillow alone ({PIL.__version__} here; others may round otherwise), what namr-dist itself runs "
        "on pictures:",
        _code(_source_of(picture) + _IMAGES.format(size=size, share=share)),
        "Evaluation decodes the JPEGs of shards at half or a quarter of their size where that is still large enough, "
        "so embeddings of large originals differ a little from those of other decoders. Of pictures of more than "
        f"{MOST_PIXELS:,} pixels, which this code decodes whole, namr-dist decodes baseline JPEGs at a fraction of "
        "their size and refuses the others.",
        "## Load",
    ]
    for file in differences:
        advice, code = _LOADING[file]
        parts += [f"`{file}`, {advice.format(torch=torch.__version__.split('+')[0])}:", _code(code)]
    backbone = model["backbone"]
    if "model.safetensors" in differences and is_named_code(backbone):
        parts.append(
            f"The backbone of `model.safetensors` is code of its own, `{backbone}`. namr-dist imports it only "
            f'after `namr_dist.named_code.allow(["{backbone}"])`.'
        )
    parts += _measured(metrics, trained)
    parts += ["## Licence", _licence(licence)]
    return printable("\n\n".join(parts), keep="\n") + "\n"


def check_licence(licence: str) -> None:
    """Raises InputError for what cannot be the identifier of a licence."""
    if not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", licence):
        raise InputError(
            f"--license {licence!r} is no identifier of a licence; give it in lower case, as model hubs have it, "
            "such as apache-2.0 or cc-by-nc-4.0"
        )


def _metadata(licence: str | None) -> str:
    lines = [
        "library_name: namr-dist",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        "- image-retrieval",
        "- metric-learning",
    ]
    if licence is None:
        lines += ["license: other", "license_name: not-stated"]
    else:
        lines.append(f'license: "{licence}"')  # quoted: YAML takes 1.0 for a number, no for false
    return "\n".join(["---", *lines, "---"])


def _licence(licence: str | None) -> str:
    minding = (
        "minding the licences of the training images and of the weights that training started from."
    )
    if licence is None:
        return f"Not stated here: whoever publishes these weights states it, {minding}"
    return f"`{licence}`, as stated by whoever exported these weights, {minding}"


def _structure(output: Mapping[str, Any], distance: str) -> str:
    if "gamma" not in output:
        return (
            f"as many positive weights, within 1 ± {output['delta']:g}; Σ s (z − z′)² is the squared "
            "distance read around the image that s belongs to"
        )
    of = "z / ‖z‖" if distance == "cosine" else "z"
    return (
        f"the squared distances of {of} to the {output['nearest']} nearest of {output['centres']} cluster centres "
        f"of the training images, nearest first, and their mean ρ; an item's squared distance to a query less γ ρ, "
        f"γ = {output['gamma']:g}, ranks better: append √(γ (ρ_max − ρ)), ρ_max = {output['rho_max']:.6g}, to "
        "every item, and 0 to every query"
    )


def _measured(metrics: Mapping[str, Any] | None, trained: Mapping[str, Any]) -> list[str]:
    if metrics is None:
        known = {
            "steps": trained["steps"],
            "trained on": trained["machine"],
            "trained with": trained["versions"],
        }
        return [
            "## Measured",
            "Nothing: the run was exported before `namr evaluate`.",
            _table(["", ""], [[key, str(value)] for key, value in known.items()]),
        ]
    before, modes = baseline_rows(metrics), mode_rows(metrics)
    names = columns([*before, *modes])
    rows = [[row.name, *(number(row.figures.get(name)) for name in names)] for row in before]
    rows += [[_label(row), *(number(row.figures.get(name)) for name in names)] for row in modes]
    again = [
        [_label(row), *(mean_and_deviation(row, name) for name in METRICS)]
        for row in reidentification_rows(metrics)
    ]
    protocol = [[key, str(value)] for key, value in (metrics.get("protocol") or {}).items()]
    return [
        "## Measured",
        'Retrieval on the test split, in percent; one run. Rows that begin with "with" are '
        "controls of the row above.",
        _table(["embedding", *names], rows),
        *(
            [
                "Re-identification, in percent: mean ± standard deviation over random galleries.",
                _table(["embedding", *METRICS], again),
            ]
            if again
            else []
        ),
        "## Protocol",
        _table(["", ""], protocol),
    ]


def _label(row: Row) -> str:
    return (
        row.name
        if row.control
        else f"trained, {row.name}" + " (looks at the gallery)" * row.looks_at_gallery
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(printable(cell).replace("|", "\\|") for cell in line) + " |"
        for line in lines
    )


def _source_of(module: ModuleType) -> str:
    """A module's code without its docstring."""
    source = inspect.getsource(module)
    _, first, *_ = ast.parse(source).body
    return "".join(source.splitlines(keepends=True)[first.lineno - 1 :])


def _code(text: str) -> str:
    return f"```python\n{text}```"
