"""A run as training leaves it, with a network that was never trained: for tests of what is done
with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from conftest import picture
from PIL import Image

from namr_dist.config import Config
from namr_dist.recipes.overrides import configure_quietly
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.network import initial_network, save_network

SETTINGS = ("--set.data.image_size", "32", "--set.model.width", "16", "--set.data.workers", "1")


def make_run(folder: Path, *words: str, form: str = "centres", seed: int = 0) -> Path:
    """16 wide at 32 px; structure embeddings of 8 centres, or weights. words: more settings."""
    form_words = ("--set.structure.form", form, "--set.train.seed", str(seed))
    config = configure_quietly("homeware_conv4", [*SETTINGS, *form_words, *words])
    assert isinstance(config, Config), config
    centres = 8 if form == "centres" else 0
    network = initial_network(
        config, device=torch.device("cpu"), pretrained=False, centres=centres
    ).eval()
    if network.centres is not None:
        pictures = np.stack([picture(label, 0, size=32) for label in range(16)])
        with torch.no_grad():
            z_ND = network(torch.from_numpy(pictures))[0]
        network.centres.fit(z_ND, seed=0)
        squared_NM = torch.cdist(z_ND, network.centres.centres_MD).square()
        network.centres.settle(gamma=0.5, rho_max=2 * float(squared_NM.max()))
    run = RunFolder(folder)
    save_network(run.final, network.state_dict(), config, trained={"steps": 0})
    run.config.write_text(config.to_json())
    return folder


def make_pictures(folder: Path, count: int, *, labels: int = 4) -> list[Path]:
    """Files LABEL/NUMBER.jpg, in the order in which a folder is read."""
    paths = []
    for number in range(count):
        path = folder / f"class {number % labels}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number % labels, number)).save(path, quality=90)
        paths.append(path)
    return sorted(paths)
