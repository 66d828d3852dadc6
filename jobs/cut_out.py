"""Cut objects out of labelled photographs, for the scenes that `samray train` paints (`data.sources`).

    python jobs/cut_out.py cutouts/ LABELS [LABELS ...]

LABELS are outputs of `samray label` or `samray import`. Each mask of at least --min-side pixels on its longer side that
does not touch the image's border becomes a PNG with the mask as its transparency. Its name has letters alone and comes
from the image and the mask, so that scenes hold out a tenth of the objects, not of their sets
(`samray.train.cutouts`). Existing files are not written again.

With --backgrounds FOLDER, each photograph is also written there as a background of scenes, enlarged to the size from
which `samray.train.cutouts` accepts photographs.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image

# A script's own folder is on sys.path, but not the folder above it, where a checkout has samray.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from samray.output.mask_dataset import MaskDataset
from samray.train.cutouts import PHOTO_SIDE

LETTERS = str.maketrans("0123456789abcdef", "abcdefghijklmnop")
"""A name is read up to its first digit, so a hash is written in letters."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("labels", nargs="+")
    parser.add_argument("--min-side", type=int, default=96, help="longer side of a mask's box, pixels (default: 96)")
    parser.add_argument("--backgrounds", type=Path, help="folder for the photographs as backgrounds (default: none)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    datasets = [MaskDataset(uri) for uri in args.labels]
    count = sum(cut_out(dataset, args.output, args.min_side) for dataset in datasets)
    print(f"{count} cut-outs in {args.output}", file=sys.stderr)
    if args.backgrounds is not None:
        args.backgrounds.mkdir(parents=True, exist_ok=True)
        count = sum(write_backgrounds(dataset, args.backgrounds) for dataset in datasets)
        print(f"{count} backgrounds in {args.backgrounds}", file=sys.stderr)
    return 0


def write_backgrounds(labels: MaskDataset, output: Path) -> int:
    """Write all images, their longest side enlarged to PHOTO_SIDE. Returns their number."""
    for index, uri in enumerate(labels.uris()):
        path = output / f"{name_of(Path(uri).name)}.jpg"
        if not path.exists():
            photo = Image.fromarray(labels.image(index).permute(1, 2, 0).numpy())
            scale = max(1.0, PHOTO_SIDE / max(photo.size))
            photo.resize((round(photo.width * scale), round(photo.height * scale))).save(path, quality=92)
    return len(labels)


def name_of(text: str) -> str:
    """A name in letters."""
    return hashlib.sha256(text.encode()).hexdigest()[:16].translate(LETTERS)


def cut_out(labels: MaskDataset, output: Path, min_side: int) -> int:
    """Write the objects of all images. Returns their number."""
    count = 0
    for index, uri in enumerate(labels.uris()):
        image, target = labels[index]
        pixels = image.permute(1, 2, 0).numpy()  # (H, W, 3) uint8
        height, width = pixels.shape[:2]
        for number, mask in enumerate(target["masks"].numpy()):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if len(rows) == 0:
                continue
            top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
            is_cut = top == 0 or left == 0 or bottom == height or right == width
            if is_cut or max(bottom - top, right - left) < min_side:
                continue
            count += 1
            path = output / f"{name_of(f'{Path(uri).name} {number}')}.png"
            if not path.exists():
                alpha = mask.astype(np.uint8)[..., None] * 255
                cut = np.concatenate([pixels, alpha], axis=2)[top:bottom, left:right]
                Image.fromarray(cut).save(path)
    return count


if __name__ == "__main__":
    sys.exit(main())
