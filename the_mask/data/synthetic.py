"""moving_shapes: procedural videos in which one frame is often ambiguous and its neighbours resolve it.

A camera pans, shakes and zooms over a textured scene (sky, hill, ground) in which shapes move and occlude each other.
The eight shape classes are four pairs of similar colour. The two of a pair differ in a detail that the per-frame
degradations can hide (a hole, stripes, points), or only in their motion (a spinner turns, a slider does not). In
version 3 one of a pair is also warm and the other cold, which is learned in minutes; spoiled frames do not show it.

Axes: T frames, H W pixels. Everything is drawn from one numpy Generator seeded by (seed, split, video number).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from the_mask.data.classes import load_class_list
from the_mask.data.files import atomic_write, read_json, write_json
from the_mask.data.io import write_picture
from the_mask.data.shapes import RED_GREEN, SHAPES, WARM_COLD_COLORS, Shape, random_shape, shape_alpha, shape_color
from the_mask.data.whole_folder import whole_folder

SKY, HILL, GROUND = 1, 2, 3  # raw PNG values; 0 is void
FIRST_SHAPE_VALUE = 4
MANIFEST = "moving_shapes.json"


@dataclass(frozen=True)
class SceneSize:
    """Frames T, height and width in pixels."""

    frames: int = 24
    height: int = 96
    width: int = 128


@dataclass(frozen=True)
class Version:
    """The differences between versions of the data set.

    Attributes:
        both: share of videos in which both look-alikes of a pair occur.
        spoiled: share of frames that are degraded as a whole.
        blur: range of the sigma in spoiled frames, pixels.
        noise: of spoiled frames, range of the standard deviation, of 255.
        color_blind: spoiled frames also lack the red-green difference.
    """

    both: float
    spoiled: float
    blur: tuple[float, float]
    noise: tuple[float, float]
    color_blind: bool


# In version 3 a spoiled frame shows where a shape is but not which of its pair, and a video has one of each pair only.
VERSIONS = {
    2: Version(0.2, 0.35, (2.0, 3.6), (14, 26), color_blind=False),
    3: Version(0.0, 0.5, (1.0, 2.0), (8, 16), color_blind=True),
}


@dataclass(frozen=True)
class RenderedVideo:
    """Images uint8 [T,H,W,3] RGB, labels uint8 [T,H,W] raw PNG values, hidden bool [T,H,W] (dropout patches).

    spoiled bool [T]: frames whose blur and noise are strong all over.
    """

    images: np.ndarray
    labels: np.ndarray
    hidden: np.ndarray
    spoiled: np.ndarray


def render_video(seed: int, split_id: int, number: int, size: SceneSize, version: int = 2) -> RenderedVideo:
    """Draw video ``number`` of a split; the same arguments give the same pixels."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, split_id, number]))
    canvas_image, canvas_label = _draw_background(rng, 2 * size.height, 2 * size.width)
    cameras = _camera_path(rng, size)
    # World coordinates are canvas pixels. The centres of shapes stay in the box of the average view, so most are seen.
    corners = np.array([_to_world(c, np.array([[0, 0], [size.width, size.height]], float)) for c in cameras])
    low, high = corners.mean(0) + 0.06 * size.height * np.array([[1], [-1]])
    shapes = _random_cast(rng, low, high, size, version)
    images, labels, hidden, spoiled = [], [], [], []
    for t, camera in enumerate(cameras):
        image, label = _draw_frame(canvas_image, canvas_label, camera, shapes, t, size)
        image, mask, bad = degrade(rng, image, version)
        images.append(image)
        labels.append(label)
        hidden.append(mask)
        spoiled.append(bad)
    return RenderedVideo(np.stack(images), np.stack(labels), np.stack(hidden), np.array(spoiled))


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Smooth noise around 0, roughly of unit range, varying over about ``cell`` pixels; float32 [H,W]."""
    small = rng.standard_normal((max(2, round(height / cell)), max(2, round(width / cell)))).astype(np.float32)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def _wave(rng: np.random.Generator, x: np.ndarray, height: float) -> np.ndarray:
    """A sum of four sines over ``x``, each up to ``height`` pixels."""
    turns, phases, heights = rng.uniform(0.5, 4, 4), rng.uniform(0, 2 * np.pi, 4), rng.uniform(0.2, 1, 4) * height
    return (heights[:, None] * np.sin(2 * np.pi * turns[:, None] * x / len(x) + phases[:, None])).sum(0)


def _draw_background(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Canvas image float32 [H,W,3] (0..255) and raw labels uint8 [H,W]."""
    x, y = np.arange(width), np.arange(height)[:, None]
    skyline = height * rng.uniform(0.36, 0.44) + _wave(rng, x, 0.045 * height)
    shore = height * rng.uniform(0.54, 0.62) + _wave(rng, x, 0.015 * height)
    label = np.where(y < skyline, SKY, np.where(y < np.maximum(shore, skyline), HILL, GROUND)).astype(np.uint8)

    clouds = _smooth_noise(rng, height, width, 34) + 0.5 * _smooth_noise(rng, height, width, 12)
    sky = np.array([125.0, 165, 210]) + rng.uniform(-18, 18, 3) + 26 * np.clip(clouds, -1, 2)[..., None]
    bush = _smooth_noise(rng, height, width, 6) + 0.8 * _smooth_noise(rng, height, width, 2.2)
    hill = np.array([96.0, 104, 66]) + rng.uniform(-20, 20, 3) + bush[..., None] * np.array([17, 19, 12])
    grain = _smooth_noise(rng, height, width, 24) + 0.7 * _smooth_noise(rng, height, width, 1.6)
    # Foreshortened planks: dark joints whose spacing grows towards the bottom.
    depth = (y - shore) / height
    joint = np.abs(((x - width / 2) / (0.25 + depth.clip(0)) / rng.uniform(34, 46)) % 1 - 0.5) < 0.035
    ground = np.array([168.0, 146, 118]) + rng.uniform(-22, 22, 3) + 13 * grain[..., None] - 38 * joint[..., None]
    image = np.where((label == SKY)[..., None], sky, np.where((label == HILL)[..., None], hill, ground))
    return image.clip(0, 255).astype(np.float32), label


