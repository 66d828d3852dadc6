"""Synthetic scenes with exact masks: labelled by the demo, and used to train the embedded model.

A scene is painted back to front: a background, then three to twelve objects at many scales. Each new layer hides the
pixels that it covers, so the masks are the visible pixels after occlusion, and disjoint, except that an object's mask
includes its parts. Without a source of cut-outs everything is procedural; with one, photographic objects and
backgrounds are mixed in. The same arguments give the same scene.
"""

import io
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from samray.scenes.paint import Float, Source, Split, clouds, outline_alpha, photo_crop, ramp, texture, to_uint8

Bool = npt.NDArray[np.bool_]

MIN_VISIBLE_PIXELS = 40
MIN_VISIBLE_FRACTION = 0.25
DIAMETER_RANGE = (0.06, 0.7)  # of the shorter side
NUM_OBJECTS_RANGE = (3, 12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """An image and its ground truth."""

    image: npt.NDArray[np.uint8]
    """(H, W, 3) RGB."""
    masks: Bool
    """(N, H, W) visible pixels; N may be 0."""
    kinds: list[str]
    """N of "object" (a whole with its parts), "part" (a piece of one) and "region" (a side of the background)."""
    names: list[str | None] = field(default_factory=list)
    """N; the name that the source gives an object's cut-out (`info["name"]`), None for other masks."""


@dataclass(slots=True)
class _Layer:
    rgb: Float  # (h, w, 3) in 0..255
    alpha: Float  # (h, w) in 0..1
    parts: npt.NDArray[np.int16]  # (h, w), 0 outside of parts, else the part's number from 1
    name: str | None = None


def make_scene(
    seed: int, size: int | tuple[int, int] = 256, source: Source | None = None, split: Split = "train"
) -> Scene:
    """Paint one scene of `size` (a side, or height and width).

    The splits share no random stream, cut-out or photograph; some shapes and textures occur only in "heldout".
    Masks with fewer than MIN_VISIBLE_PIXELS, or with less than MIN_VISIBLE_FRACTION of the layer visible, are not
    targets.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    # The split is a part of the seed: the same number gives unrelated scenes in both.
    rng = np.random.default_rng([seed, int(split == "heldout")])
    height, width = (size, size) if isinstance(size, int) else size
    canvas, horizon = _background(rng, height, width, source, split)
    # The owner of each pixel: -1 the background, 0 its other side, else the object's number from 1.
    owner = np.full((height, width), -1, np.int16)
    part_of = np.zeros((height, width), np.int16)
    owner[horizon] = 0

    # Uniform in the logarithm: as many small objects as large ones, relative to their size.
    low, high = np.log(DIAMETER_RANGE)
    num_objects = int(rng.integers(NUM_OBJECTS_RANGE[0], NUM_OBJECTS_RANGE[1] + 1))
    diameters = np.exp(rng.uniform(low, high, num_objects)) * min(height, width)
    if rng.random() < 0.6:  # mostly put small objects in front, because otherwise few of them would stay visible
        diameters = np.sort(diameters)[::-1]
    # Areas before occlusion, to judge later how much of each is visible.
    full_areas, object_names = [], []
    for index, diameter in enumerate(diameters, start=1):
        layer = _object_layer(rng, max(float(diameter), 6.0), source, split)
        full_areas.append(_layer_areas(layer))
        object_names.append(layer.name)
        _paint(rng, layer, index, canvas, owner, part_of)

    masks, kinds = [], []
    names: list[str | None] = []
    if horizon.any():
        for side, full in ((owner == 0, horizon), (owner == -1, ~horizon)):
            if _is_target(side, int(full.sum())):
                masks.append(side)
                kinds.append("region")
                names.append(None)
    for index, (areas, name) in enumerate(zip(full_areas, object_names, strict=True), start=1):
        # An object's own mask includes its parts; area 0 is that of the whole.
        of_object = owner == index
        for part, full_area in enumerate(areas):
            visible = of_object & (part_of == part) if part else of_object
            if _is_target(visible, full_area):
                masks.append(visible)
                kinds.append("part" if part else "object")
                names.append(None if part else name)
    stacked = np.stack(masks) if masks else np.zeros((0, height, width), bool)
    return Scene(image=_photograph(rng, canvas), masks=stacked, kinds=kinds, names=names)


def _is_target(visible: Bool, full_area: int) -> bool:
    area = int(np.count_nonzero(visible))
    return area >= MIN_VISIBLE_PIXELS and area >= MIN_VISIBLE_FRACTION * full_area


def _layer_areas(layer: _Layer) -> list[int]:
    """Areas before occlusion: of the whole, then of each part."""
    solid = layer.alpha > 0.5
    return [int(solid.sum())] + [int((solid & (layer.parts == p)).sum()) for p in range(1, int(layer.parts.max()) + 1)]


def _paint(
    rng: np.random.Generator,
    layer: _Layer,
    index: int,
    canvas: Float,
    owner: npt.NDArray[np.int16],
    part_of: npt.NDArray[np.int16],
) -> None:
    """Paint the layer somewhere on the canvas, in place; only its centre must be inside the image."""
    height, width = owner.shape
    h, w = layer.alpha.shape
    top, left = int(rng.uniform(0, height) - h / 2), int(rng.uniform(0, width) - w / 2)
    # The shadow first, under the layer itself.
    if rng.random() < 0.35:
        _shade(rng, layer.alpha, top, left, canvas)
    # The part of the layer inside of the image, in the layer's and in the image's coordinates.
    y0, y1, x0, x1 = max(top, 0), min(top + h, height), max(left, 0), min(left + w, width)
    inside = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    target = np.s_[y0:y1, x0:x1]
    alpha = layer.alpha[inside]
    canvas[target] += (layer.rgb[inside] - canvas[target]) * alpha[..., None]
    solid = alpha > 0.5
    # Slices are views, so this writes into the arrays; later layers overwrite earlier ones.
    owner[target][solid] = index
    part_of[target][solid] = layer.parts[inside][solid]


def _shade(rng: np.random.Generator, alpha: Float, top: int, left: int, canvas: Float) -> None:
    """Darken the canvas by the layer's soft, shifted shadow."""
    h, w = alpha.shape
    pad = max(2, int(0.15 * max(h, w)))
    # Padded, because blur and shift reach beyond the layer.
    shadow = Image.new("L", (w + 2 * pad, h + 2 * pad))
    shadow.paste(Image.fromarray(to_uint8(alpha * 255)), (pad, pad))
    soft = np.asarray(shadow.filter(ImageFilter.BoxBlur(pad * rng.uniform(0.2, 0.6))), np.float32) / 255
    top += int(rng.integers(-pad, pad + 1)) - pad
    left += int(rng.integers(-pad, pad + 1)) - pad
    y0, y1 = max(top, 0), min(top + soft.shape[0], canvas.shape[0])
    x0, x1 = max(left, 0), min(left + soft.shape[1], canvas.shape[1])
    if y0 < y1 and x0 < x1:
        canvas[y0:y1, x0:x1] *= 1 - rng.uniform(0.2, 0.6) * soft[y0 - top : y1 - top, x0 - left : x1 - left, None]


# --- objects ---------------------------------------------------------------------------------------------------------


def _object_layer(rng: np.random.Generator, diameter: float, source: Source | None, split: Split) -> _Layer:
    picture = source.cutout(rng, split) if source is not None and rng.random() < 0.65 else None
    layer = _shape_layer(rng, diameter, source, split) if picture is None else _cutout_layer(rng, diameter, picture)
    if diameter > 24 and rng.random() < (0.3 if picture is None else 0.08):
        _add_parts(rng, layer, source, split)
    blur = rng.uniform(0.3, 1.0) if rng.random() < 0.4 else 0.0
    if blur:
        image = Image.fromarray(to_uint8(layer.alpha * 255)).filter(ImageFilter.GaussianBlur(blur))
        layer.alpha = np.asarray(image, np.float32) / 255
    return layer


def _shape_layer(rng: np.random.Generator, diameter: float, source: Source | None, split: Split) -> _Layer:
    alpha = outline_alpha(rng, diameter, split)
    h, w = alpha.shape
    rgb = texture(rng, h, w, source, split)
    if rng.random() < 0.5:  # a little volume: darker towards one side or towards the rim
        if rng.random() < 0.5:
            light = ramp(rng, h, w)
        else:
            blurred = Image.fromarray(to_uint8(alpha * 255)).filter(ImageFilter.BoxBlur(diameter / 8))
            light = np.asarray(blurred, np.float32) / 255
        rgb *= (1 - rng.uniform(0.15, 0.6) * (1 - light))[..., None]
    return _Layer(rgb, alpha, np.zeros(alpha.shape, np.int16))


def _cutout_layer(rng: np.random.Generator, diameter: float, picture: Image.Image) -> _Layer:
    scale, name = diameter / max(picture.size), picture.info.get("name")
    stretch = np.exp(rng.uniform(-0.2, 0.2))
    size = (max(3, round(picture.width * scale * stretch)), max(3, round(picture.height * scale / stretch)))
    # Resample with premultiplied alpha: otherwise the hidden colour of transparent pixels shows at the edge.
    picture = picture.convert("RGBa").resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.6:
        angle = rng.uniform(0, 360) if rng.random() < 0.3 else rng.uniform(-30, 30)
        picture = picture.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    # Change saturation, swap channels, change brightness: one cut-out gives many looks.
    pixels = np.array(picture.convert("RGBA"), np.float32)
    rgb, alpha = np.ascontiguousarray(pixels[..., :3]), pixels[..., 3] / 255
    grey = rgb.mean(axis=2, keepdims=True)
    rgb = grey + (rgb - grey) * np.float32(rng.uniform(0.3, 1.3))
    if rng.random() < 0.3:
        rgb = rgb[..., rng.permutation(3)]
    gain = rng.uniform(0.6, 1.2) * rng.uniform(0.85, 1.15, 3)
    rgb = rgb * gain.astype(np.float32) + np.float32(rng.uniform(-25, 25))
    return _Layer(rgb, alpha, np.zeros(alpha.shape, np.int16), name)


def _add_parts(rng: np.random.Generator, layer: _Layer, source: Source | None, split: Split) -> None:
    """Paint one or two differently textured pieces onto the layer, cut to its outline, in place."""
    h, w = layer.alpha.shape
    for number in range(1, int(rng.integers(1, 3)) + 1):
        # Each piece is placed at a pixel that is surely inside of the outline.
        ys, xs = np.nonzero(layer.alpha > 0.9)
        if len(ys) == 0:
            return
        pick = int(rng.integers(len(ys)))
        alpha = np.zeros((h, w), np.float32)
        if rng.random() < 0.25:  # one side of a straight cut
            angle = rng.uniform(0, 2 * np.pi)
            distance = (np.arange(w) - xs[pick]) * np.cos(angle) + (np.arange(h)[:, None] - ys[pick]) * np.sin(angle)
            alpha = np.clip(distance + 0.5, 0, 1).astype(np.float32)
        else:
            shape = outline_alpha(rng, rng.uniform(0.25, 0.6) * min(h, w), split)
            top, left = int(ys[pick]) - shape.shape[0] // 2, int(xs[pick]) - shape.shape[1] // 2
            y0, y1, x0, x1 = max(top, 0), min(top + shape.shape[0], h), max(left, 0), min(left + shape.shape[1], w)
            alpha[y0:y1, x0:x1] = shape[y0 - top : y1 - top, x0 - left : x1 - left]
        layer.rgb += (texture(rng, h, w, source, split) - layer.rgb) * alpha[..., None]
        layer.parts[alpha > 0.5] = number


# --- the picture -----------------------------------------------------------------------------------------------------


def _background(rng: np.random.Generator, h: int, w: int, source: Source | None, split: Split) -> tuple[Float, Bool]:
    """The canvas (h, w, 3) in 0..255, and the (h, w) pixels of one of its two sides (none if it has only one)."""
    horizon = np.zeros((h, w), bool)
    photo = source.photo(rng, split) if source is not None and rng.random() < 0.5 else None
    if photo is not None:
        return photo_crop(rng, photo, h, w), horizon
    canvas = texture(rng, h, w, None, split)
    if rng.random() < 0.35:  # two sides, like sky and ground, with a wavy border
        border = ramp(rng, h, w) + (clouds(rng, h, w) - 0.5) * np.float32(rng.uniform(0, 0.3))
        horizon = border > rng.uniform(0.3, 0.7)
        canvas[horizon] = texture(rng, h, w, source, split)[horizon]
    return canvas, horizon


def _photograph(rng: np.random.Generator, canvas: Float) -> npt.NDArray[np.uint8]:
    """Simulate a camera: exposure, blur, noise, JPEG."""
    if rng.random() < 0.5:
        canvas = (canvas - 128) * np.float32(rng.uniform(0.6, 1.15)) + np.float32(128 + rng.uniform(-30, 30))
    image = Image.fromarray(to_uint8(canvas))
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    if rng.random() < 0.5:
        noise = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(1, 12))
        image = Image.fromarray(to_uint8(np.asarray(image, np.float32) + noise))
    if rng.random() < 0.4:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=int(rng.integers(40, 95)))
        image = Image.open(stream)
    return np.array(image)
