"""What `import namr_dist` offers: load a trained network, embed pictures, index and search them.

model = namr_dist.load("runs/demo")
z = model.embed(["a.jpg", "b.jpg"])
gallery = model.index("photos")
gallery.save("photos.index")
for hit in namr_dist.open_index("photos.index").search("new.jpg", k=6):
    print(hit.path, hit.label, hit.distance)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from namr_dist.data.picture import Picture
from namr_dist.gallery.embedder import Embedder
from namr_dist.gallery.embedding import DEFAULT_BATCH, embed_all
from namr_dist.gallery.gallery import Gallery, build, open_index
from namr_dist.gallery.items import Hit
from namr_dist.gallery.pictures import collect, of_pictures

__all__ = ["Gallery", "Hit", "Model", "load", "open_index"]


class Model(Embedder):
    """A trained network, ready to embed pictures and to index them."""

    def index(
        self,
        pictures: str | os.PathLike[str] | Sequence[Picture],
        *,
        type: str = "flat",
        mode: str | None = None,
        batch_size: int = DEFAULT_BATCH,
        progress: bool = False,
    ) -> Gallery:
        """A searchable gallery of pictures, in memory: `Gallery.save` writes it.

        pictures: a folder, searched recursively, an image file, a text file that lists some, or a
        sequence of pictures as `embed` takes them. type: of gallery.engine.TYPES. mode: the name of
        a retrieval mode; None: "structure" where the network has cluster centres, else "sample".
        Raises InputError for pictures that cannot be read, and types and modes that do not serve.
        """
        collection = (
            collect([Path(pictures)], self.transform)
            if isinstance(pictures, (str, os.PathLike))
            else of_pictures(pictures, self.transform)
        )
        made = embed_all(self, collection.images, batch_size=batch_size, progress=progress)
        return build(self, made, collection.items, type=type, mode=mode)


def load(
    where: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
) -> Model:
    """The network of a run's folder, of one of its checkpoints (RUN/checkpoints/step-…, or
    final.safetensors there), or of a folder that `namr export` wrote.

    Of a run that has not finished, the newest checkpoint is taken, and a line on stderr says so.
    device: None takes a GPU if torch sees one. Raises InputError if nothing of that kind is there,
    if it is damaged, and if it names code to be imported that has not been allowed
    (named_code.allow).
    """
    return Model.load(where, device=device)
