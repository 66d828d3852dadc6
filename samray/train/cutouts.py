"""Photographic material for scenes: objects with an alpha channel, and backgrounds, from folders of images."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from samray.errors import ConfigError
from samray.scenes.paint import Split

CUTOUT_SIDE = 192
PHOTO_SIDE = 1024
MIN_CUTOUT_SIDE = 40
MAX_CUTOUT_SIDE = 1600
HELDOUT_FRACTION = 0.1
_SUFFIXES = {".png", ".jpg", ".jpeg"}
_CACHE_VERSION = 4
_KEYS = ("group", "name", "is_object")


class CutoutSource:
    """The usable images in some folders, decoded once into a memory-mapped cache.

    A PNG with real transparency and one dominant piece is an object; a large opaque image is a background; all others
    are ignored. Folders are sampled in proportion to the square root of their number of names, which gives small
    photographic folders more weight; within a folder all names are equally likely, whatever the number of variants of
    an image. HELDOUT_FRACTION of the names, chosen by hash, form the split "heldout". Raises ConfigError if nothing is
    usable.

    Picklable: on another node, which must also have the folders, the cache is made there on first use.
    """

    def __init__(self, folders: Sequence[str | os.PathLike[str]], cache_dir: str | os.PathLike[str]) -> None:
        roots = [Path(folder).expanduser().resolve() for folder in folders]
        files = [(group, path) for group, root in enumerate(roots) for path in _pictures(root)]
        # Paths and sizes of all files name the cache, so a changed folder gets a new one.
        identity = "\n".join([str(_CACHE_VERSION), *(f"{path} {path.stat().st_size}" for _, path in files)])
        cache = Path(cache_dir).expanduser() / f"cutouts-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        self._files, self._roots, self._cache = files, roots, cache
        if not cache.with_suffix(".npz").exists():
            with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
                _build(files, roots, cache, pool.map(_load, [path for _, path in files], chunksize=16))
        self._pixels_path = cache.with_suffix(".npy")
        self._pixels: npt.NDArray[np.uint8] | None = None
        with np.load(cache.with_suffix(".npz")) as index:
            self._index = {key: index[key] for key in index.files}
        # Folder -> name -> images of that name, for each kind of image and split.
        self._groups: dict[tuple[bool, str], dict[int, dict[str, list[int]]]] = {
            (is_object, split): {} for is_object in (True, False) for split in ("train", "heldout")
        }
        for item, (group, name, is_object) in enumerate(zip(*(self._index[k] for k in _KEYS), strict=True)):
            # By name, so that all variants of an image are in one split.
            split = "heldout" if _is_heldout(str(name)) else "train"
            names = self._groups[bool(is_object), split].setdefault(int(group), {})
            names.setdefault(str(name), []).append(item)

    def __getstate__(self) -> dict[str, object]:
        # Each process opens the memory map itself: pickling would copy hundreds of megabytes.
        return self.__dict__ | {"_pixels": None}

    def cutout(self, rng: np.random.Generator, split: Split) -> Image.Image | None:
        """A random object of the split as an RGBA image, longest side at most CUTOUT_SIDE."""
        return self._draw(rng, self._groups[True, split])

    def photo(self, rng: np.random.Generator, split: Split) -> Image.Image | None:
        """A random background of the split as an RGB image, longest side at most PHOTO_SIDE."""
        return self._draw(rng, self._groups[False, split])

    def count(self, split: Split) -> tuple[int, int]:
        """Number of objects and of backgrounds in the split."""
        objects, photos = (
            sum(len(items) for names in self._groups[kind, split].values() for items in names.values())
            for kind in (True, False)
        )
        return objects, photos

    def _draw(self, rng: np.random.Generator, groups: dict[int, dict[str, list[int]]]) -> Image.Image | None:
        if not groups:
            return None
        if self._pixels is None:
            if not self._pixels_path.exists():  # in a worker, which must not start processes
                _build(self._files, self._roots, self._cache, (_load(path) for _, path in self._files))
            self._pixels = np.load(self._pixels_path, mmap_mode="r")
        folders = list(groups.values())
        weights = np.sqrt([len(names) for names in folders])
        names = list(folders[int(rng.choice(len(folders), p=weights / weights.sum()))].values())
        items = names[int(rng.integers(len(names)))]
        item = items[int(rng.integers(len(items)))]
        start, h, w, channels = (int(v) for v in self._index["place"][item])
        return Image.fromarray(self._pixels[start : start + h * w * channels].reshape(h, w, channels))


def _pictures(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        raise ConfigError(f"the source of cut-outs {root} is not a folder")
    yield from sorted(
        p for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file() and not p.is_symlink()
    )


def _name(path: Path) -> str:
    """The part of a name shared by variants of one image: the stem up to its first digit, or the first folder if empty.

    path: relative to its source. KDE stores wallpapers as NAME/contents/images/2560x1600.jpg, next to a screenshot.jpg.
    """
    name = re.sub(r"\d.*", "", path.stem).strip("_- ")
    return path.parts[0] if name in ("", "screenshot") else name


def _is_heldout(name: str) -> bool:
    return int(hashlib.sha256(f"scene {name}".encode()).hexdigest(), 16) % 1000 < 1000 * HELDOUT_FRACTION


def _build(
    files: list[tuple[int, Path]], roots: list[Path], cache: Path, loaded: Iterable[npt.NDArray[np.uint8] | None]
) -> None:
    kept = [(g, p, pixels) for (g, p), pixels in zip(files, loaded, strict=True) if pixels is not None]
    if not kept:
        raise ConfigError(f"no usable cut-out or background below {', '.join(map(str, roots))}")
    sizes = [pixels.size for *_, pixels in kept]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    cache.parent.mkdir(parents=True, exist_ok=True)
    # A name per process: several may build the same cache at once, and each replaces it as a whole.
    temporary = cache.with_suffix(f".{os.getpid()}.tmp.npy")
    np.save(temporary, np.concatenate([pixels.ravel() for *_, pixels in kept]))
    os.replace(temporary, cache.with_suffix(".npy"))
    temporary = cache.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez(
        temporary,
        group=np.array([g for g, *_ in kept]),
        name=np.array([_name(p.relative_to(roots[g])) for g, p, _ in kept]),
        is_object=np.array([pixels.shape[2] == 4 for *_, pixels in kept]),
        place=np.array([[start, *pixels.shape] for start, (*_, pixels) in zip(starts, kept, strict=True)]),
    )
    os.replace(temporary, cache.with_suffix(".npz"))  # last: the index marks the cache as complete


def _load(path: Path) -> npt.NDArray[np.uint8] | None:
    """(h, w, 4) for an object, cut to its outline; (h, w, 3) for a background; or None."""
    try:
        with Image.open(path) as image:
            # Before decoding: so far only the header was read.
            if image.width * image.height > 40_000_000 or max(image.size) < MIN_CUTOUT_SIDE:
                return None
            has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            if not has_alpha and max(image.size) < PHOTO_SIDE:
                return None
            if has_alpha and max(image.size) > MAX_CUTOUT_SIDE:  # a wallpaper with transparent corners
                return None
            # JPEGs are decoded at the smallest scale that suffices, which is faster; other formats ignore this.
            image.draft("RGB", (PHOTO_SIDE, PHOTO_SIDE))
            picture = image.convert("RGBA" if has_alpha else "RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ):  # what Pillow raises for bad files
        return None
    if not has_alpha:
        picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
        return np.asarray(picture)
    box = picture.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        return None
    # Premultiplied while scaling, or the colours of transparent pixels would show at the edge.
    picture = picture.crop(box).convert("RGBa")
    picture.thumbnail((CUTOUT_SIDE, CUTOUT_SIDE))
    pixels = np.array(picture.convert("RGBA"))
    solid = pixels[..., 3] > 127
    if max(solid.shape) < MIN_CUTOUT_SIDE or min(solid.shape) < 8 or not 0.1 < solid.mean() < 0.97:
        return None
    # Line drawings and outlined letters are not objects to click on: they are mostly edge, or enclose more than they
    # cover.
    thickness = 2 * ndimage.distance_transform_edt(np.pad(solid, 1)).max() / np.sqrt(solid.sum())
    if thickness < 0.35 or solid.sum() < 0.7 * ndimage.binary_fill_holes(solid).sum():
        return None
    # One dominant piece, not a sheet of several.
    pieces, count = ndimage.label(solid)
    areas = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    return pixels if areas.max() > 0.7 * areas.sum() else None