def _camera_path(rng: np.random.Generator, size: SceneSize) -> list[np.ndarray]:
    """One 2x3 matrix per frame, world (canvas) pixels -> frame pixels: pan, shake, slight roll and zoom."""
    t = np.arange(size.frames) / max(size.frames - 1, 1)
    centre = np.array([size.width, size.height]) * rng.uniform(0.94, 1.06, 2)
    span = np.array([0.5 * size.width, 0.16 * size.height]) * rng.uniform(0.5, 1.0, 2) * rng.choice([-1, 1], 2)
    path = centre + (t[:, None] - 0.5) * span + rng.normal(0, 0.5, (size.frames, 2))
    zoom = 1.0 + rng.uniform(-0.14, 0.14) * np.sin(2 * np.pi * (t * rng.uniform(0.3, 1.0) + rng.uniform()))
    roll = rng.uniform(0, 0.05) * np.sin(2 * np.pi * (t * rng.uniform(0.4, 1.2) + rng.uniform()))
    cameras = []
    for (cx, cy), z, a in zip(path, zoom, roll):
        rotation = z * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        shift = np.array([size.width, size.height]) / 2 - rotation @ np.array([cx, cy])
        cameras.append(np.concatenate([rotation, shift[:, None]], 1))
    return cameras


def _to_world(camera: np.ndarray, points: np.ndarray) -> np.ndarray:
    return (points - camera[:, 2]) @ np.linalg.inv(camera[:, :2]).T


