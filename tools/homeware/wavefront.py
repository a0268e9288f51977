"""Wavefront OBJ and MTL files as numpy arrays, ready to be drawn.

Only what the furniture catalogues use is read: polygons, texture coordinates, normals, smoothing
on or off, and materials with colours, opacity and textures. Lines and free-form surfaces are left
out.
"""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Where two smoothed faces meet at a sharper angle than this, the edge stays visible.
_CREASE_COSINE = np.cos(np.radians(50.0))


@dataclass
class Material:
    """The part of an MTL material that is drawn; colours are RGB in 0..1."""

    diffuse: tuple[float, ...] = (0.7, 0.7, 0.7)
    specular: tuple[float, ...] = (0.0, 0.0, 0.0)
    shininess: float = 10.0
    opacity: float = 1.0
    texture: str | None = None  # archive member with the colour image
    mask: str | None = None  # archive member with the opacity image


@dataclass
class Mesh:
    """All polygons of one material; corners are not shared between polygons."""

    material: Material
    points: FloatArray  # (corners, 3), centimetres, y up
    normals: FloatArray  # (corners, 3), unit length
    texture_coordinates: FloatArray | None  # (corners, 2), origin at the image's lower left
    offsets: IntArray  # (polygons + 1,): polygon p owns corners offsets[p] .. offsets[p + 1]


@dataclass
class _Faces:
    """The faces of an OBJ file; corner lists run over all faces, -1 standing for "not given"."""

    vertex: IntArray  # (corners,)
    texture: IntArray  # (corners,)
    normal: IntArray  # (corners,)
    size: IntArray  # (faces,)
    material: IntArray  # (faces,): index into material_names
    smooth: npt.NDArray[np.bool_]  # (faces,)


def load_model(
    archive: zipfile.ZipFile,
    member: str,
    rotation: tuple[float, ...],
    size: tuple[float, float, float],
) -> list[Mesh]:
    """Read an OBJ file of ``archive`` and place it: rotated, stretched to ``size`` and centred.

    ``rotation`` is a row-major 3x3 matrix; ``size`` is width (x), height (y) and depth (z) in
    centimetres. Stretching to the catalogued size is what Sweet Home 3D itself does.
    """
    vertices, textures, normals, faces, names, libraries = _parse_obj(_text(archive, member))
    if not len(faces.size):
        raise ValueError(f"{member} has no faces")
    folder = posixpath.dirname(member)
    members = {
        name.lower(): name for name in archive.namelist() if posixpath.dirname(name) == folder
    }
    materials: dict[str, Material] = {}
    # Besides the named libraries, the one that bears the model's own name: one OBJ names a wrong
    # file.
    for library in [*libraries, posixpath.splitext(member)[0] + ".mtl"]:
        file = members.get(f"{folder}/{_base_name(library)}".lower())
        if file is not None:
            materials = {**_parse_mtl(_text(archive, file), folder, members), **materials}

    matrix = np.array(rotation).reshape(3, 3)
    vertices = vertices @ matrix.T
    used = vertices[np.unique(faces.vertex)]
    low, high = used.min(axis=0), used.max(axis=0)
    extent = high - low
    stretch = np.where(extent > 1e-9, np.array(size) / np.maximum(extent, 1e-9), 1.0)
    vertices = (vertices - (low + high) / 2) * stretch
    given = _unit(normals @ matrix.T / stretch) if len(normals) else normals
    return list(
        _split(vertices, textures, given, faces, [materials.get(n, Material()) for n in names])
    )


def _split(
    vertices: FloatArray,
    textures: FloatArray,
    given: FloatArray,
    faces: _Faces,
    materials: list[Material],
) -> Iterator[Mesh]:
    """One mesh per material."""
    normals = _corner_normals(vertices, faces)
    if len(given):
        known = faces.normal >= 0
        normals[known] = given[faces.normal[known]]
    corner_material = np.repeat(faces.material, faces.size)
    for index, material in enumerate(materials):
        corners = corner_material == index
        if not corners.any():
            continue
        chosen = faces.texture[corners]
        coordinates = (
            textures[np.maximum(chosen, 0)] if len(textures) and (chosen >= 0).any() else None
        )
        offsets = np.concatenate([[0], np.cumsum(faces.size[faces.material == index])])
        yield Mesh(
            material, vertices[faces.vertex[corners]], normals[corners], coordinates, offsets
        )


