"""Render the embedded data set "homeware": six photo-like views of each of 820 household models.

    python tools/homeware/render.py CATALOGUE_DIR OUT_DIR

CATALOGUE_DIR holds the ``*.sh3f`` files of Debian's package sweethome3d-furniture. OUT_DIR receives
PRODUCTID_V.jpg (V = 0 .. 5) and products.csv, the attribution table. VTK, Pillow and NumPy are
needed for this step only; training reads the finished images.

Everything random about a view comes from a generator seeded with the product id and the view
number, so the same machine writes the same bytes again, whatever the number of workers.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import time
import zipfile
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import vtkmodules.vtkRenderingOpenGL2  # noqa: F401  (registers the renderer's implementation)
from catalogue import Product, read_products, write_products_csv
from PIL import Image, ImageFilter
from views import (
    MAX_ATTEMPTS,
    VIEWS,
    View,
    backdrop,
    camera_axes,
    direction,
    draw_view,
)
from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray, vtk_to_numpy
from vtkmodules.vtkCommonCore import vtkPoints
from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkImageData, vtkPolyData
from vtkmodules.vtkCommonMath import vtkMatrix4x4
from vtkmodules.vtkFiltersCore import vtkTriangleFilter
from vtkmodules.vtkRenderingCore import (
    vtkActor,
    vtkLight,
    vtkPolyDataMapper,
    vtkRenderer,
    vtkRenderWindow,
    vtkTexture,
    vtkWindowToImageFilter,
)
from wavefront import FloatArray, Material, Mesh, load_model

IMAGE_SIZE = 112  # pixels, both ways
SUPERSAMPLING = 4
JPEG_QUALITY = 85
MIN_COVERAGE = 0.02  # share of the frame
_MASK_ALPHA = 0.1  # so that glass counts as part of the object
_MAX_TEXTURE = 512  # pixels; more cannot be seen at the size of the images
_SHADOW_BLUR = 3.0  # pixels
_MAX_FRAMING_POINTS = 50_000


class UnusableViewError(RuntimeError):
    """No attempt at a view showed enough of the product."""


class Studio:
    """One product's model in an off-screen window, ready to be photographed."""

    def __init__(self, window: vtkRenderWindow, product: Product) -> None:
        self._window = window
        self._renderer = vtkRenderer()
        self._renderer.SetBackground(0.0, 0.0, 0.0)
        self._renderer.SetBackgroundAlpha(0.0)
        self._renderer.AutomaticLightCreationOff()
        self._actors: list[vtkActor] = []
        with zipfile.ZipFile(product.archive) as archive:
            meshes = load_model(archive, product.source_model, product.rotation, product.size)
            for mesh in meshes:
                actor = _actor(mesh, _texture(archive, mesh.material))
                self._actors.append(actor)
                self._renderer.AddActor(actor)
        points = np.concatenate([mesh.points for mesh in meshes])
        self._framing = points[:: 1 + len(points) // _MAX_FRAMING_POINTS]
        self._ground = float(points[:, 1].min())
        if any(actor.HasTranslucentPolygonalGeometry() for actor in self._actors):
            self._renderer.UseDepthPeelingOn()
            self._renderer.SetMaximumNumberOfPeels(4)
        window.AddRenderer(self._renderer)

    def close(self) -> None:
        """Free the model's graphics memory."""
        self._renderer.ReleaseGraphicsResources(self._window)
        self._window.RemoveRenderer(self._renderer)

    def photograph(self, view: View) -> tuple[FloatArray, FloatArray]:
        """The picture (size, size, 3) in 0..255 and the object's opacity (size, size) in 0..1."""
        axes = camera_axes(view)
        self._aim(view, axes)
        self._light(view)
        rgba = self._shoot()
        opacity = rgba[..., 3] / 255.0
        behind = backdrop(view, IMAGE_SIZE)
        if view.shadow:
            behind = behind * (1.0 - view.shadow * self._shadow(view, axes))[..., None]
        return rgba[..., :3] + (1.0 - opacity)[..., None] * behind, opacity

    def _aim(self, view: View, axes: FloatArray) -> None:
        right, up, towards_camera = axes
        distance = view.distance * float(np.linalg.norm(self._framing, axis=1).max())
        depth = distance - self._framing @ towards_camera
        seen = np.stack([self._framing @ right, self._framing @ up], axis=1) / depth[:, None]
        low, high = seen.min(axis=0), seen.max(axis=0)
        half_frame = float((high - low).max()) / 2.0 / view.fill
        centre = (low + high) / 2.0 / half_frame
        camera = self._renderer.GetActiveCamera()
        camera.SetFocalPoint(0.0, 0.0, 0.0)
        camera.SetPosition(*(distance * towards_camera))
        camera.SetViewUp(*up)
        camera.SetViewAngle(2.0 * np.degrees(np.arctan(half_frame)))
        camera.SetWindowCenter(centre[0] - view.shift[0], centre[1] - view.shift[1])

    def _light(self, view: View) -> None:
        self._renderer.RemoveAllLights()
        warm = max(view.warmth, 0.0)
        cold = max(-view.warmth, 0.0)
        for azimuth, elevation, intensity in view.lights:
            light = vtkLight()
            light.SetLightTypeToCameraLight()
            light.SetPosition(*direction(azimuth, elevation))
            light.SetFocalPoint(0.0, 0.0, 0.0)
            light.SetColor(1.0 - 0.25 * cold, 1.0 - 0.1 * warm - 0.08 * cold, 1.0 - 0.3 * warm)
            light.SetIntensity(intensity)
            self._renderer.AddLight(light)
        for actor in self._actors:
            actor.GetProperty().SetAmbient(view.ambient)

    def _shadow(self, view: View, axes: FloatArray) -> FloatArray:
        """Soft shadow (size, size) in 0..1: the model flattened onto the ground along the key
        light."""
        azimuth, elevation, _ = view.lights[0]
        along = direction(azimuth, elevation) @ axes
        # A light near the horizon would throw a shadow that leaves the frame.
        slope = along / max(along[1], 0.5)
        flatten = vtkMatrix4x4()
        for row in range(3):
            flatten.SetElement(row, 1, (row == 1) - (slope[row] if row != 1 else 1.0))
            flatten.SetElement(row, 3, self._ground * (slope[row] if row != 1 else 1.0))
        for actor in self._actors:
            actor.SetUserMatrix(flatten)
        alpha = Image.fromarray(self._shoot()[..., 3].astype(np.uint8), "L")
        for actor in self._actors:
            actor.SetUserMatrix(None)
        return np.asarray(alpha.filter(ImageFilter.GaussianBlur(_SHADOW_BLUR))) / 255.0

    def _shoot(self) -> FloatArray:
        """The window's RGBA (size, size, 4) in 0..255, colours multiplied by opacity, top row
        first."""
        self._renderer.ResetCameraClippingRange()
        grabber = vtkWindowToImageFilter()
        grabber.SetInput(self._window)
        grabber.SetInputBufferTypeToRGBA()
        grabber.ReadFrontBufferOff()
        grabber.Update()
        image = grabber.GetOutput()
        pixels = vtk_to_numpy(image.GetPointData().GetScalars())
        # Averaged here because Pillow's resizing takes colours as not yet multiplied by opacity.
        blocks = pixels.reshape(IMAGE_SIZE, SUPERSAMPLING, IMAGE_SIZE, SUPERSAMPLING, 4)
        return blocks.mean(axis=(1, 3), dtype=np.float64)[::-1]


def render_product(product: Product, out_dir: Path, force: bool) -> Counter[str]:
    """Write the product's views unless all are there; count what made attempts unusable."""
    paths = [out_dir / f"{product.product_id}_{index}.jpg" for index in range(VIEWS)]
    redrawn: Counter[str] = Counter()
    if not force and all(path.is_file() for path in paths):
        return redrawn
    studio = Studio(_window(), product)
    try:
        for index, path in enumerate(paths):
            for attempt in range(MAX_ATTEMPTS):
                picture, opacity = studio.photograph(draw_view(product.product_id, index, attempt))
                fault = _fault(picture, opacity)
                if fault is None:
                    _save(picture, path)
                    break
                redrawn[fault] += 1
            else:
                raise UnusableViewError(
                    f"{product.product_id}: view {index} stayed {fault} every time"
                )
    finally:
        studio.close()
    return redrawn


def _fault(picture: FloatArray, opacity: FloatArray) -> str | None:
    """Why a picture is unusable, or None if it is fine."""
    mask = opacity > _MASK_ALPHA
    if mask.mean() < MIN_COVERAGE:
        return "too small"
    pixels = picture[mask]
    if pixels.std() < 3.0:
        if (pixels < 8.0).mean() > 0.99:
            return "black"
        if (pixels > 247.0).mean() > 0.99:
            return "white"
    return None


def _save(picture: FloatArray, path: Path) -> None:
    image = Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8), "RGB")
    temporary = path.with_name(f"{path.name}.part")
    image.save(temporary, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0", optimize=True)
    os.replace(temporary, path)


@lru_cache(maxsize=1)
def _window() -> vtkRenderWindow:
    """The process's only window: opening one costs more than drawing a view."""
    # Software rendering, for a graphics card would round colours in its own way.
    os.environ["VTK_DEFAULT_OPENGL_WINDOW"] = "vtkOSOpenGLRenderWindow"
    window = vtkRenderWindow()
    window.SetOffScreenRendering(True)
    window.SetMultiSamples(0)
    window.SetAlphaBitPlanes(True)
    window.SetSize(IMAGE_SIZE * SUPERSAMPLING, IMAGE_SIZE * SUPERSAMPLING)
    return window


def _actor(mesh: Mesh, texture: vtkTexture | None) -> vtkActor:
    points = vtkPoints()
    points.SetData(numpy_to_vtk(mesh.points.astype(np.float32), deep=True))
    cells = vtkCellArray()
    corners = np.arange(len(mesh.points), dtype=np.int64)
    offsets = mesh.offsets.astype(np.int64)
    cells.SetData(*(numpy_to_vtkIdTypeArray(part, deep=True) for part in (offsets, corners)))
    data = vtkPolyData()
    data.SetPoints(points)
    data.SetPolys(cells)
    data.GetPointData().SetNormals(numpy_to_vtk(mesh.normals.astype(np.float32), deep=True))
    if texture is not None and mesh.texture_coordinates is not None:
        coordinates = numpy_to_vtk(mesh.texture_coordinates.astype(np.float32), deep=True)
        data.GetPointData().SetTCoords(coordinates)
    # Concave polygons would come out wrong as the fans that graphics hardware makes of them.
    triangles = vtkTriangleFilter()
    triangles.SetInputData(data)
    mapper = vtkPolyDataMapper()
    mapper.SetInputConnection(triangles.GetOutputPort())
    actor = vtkActor()
    actor.SetMapper(mapper)
    material, surface = mesh.material, actor.GetProperty()
    colour = np.array(material.diffuse)
    if texture is not None and mesh.texture_coordinates is not None:
        actor.SetTexture(texture)
        # The catalogues' own icons show textures as they are, whatever diffuse colour stands beside
        # them.
        colour = np.ones(3)
    # Nothing real is perfectly black: a little reflection keeps the shape of black parts visible.
    surface.SetColor(*(0.04 + 0.96 * colour))
    surface.SetSpecularColor(*material.specular)
    surface.SetSpecular(0.6)
    surface.SetSpecularPower(float(np.clip(material.shininess, 4.0, 128.0)))
    surface.SetOpacity(float(np.clip(material.opacity, 0.0, 1.0)))
    return actor


def _texture(archive: zipfile.ZipFile, material: Material) -> vtkTexture | None:
    colour = _image(archive, material.texture) if material.texture else None
    if material.mask and material.mask != material.texture:
        mask = _image(archive, material.mask)
        colour = colour or Image.new("RGB", mask.size, "white")
        alpha = mask.getchannel("A") if mask.mode == "RGBA" else mask.convert("L")
        colour.putalpha(alpha.resize(colour.size))
    if colour is None:
        return None
    pixels = np.asarray(colour)[::-1]
    data = vtkImageData()
    data.SetDimensions(pixels.shape[1], pixels.shape[0], 1)
    data.GetPointData().SetScalars(numpy_to_vtk(pixels.reshape(-1, pixels.shape[2]), deep=True))
    texture = vtkTexture()
    texture.SetInputData(data)
    texture.InterpolateOn()
    # No mipmaps: with them Mesa 22.3 never finishes some views, and supersampling smooths as well.
    texture.MipmapOff()
    return texture


def _image(archive: zipfile.ZipFile, member: str) -> Image.Image:
    """An image of the archive in mode RGB or RGBA, no larger than can be of use."""
    with Image.open(io.BytesIO(archive.read(member))) as stored:
        image = stored.convert("RGBA" if stored.has_transparency_data else "RGB")
    image.thumbnail((_MAX_TEXTURE, _MAX_TEXTURE))
    return image


def main(arguments: list[str] | None = None) -> None:
    """Render what is missing, then write the attribution table."""
    parser = argparse.ArgumentParser(
        description="Render the homeware images from furniture catalogues."
    )
    parser.add_argument("catalogue_dir", type=Path, help="folder with the *.sh3f files")
    parser.add_argument("out_dir", type=Path, help="receives the images and products.csv")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument(
        "--limit", type=int, help="render only the first LIMIT products of the table"
    )
    parser.add_argument("--force", action="store_true", help="render again what is already there")
    options = parser.parse_args(arguments)

    products = read_products(options.catalogue_dir)[: options.limit]
    options.out_dir.mkdir(parents=True, exist_ok=True)
    redrawn: Counter[str] = Counter()
    begin = time.monotonic()
    # A forked child would share the parent's graphics state, hence fresh processes.
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        work = partial(render_product, out_dir=options.out_dir, force=options.force)
        for done, counts in enumerate(pool.imap_unordered(work, products), start=1):
            redrawn += counts
            if done % 50 == 0 or done == len(products):
                print(
                    f"{done}/{len(products)} products, {time.monotonic() - begin:.0f} s", flush=True
                )
    write_products_csv(products, options.out_dir / "products.csv")
    reasons = ", ".join(f"{count} {fault}" for fault, count in sorted(redrawn.items())) or "none"
    print(f"views drawn again: {reasons}")


if __name__ == "__main__":
    main()