def _random_cast(
    rng: np.random.Generator, low: np.ndarray, high: np.ndarray, size: SceneSize, version: int
) -> list[Shape]:
    """Four to seven shapes, back to front. As in real videos, few classes: mostly one of each pair of look-alikes.

    So if a degraded frame does not show whether a shape is a disk or a ring, any clear frame of the video does.
    """
    count = int(rng.integers(4, 8))
    families = len(SHAPES) // 2
    member = rng.integers(2, size=families)
    kinds = [2 * family + int(member[family]) for family in rng.integers(families, size=count)]
    if rng.random() < VERSIONS[version].both:
        kinds[-1] = kinds[0] ^ 1
    order = rng.permutation(kinds)
    colors = WARM_COLD_COLORS if version >= 3 else [None] * len(SHAPES)
    return [random_shape(rng, int(kind), low, high, size.height, colors[kind]) for kind in order]


def _draw_frame(
    canvas: np.ndarray, canvas_label: np.ndarray, camera: np.ndarray, shapes: list[Shape], t: int, size: SceneSize
) -> tuple[np.ndarray, np.ndarray]:
    """Clean image float32 [H,W,3] and raw labels uint8 [H,W] of frame t."""
    extent = (size.width, size.height)
    image = cv2.warpAffine(canvas, camera, extent, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    label = cv2.warpAffine(canvas_label, camera, extent, flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT)
    zoom = float(np.hypot(camera[0, 0], camera[1, 0]))
    roll = float(np.arctan2(camera[1, 0], camera[0, 0]))
    for shape in shapes:
        centre = camera[:, :2] @ shape.position(t) + camera[:, 2]
        radius = shape.radius * zoom
        x0, y0 = np.floor(centre - radius - 2).astype(int).clip(0)
        x1, y1 = np.minimum(np.ceil(centre + radius + 2).astype(int), extent)
        if x0 >= x1 or y0 >= y1:
            continue
        # Pixel centres are at +0.5, but warpAffine counts them from 0; so no offset here.
        v, u = np.mgrid[y0:y1, x0:x1].astype(np.float64)
        angle = shape.angle(t) + roll
        du, dv = u - centre[0], v - centre[1]
        along = (np.cos(angle) * du + np.sin(angle) * dv) / radius
        across = (-np.sin(angle) * du + np.cos(angle) * dv) / radius
        alpha = shape_alpha(shape.kind, along, across, radius)
        patch = image[y0:y1, x0:x1]
        cover = alpha[..., None].astype(np.float32)
        patch[...] = patch + cover * (shape_color(shape, along, across) - patch)
        region = label[y0:y1, x0:x1]
        region[alpha > 0.3] = 0  # a half-covered border pixel belongs to no class
        region[alpha > 0.6] = FIRST_SHAPE_VALUE + shape.kind
    return image, label


def degrade(rng: np.random.Generator, image: np.ndarray, version: int = 2) -> tuple[np.ndarray, np.ndarray, bool]:
    """Degrade one frame: blur, flicker, dropout patches and noise, drawn for every frame.

    Args:
        image: float32 [H,W,3], 0..255.
        version: from 3 on, a spoiled frame does not tell red from green.

    Returns:
        uint8 [H,W,3], the bool mask [H,W] of the dropout patches, and whether the whole frame is degraded.
    """
    height, width = image.shape[:2]
    rules = VERSIONS[version]
    bad = rng.random() < rules.spoiled
    if bad and rules.color_blind:
        image = without_red_green(image)
    if bad or rng.random() < 0.4:
        sigma = rng.uniform(*rules.blur) if bad else rng.uniform(0.5, 1.2)
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    gain = rng.uniform(0.65, 1.3) * rng.uniform(0.9, 1.1, 3)
    image = image * gain.astype(np.float32) + np.float32(rng.uniform(-12, 12))

    hidden = np.zeros((height, width), bool)
    for _ in range(int(rng.integers(2, 6))):
        h, w = (rng.uniform(0.12, 0.38, 2) * height).astype(int)
        y, x = int(rng.integers(-h // 2, height - h // 2)), int(rng.integers(-w // 2, width - w // 2))
        window = (slice(max(y, 0), y + h), slice(max(x, 0), x + w))
        hidden[window] = True
        patch = image[window]
        if rng.random() < 0.5:
            patch[...] = rng.uniform(30, 225) + rng.normal(0, 6, 3)
        else:  # a lost block: its mean colour, blocky
            patch[...] = patch.mean((0, 1)) + rng.normal(0, 14, 3)
    noise = rng.uniform(*rules.noise) if bad else rng.uniform(3, 14)
    image = image + rng.normal(0, noise, image.shape)
    return image.round().clip(0, 255).astype(np.uint8), hidden, bool(bad)


def without_red_green(image: np.ndarray) -> np.ndarray:
    """Remove the red-green difference of an image; luma and blue-yellow difference remain; float32 [H,W,3]."""
    luma = image @ np.array([0.299, 0.587, 0.114], np.float32)
    return image - ((image[..., 0] - luma) / RED_GREEN[0])[..., None] * RED_GREEN.astype(np.float32)


def make_moving_shapes(
    root: str | Path,
    seed: int = 0,
    train_videos: int = 480,
    val_videos: int = 64,
    size: SceneSize = SceneSize(),
    force: bool = False,
    version: int = 2,
) -> bool:
    """Write the data set as a VSPW tree: ``{train,val}.txt`` and ``data/<video>/{origin/*.jpg,mask/*.png}``.

    The tree appears at ``root`` only when complete. A tree made with the same settings is left as it is.

    Args:
        version: one of :data:`VERSIONS`.

    Returns:
        True when files were written, False when the tree was already there.

    Raises:
        ValueError: impossible sizes, or an unknown version.
        FileExistsError: ``root`` holds something else and ``force`` is off.
    """
    if min(train_videos, val_videos, size.frames) < 1 or min(size.height, size.width) < 32:
        raise ValueError(
            f"need >= 1 video per split, >= 1 frame, sides >= 32; got {train_videos}, {val_videos}, {size}"
        )
    if version not in VERSIONS:
        raise ValueError(f"moving_shapes has no version {version}; known: {', '.join(map(str, VERSIONS))}")
    root = Path(root)
    settings = {
        "version": version,
        "seed": seed,
        "train_videos": train_videos,
        "val_videos": val_videos,
        **asdict(size),
    }
    if root.exists() and any(root.iterdir()) and not force:
        manifest = root / MANIFEST
        if manifest.is_file() and read_json(manifest) == settings:
            return False
        raise FileExistsError(
            f"{root} exists and was made with other settings than {settings}; pass --force to replace it"
        )
    with whole_folder(root) as partial:
        for split_id, (split, count) in enumerate((("train", train_videos), ("val", val_videos))):
            names = [f"{split}_{number:03d}" for number in range(count)]
            for number, name in enumerate(names):
                _write_video(partial / "data" / name, render_video(seed, split_id, number, size, version))
            atomic_write(partial / f"{split}.txt", "".join(f"{name}\n" for name in names).encode())
        write_json(partial / MANIFEST, settings)
    return True


def _write_video(folder: Path, video: RenderedVideo) -> None:
    for t, (image, label) in enumerate(zip(video.images, video.labels)):
        write_picture(folder / "origin" / f"{t:08d}.jpg", image, durable=False, quality=92, subsampling=0)
        write_picture(folder / "mask" / f"{t:08d}.png", label, durable=False)


def contact_sheet(seed: int, videos: int, size: SceneSize, frames: int = 6, version: int = 2) -> np.ndarray:
    """A picture of frames with their coloured labels below, two rows per training video, uint8 RGB; black is void."""
    palette = np.zeros((256, 3), np.uint8)
    class_list = load_class_list("moving_shapes")
    palette[1 : len(class_list.colors) + 1] = class_list.colors
    shown = np.linspace(0, size.frames - 1, min(frames, size.frames)).astype(int)
    rows = []
    for number in range(videos):
        video = render_video(seed, 0, number, size, version)
        rows += [np.concatenate(list(video.images[shown]), 1), np.concatenate(list(palette[video.labels[shown]]), 1)]
    return np.concatenate(rows)