def _corner_normals(vertices: FloatArray, faces: _Faces) -> FloatArray:
    """Normals (corners, 3) from the geometry: averaged over a vertex's faces within the crease
    angle."""
    corners = vertices[faces.vertex]
    starts = np.cumsum(faces.size) - faces.size
    following = np.arange(1, len(corners) + 1)
    following[starts + faces.size - 1] = starts
    # Relative to the face's first corner the cross products keep their precision far from the
    # origin.
    local = corners - np.repeat(corners[starts], faces.size, axis=0)
    area: FloatArray = np.add.reduceat(np.cross(local, local[following]), starts, axis=0)
    flat = np.repeat(_unit(area), faces.size, axis=0)
    weight = np.repeat(area * faces.smooth[:, None], faces.size, axis=0)
    total = np.stack(
        [np.bincount(faces.vertex, weight[:, axis], len(vertices)) for axis in range(3)], axis=1
    )
    average = _unit(total.astype(np.float64))[faces.vertex]
    rounded = np.repeat(faces.smooth, faces.size) & ((average * flat).sum(axis=1) > _CREASE_COSINE)
    return np.where(rounded[:, None], average, flat)


def _unit(vectors: FloatArray) -> FloatArray:
    """Scale rows to unit length; rows of no length become the upward direction."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(length > 1e-12, vectors / np.maximum(length, 1e-12), np.array([0.0, 1.0, 0.0]))


def _parse_obj(
    text: str,
) -> tuple[FloatArray, FloatArray, FloatArray, _Faces, list[str], list[str]]:
    """Vertices (V, 3), texture coordinates (T, 2), normals (N, 3), faces, material and library
    names."""
    coordinates: dict[str, list[list[float]]] = {"v": [], "vt": [], "vn": []}
    width = {"v": 3, "vt": 2, "vn": 3}
    corners: list[tuple[int, int, int]] = []
    face_size: list[int] = []
    face_material: list[int] = []
    face_smooth: list[bool] = []
    names: dict[str, int] = {}
    libraries: list[str] = []
    material, smooth = "", False
    for line in text.splitlines():
        key, _, rest = line.strip().partition(" ")
        if key in coordinates:
            coordinates[key].append([float(word) for word in rest.split()[: width[key]]])
        elif key == "f":
            face = [_corner(word, coordinates) for word in rest.split()]
            if len(face) >= 3:
                corners += face
                face_size.append(len(face))
                face_material.append(names.setdefault(material, len(names)))
                face_smooth.append(smooth)
        elif key == "usemtl":
            material = rest.strip()
        elif key == "s":
            smooth = rest.strip() not in ("off", "0")
        elif key == "mtllib":
            libraries.append(rest.strip())
    table = np.array(corners, dtype=np.int64).reshape(-1, 3)
    faces = _Faces(
        vertex=table[:, 0],
        texture=table[:, 1],
        normal=table[:, 2],
        size=np.array(face_size, dtype=np.int64),
        material=np.array(face_material, dtype=np.int64),
        smooth=np.array(face_smooth, dtype=bool),
    )
    arrays = [np.array(coordinates[key], dtype=np.float64).reshape(-1, width[key]) for key in width]
    return arrays[0], arrays[1], arrays[2], faces, list(names), libraries


def _corner(word: str, coordinates: dict[str, list[list[float]]]) -> tuple[int, int, int]:
    """Zero-based vertex, texture and normal index of a face corner such as ``3/7/2`` or
    ``3//2``."""
    parts = (word.split("/") + ["", ""])[:3]
    indices = []
    for part, known in zip(parts, coordinates.values(), strict=True):
        number = int(part) if part else 0
        # Negative numbers count back from the latest element; 0 is no valid number in the format.
        indices.append(number - 1 if number >= 0 else len(known) + number)
    return indices[0], indices[1], indices[2]


def _parse_mtl(text: str, folder: str, members: dict[str, str]) -> dict[str, Material]:
    materials: dict[str, Material] = {}
    current = Material()
    for line in text.splitlines():
        key, _, rest = line.strip().partition(" ")
        words = rest.split()
        if key == "newmtl":
            current = materials.setdefault(rest.strip(), Material())
        elif key in ("Kd", "Ks") and len(words) >= 3:
            colour = tuple(min(max(float(word), 0.0), 1.0) for word in words[:3])
            setattr(current, "diffuse" if key == "Kd" else "specular", colour)
        elif key == "Ns":
            current.shininess = float(words[0])
        elif key == "d":
            current.opacity = float(words[-1])
        elif key == "Tr":
            current.opacity = 1.0 - float(words[0])
        elif key in ("map_Kd", "map_d"):
            # Paths of the modeller's own computer are common; the file itself lies beside the
            # model.
            file = members.get(f"{folder}/{_base_name(rest)}".lower())
            setattr(current, "texture" if key == "map_Kd" else "mask", file)
    return materials


def _base_name(path: str) -> str:
    return posixpath.basename(path.strip().replace("\\", "/"))


def _text(archive: zipfile.ZipFile, member: str) -> str:
    return archive.read(member).decode("utf-8", errors="replace")
