"""A labelled output as a PyTorch map-style dataset, in the layout of torchvision's detection references."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from samray import storage
from samray.config import InputConfig
from samray.errors import ConfigError, FileError, ImageError, StorageError
from samray.inputs.fetch import NO_CREDENTIALS, fetch_images
from samray.inputs.raster_files import decode_image
from samray.inputs.rows import INPUT_SCHEMA
from samray.output.classes import classes_of
from samray.output.lookup import index_containers, index_images, read_row_group, read_shard_footer, read_uris
from samray.output.plan import Plan, load_plan
from samray.output.schema import has_presence, schema_of
from samray.output.seals import seal_of
from samray.output.shards import shard_uri
from samray.output.where import Bools, make_where
from samray.rle.runs import Runs, pixels, runs_of_image

Target = dict[str, Any]

# All but the run-length strings, which are most of a shard's bytes.
_BOXES_ONLY: Final = ["image", "uri"] + [
    f"annotations.list.element.{name}" for name in ("bbox", "area", "predicted_iou", "stability_score")
]
_PRESENCE: Final = [f"presence.list.element.{name}" for name in ("phrase", "score")]
_NAMES: Final = [f"annotations.list.element.{name}" for name in ("label", "label_score")]

BACKGROUND: Final = "__background__"
"""Name of class 0, as in torchvision."""

_MASK_KINDS: Final = ("bool", "rle", "boxes")
_GROUPS_HELD: Final = 4
_FOOTERS_HELD: Final = 32
"""Footers kept in memory. Shuffled access to more large shards than this reads footers again and again."""


class MaskDataset(Dataset[tuple[Tensor | None, Target]]):
    """Images and their masks by index, for training: `dataset[i]` is (image, target).

    image: (3, H, W) uint8, RGB, upright; None with images=False. target:

    - boxes: (N, 4) float32, x0 y0 x1 y1 in pixels, the right and lower side exclusive
    - labels: (N,) int64, the mask's name is classes[label]; ones in an output without names
    - iscrowd: (N,) int64, zeros; area: (N,) int64, pixels
    - masks: (N, H, W) bool with masks="bool"; segmentation: N COCO RLEs with masks="rle"; neither with masks="boxes",
      which does not even read the run-length strings
    - predicted_iou, stability_score: (N,) float32; label_score, too, in an output with names: NaN without a name
    - presence: (len(classes),) float32, only in an output that has such scores (labels.by=sam3): how likely the image
      shows the class at all; NaN if that was not asked
    - image_id: int

    classes: `__background__` (0, of no mask, as in torchvision), the run's names in order, and "object" for masks
    without a name ("unnamed object" if "object" is one of the names).

    Contains the images with status `ok`, in plan order, without failed images and without shards that do not exist yet.
    N may be 0: keep_empty=False leaves out images without any mask, but the filters (min_predicted_iou, min_stability,
    min_area; max_masks keeps those with the highest predicted IoU) only drop masks and never leave out an image.

    where: SQL expression over the columns of images and masks, such as "area > 100 and width >= 640". A term with a
    column of masks drops masks, as the filters do; one with columns of images alone leaves out images.

    transforms: called with (image, target); its result becomes `dataset[i]`. image_root: (old, new), for images that
    were moved after labelling: the old and the new start of their URIs (or of the URIs of their tars and Parquet
    files).

    max_mask_bytes: with masks="bool", the maximum bytes of an image's masks, N * H * W; more raises StorageError.

    Holds eight bytes per image (28 for images in tars or Parquet) and the most recent row groups and footers, but no
    open file; storage reconnects in a forked child. DataLoader workers may therefore be forked or spawned. Open the
    dataset again after the output was changed (`--retry-failed`, `--redo-changed`).

    Raises: ConfigError if OUTPUT has no labelled images or an option is wrong; StorageError. Items raise StorageError,
    also for an image that was deleted or replaced after labelling.
    """

    def __init__(
        self,
        output: str,
        *,
        images: bool = True,
        masks: Literal["bool", "rle", "boxes"] = "bool",
        transforms: Callable[[Any, Target], Any] | None = None,
        min_predicted_iou: float | None = None,
        min_stability: float | None = None,
        min_area: int | None = None,
        max_masks: int | None = None,
        where: str | None = None,
        keep_empty: bool = True,
        image_root: tuple[str, str] | None = None,
        max_mask_bytes: int = 2**30,
    ) -> None:
        if masks not in _MASK_KINDS:
            raise ConfigError(f"masks={masks!r} is not one of {', '.join(map(repr, _MASK_KINDS))}")
        if image_root is not None and (isinstance(image_root, str) or len(image_root) != 2):
            raise ConfigError(f"image_root={image_root!r} must be a pair: the old and the new start of the URIs")
        if max_masks is not None and max_masks < 0:
            raise ConfigError(f"max_masks={max_masks} must be 0 or more; None keeps all")
        plan = load_plan(output)
        self.output = plan.output
        self.images = images
        self.masks = masks
        self.transforms = transforms
        self.min_predicted_iou = min_predicted_iou
        self.min_stability = min_stability
        self.min_area = min_area
        self.max_masks = max_masks
        self.max_mask_bytes = max_mask_bytes
        self.image_root = image_root and (storage.normalize(image_root[0]), storage.normalize(image_root[1]))
        self._classes = classes_of(plan)
        self.classes = [BACKGROUND, *self._classes.all(with_unnamed=True)]
        self._has_presence = has_presence(plan.run["identity"])
        self.where = make_where(where, self.output)
        if self.where is not None:
            self.where.check(schema_of(plan.run))
        self._index = index_images(plan, keep_empty=keep_empty, where=self.where)
        # 20 more bytes per image, needed only to read the images.
        self._containers = index_containers(plan, self._index) if images else None
        self._input = input_config_of(plan)
        # Boxes in the "sam" convention end at their last pixel, all others one pixel after it.
        sam_boxes = plan.run["identity"].get("masks", {}).get("bbox_convention") == "sam"
        self._box_extent = 1.0 if sam_boxes else 0.0
        self._hold_nothing()

    def __len__(self) -> int:
        return len(self._index.rows)

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, slice):
            raise TypeError(
                f"a MaskDataset returns one image per index; for several use"
                f" torch.utils.data.Subset(dataset, range(*{index}.indices(len(dataset))))"
            )
        index = range(len(self))[index]  # negative indices and IndexError, as in a list
        image = self.image(index) if self.images else None
        target = self.target(index)
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def image(self, index: int) -> Tensor:
        """(3, H, W) uint8: the image alone, without transforms; does not read its masks.

        Raises: ConfigError if the dataset was opened with images=False, StorageError.
        """
        if not self.images:
            raise ConfigError("this dataset was opened with images=False; open it with images=True")
        index = range(len(self))[index]
        table, row = self._locate(index)
        return self._image(index, table["uri"][row].as_py(), table["image"][row].as_py())

    def target(self, index: int) -> Target:
        """The image's masks alone, without transforms; does not read the image. Raises: StorageError."""
        table, row = self._locate(range(len(self))[index])
        selected = None if self.where is None else self.where.flags(table.slice(row, 1))[1]
        record = table["image"][row].as_py()
        target = self._target(table["annotations"][row].values, record, selected)
        if self._has_presence:
            target["presence"] = self._presence(table["presence"][row].as_py(), record)
        return target

    def uris(self) -> list[str]:
        """The URI of every image when it was labelled, in the order of the dataset. Raises: StorageError."""
        return read_uris(load_plan(self.output), self._index)

    @staticmethod
    def collate(batch: Iterable[Any]) -> tuple[Any, ...]:
        """Collate a batch as two tuples (images, targets), for `DataLoader(collate_fn=)`: images differ in size."""
        return tuple(zip(*batch, strict=True))

    # --- rows ------------------------------------------------------------------------------------------------------

    def _locate(self, index: int) -> tuple[pa.Table, int]:
        """The row group of an image, and its row in it."""
        shard, row = int(self._index.shards[index]), int(self._index.rows[index])
        _, starts = self._footer(shard)
        group = bisect_right(starts, row) - 1  # the last one that does not begin after the row
        return self._group(shard, group), row - starts[group]

    def _hold_nothing(self) -> None:
        # Caches that threads may share, and that are dropped on pickling and forking.
        self._footer = lru_cache(_FOOTERS_HELD)(self._read_footer)
        self._group = lru_cache(_GROUPS_HELD)(self._read_group)

    def _read_footer(self, shard: int) -> tuple[pq.FileMetaData, list[int]]:
        """A shard's footer, and the first row of each of its row groups."""
        footer = read_shard_footer(self.output, shard, int(self._index.sizes[shard]))
        # Row indices and file sizes were taken from the file as it was.
        if seal_of(footer) != self._index.digests.get(shard):
            raise StorageError(
                f"{storage.redact(shard_uri(self.output, shard))} was replaced since this dataset was opened: open it "
                "again"
            )
        num_rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        return footer, [0, *accumulate(num_rows[:-1])]

    def _read_group(self, shard: int, group: int) -> pa.Table:
        # Read the whole group for masks: the few unneeded bytes cost less than a second request.
        more = _NAMES * bool(self._classes.names) + _PRESENCE * self._has_presence
        columns = _BOXES_ONLY + more if self.masks == "boxes" else None
        if columns is not None and self.where is not None:
            schema = self._footer(shard)[0].schema.to_arrow_schema()
            columns = sorted({*columns, *self.where.columns(schema)})
        size = int(self._index.sizes[shard])
        return read_row_group(shard_uri(self.output, shard), size, self._footer(shard)[0], group, columns)

    def __getstate__(self) -> dict[str, Any]:
        # The caches cannot be pickled; __setstate__ makes empty ones.
        return {name: value for name, value in self.__dict__.items() if name not in ("_footer", "_group")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hold_nothing()

    # --- targets ---------------------------------------------------------------------------------------------------

    def _target(self, annotations: pa.StructArray, record: dict[str, Any], selected: Bools | None = None) -> Target:
        """annotations: those of one image. selected: (N,), which of them `where` selects; None: all."""
        self._check(annotations, record)
        keep = self._kept(annotations, selected)
        # (N, 4) float64 XYWH. Indexing copies, so that Arrow's read-only buffer is not written to.
        boxes = annotations.field("bbox").flatten().to_numpy().reshape(-1, 4)[keep]
        boxes[:, 2:] += boxes[:, :2] + self._box_extent
        target: Target = {
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "labels": self._labels(annotations)[keep],
            "image_id": record["image_id"],
            "area": torch.from_numpy(_numbers(annotations, "area")[keep].astype(np.int64)),
            "iscrowd": torch.zeros(len(keep), dtype=torch.int64),
            "predicted_iou": torch.from_numpy(_numbers(annotations, "predicted_iou")[keep].astype(np.float32)),
            "stability_score": torch.from_numpy(_numbers(annotations, "stability_score")[keep].astype(np.float32)),
        }
        if self._classes.names:
            scores = _numbers(annotations, "label_score")[keep].astype(np.float32)
            target["label_score"] = torch.from_numpy(scores)
        if self.masks != "boxes":
            rles = annotations.field("segmentation").take(pa.array(keep)).to_pylist()
            hw = record["height"], record["width"]
            if any(rle["size"] != list(hw) for rle in rles):
                raise StorageError(_damaged(record, f"a mask of another size than the image, {hw[1]}x{hw[0]}"))
            runs = runs_of_image(record["image_id"], [rle["counts"] for rle in rles], hw)
            if self.masks == "rle":
                target["segmentation"] = rles
            else:
                target["masks"] = self._decode(runs, record)
        return target

    def _labels(self, annotations: pa.StructArray) -> Tensor:
        """(N,) int64 class of each mask. Raises: StorageError for a name that the run did not ask for."""
        names = annotations.field("label").to_pylist() if self._classes.names else []
        return torch.tensor(self._classes.indices(names, len(annotations)), dtype=torch.int64) + 1

    def _presence(self, items: Any, record: dict[str, Any]) -> Tensor:
        """(len(classes),) float32. Raises: StorageError if the row is damaged."""
        scores = torch.full((len(self.classes),), torch.nan)
        try:
            for item in items:
                scores[self.classes.index(item["phrase"], 1)] = item["score"]
        except (TypeError, ValueError) as error:
            raise StorageError(_damaged(record, "a presence that is not a list of its phrases with scores")) from error
        return scores

    def _check(self, annotations: pa.StructArray, record: dict[str, Any]) -> None:
        """Raises: StorageError if a field is empty or a box does not have four numbers: OUTPUT may be damaged."""
        needed = [
            annotations,
            *(annotations.field(name) for name in ("bbox", "area", "segmentation") if name in _names(annotations)),
        ]
        if any(column.null_count for column in needed) or None in record.values():
            raise StorageError(_damaged(record, "an empty field"))
        if self._classes.names and not {"label", "label_score"} <= set(_names(annotations)):
            raise StorageError(_damaged(record, "masks without the field of their names"))
        boxes = annotations.field("bbox")
        if boxes.flatten().null_count or any(length != 4 for length in boxes.value_lengths().to_pylist()):
            raise StorageError(_damaged(record, "a box that is not four numbers"))

    def _decode(self, masks: list[Runs], record: dict[str, Any]) -> Tensor:
        """(N, H, W) bool."""
        height, width = record["height"], record["width"]
        num_bytes = len(masks) * height * width
        if num_bytes > self.max_mask_bytes:
            # Before the allocation: thousands of masks of a large image take tens of gigabytes.
            raise StorageError(
                f"image {record['image_id']} has {len(masks)} masks of {width}x{height} pixels, {num_bytes / 1e9:.1f} "
                f'GB as bool, but max_mask_bytes allows {self.max_mask_bytes / 1e9:.1f} GB: use masks="rle", limit the '
                "masks with max_masks or min_area, or raise max_mask_bytes"
            )
        decoded = torch.empty((len(masks), height, width), dtype=torch.bool)
        for index, runs in enumerate(masks):
            decoded[index] = torch.from_numpy(pixels(runs, (height, width)))
        return decoded

    def _kept(self, annotations: pa.StructArray, selected: Bools | None) -> npt.NDArray[np.int64]:
        """Indices of the annotations that pass the filters, in order."""
        passed = np.ones(len(annotations), bool) if selected is None else selected.copy()
        least = {
            "predicted_iou": self.min_predicted_iou,
            "stability_score": self.min_stability,
            "area": self.min_area,
        }
        for name, bound in least.items():
            if bound is not None:
                passed &= _numbers(annotations, name) >= bound
        keep = np.flatnonzero(passed)
        if self.max_masks is not None and len(keep) > self.max_masks:
            # The best ones, back in the order in which they are stored.
            best = np.argsort(-_numbers(annotations, "predicted_iou")[keep], kind="stable")[: self.max_masks]
            keep = keep[np.sort(best)]
        return keep

    # --- images ----------------------------------------------------------------------------------------------------

    def _image(self, index: int, uri: str, record: dict[str, Any]) -> Tensor:
        settings = self._input
        try:
            pixels = decode_image(self._encoded(index, uri), settings.max_pixels, settings.bands, settings.stretch)
        except (FileError, ImageError) as error:
            raise StorageError(
                f"image {record['image_id']} cannot be read: {error}; "
                "if the images were moved, use image_root=(old, new)"
            ) from error
        height, width = record["height"], record["width"]
        if pixels.shape[:2] != (height, width):
            raise StorageError(
                f"{storage.redact(uri)} is {pixels.shape[1]}x{pixels.shape[0]} now, but was {width}x{height} when it "
                "was labelled; label it again with `samray label ... --redo-changed`"
            )
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def _encoded(self, index: int, uri: str) -> bytes:
        location = None if self._containers is None else self._containers.locate(index)
        if location is None:
            uri = self._moved(uri)
            if storage.is_redacted(uri):
                raise ImageError("missing", NO_CREDENTIALS.format(uri))
            return storage.read_bytes(uri)
        row = {**location, "uri": uri, "container": self._moved(location["container"])}
        (data,) = fetch_images(pa.Table.from_pylist([row], INPUT_SCHEMA), self._input)
        if isinstance(data, ImageError):
            raise data
        return data

    def _moved(self, uri: str) -> str:
        if self.image_root is None:
            return uri
        old, new = self.image_root
        # With the slash: /data must not match /database.
        if not uri.startswith(storage.join(old, "")):
            raise ConfigError(f"{storage.redact(uri)} does not start with {storage.redact(old)} (image_root)")
        return storage.join(new, uri[len(storage.join(old, "")) :])


def input_config_of(plan: Plan) -> InputConfig:
    """The settings with which the images were read: limits, and the column of the images."""
    settings = plan.run.get("config", {}).get("input", {})
    return InputConfig(**{name: value for name, value in settings.items() if name in InputConfig.model_fields})


def _names(annotations: pa.StructArray) -> list[str]:
    return [field.name for field in annotations.type]


def _numbers(annotations: pa.StructArray, name: str) -> npt.NDArray[Any]:
    return np.asarray(annotations.field(name).to_numpy(zero_copy_only=False))


def _damaged(record: dict[str, Any], what: str) -> str:
    return f"image {record['image_id']} has {what}; `samray verify --deep` finds all such problems"
