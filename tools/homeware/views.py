"""The random part of a picture: where the camera stands, how it is lit, what is behind the object.

Directions are given as azimuth and elevation: azimuth 0 is +z and turns towards +x, elevation is
towards +y, which is up in the models.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from wavefront import FloatArray

VIEWS = 6
MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class View:
    """Everything that is drawn at random for one picture. Angles are in degrees."""

    azimuth: float
    elevation: float
    roll: float
    distance: float  # of the camera, in radii of the object
    fill: float  # share of the frame that the object's longer side takes
    shift: tuple[float, float]  # of the object's middle, in half frames
    # Azimuth, elevation (seen from the camera), intensity.
    lights: tuple[tuple[float, float, float], ...]
    warmth: float  # -1 (bluish) .. 1 (yellowish)
    ambient: float
    shadow: float  # darkness of the shadow on the ground, 0 for none
    # RGB in 0..1 at both ends of the gradient.
    background: tuple[tuple[float, ...], tuple[float, ...]]
    gradient_angle: float


def draw_view(product_id: str, index: int, attempt: int) -> View:
    """Draw the parameters of view ``index``; each ``attempt`` gives other ones.

    Later attempts look from higher up and from nearer by, for models such as the lines of a parking
    slot show next to nothing otherwise.
    """
    # The six views share a random first direction, lest view 0 always shows the front.
    start = _generator(product_id, "start").uniform(0.0, 360.0)
    rng = _generator(product_id, index, attempt)
    need = attempt / (MAX_ATTEMPTS - 1)
    elevation = (1.0 - need) * (-5.0 + 50.0 * rng.beta(1.8, 2.2)) + need * 75.0
    fill = (1.0 - need) * rng.uniform(0.75, 0.95) + need * 0.95
    slack = 0.03 + 0.5 * (1.0 - fill)
    key_side = rng.choice([-1.0, 1.0])
    hue, saturation, value = rng.uniform(), rng.beta(1.0, 6.0), rng.uniform(0.65, 1.0)
    other_value = float(np.clip(value + rng.normal(0.0, 0.1), 0.1, 1.0))
    return View(
        azimuth=start + 360.0 / VIEWS * (index + rng.uniform(-0.35, 0.35)),
        elevation=elevation,
        roll=rng.normal(0.0, 2.5),
        distance=rng.uniform(2.2, 5.0),
        fill=fill,
        shift=(rng.uniform(-slack, slack), rng.uniform(-slack, slack)),
        lights=(
            (key_side * rng.uniform(5.0, 70.0), rng.uniform(10.0, 65.0), rng.uniform(0.7, 1.0)),
            (-key_side * rng.uniform(20.0, 80.0), rng.uniform(-10.0, 30.0), rng.uniform(0.1, 0.4)),
            (rng.uniform(120.0, 240.0), rng.uniform(10.0, 60.0), rng.uniform(0.0, 0.4)),
        ),
        warmth=float(np.clip(rng.normal(0.0, 0.3), -1.0, 1.0)),
        ambient=rng.uniform(0.28, 0.4),
        shadow=rng.uniform(0.2, 0.55) if elevation > 5.0 and rng.uniform() < 0.6 else 0.0,
        background=(
            _hsv_to_rgb(hue, saturation, value),
            _hsv_to_rgb(
                hue + rng.normal(0.0, 0.05), saturation * rng.uniform(0.5, 1.0), other_value
            ),
        ),
        gradient_angle=rng.uniform(0.0, 360.0),
    )


def backdrop(view: View, size: int) -> FloatArray:
    """The background (size, size, 3) in 0..255."""
    ramp = np.linspace(-0.5, 0.5, size)
    angle = np.radians(view.gradient_angle)
    share = np.clip(0.5 + ramp[None, :] * np.cos(angle) + ramp[:, None] * np.sin(angle), 0.0, 1.0)[
        ..., None
    ]
    first, second = (np.array(colour) * 255.0 for colour in view.background)
    return first * (1.0 - share) + second * share


def camera_axes(view: View) -> FloatArray:
    """The camera's right, up and backward directions as rows (3, 3)."""
    backward = direction(view.azimuth, view.elevation)
    right = np.cross([0.0, 1.0, 0.0], backward)
    right /= np.linalg.norm(right)
    up = np.cross(backward, right)
    cosine, sine = np.cos(np.radians(view.roll)), np.sin(np.radians(view.roll))
    return np.stack([cosine * right + sine * up, cosine * up - sine * right, backward])


def direction(azimuth: float, elevation: float) -> FloatArray:
    """Unit vector (3,) of a direction in degrees."""
    turn, rise = np.radians(azimuth), np.radians(elevation)
    return np.array([np.cos(rise) * np.sin(turn), np.sin(rise), np.cos(rise) * np.cos(turn)])


def _hsv_to_rgb(hue: float, saturation: float, value: float) -> tuple[float, ...]:
    ramps = np.abs((hue * 6.0 + np.array([0.0, 4.0, 2.0])) % 6.0 - 3.0) - 1.0
    return tuple(
        float(c) for c in value * (1.0 - saturation + saturation * np.clip(ramps, 0.0, 1.0))
    )


def _generator(*key: object) -> np.random.Generator:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
