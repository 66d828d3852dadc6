"""Automatic mask generation: every object of an image, from a grid of point prompts.

Follows the order of the paper's algorithm (SAM paper, section 5 and appendix B): crop, encode, prompt, keep masks with
a high predicted IoU and stability, drop duplicates within each crop and then across crops. Only a few masks exist at
full resolution at a time: to measure them, and to run-length encode those that are kept. Everything else works on
low-res logits. With the same weights the result equals `segment_anything.SamAutomaticMaskGenerator`, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from samray.config import MaskConfig
from samray.masks.candidates import Candidates
from samray.masks.clicks import decode_clicks
from samray.masks.crops import Crop, make_crops, touches_crop_edge
from samray.masks.executor import InlineExecutor
from samray.masks.images import check_images
from samray.masks.nms import box_nms
from samray.masks.pixels import measure, run_lengths
from samray.masks.points import Float64, point_grids
from samray.masks.records import Mask, apply_limits, to_records, wanted_areas
from samray.masks.regions import remove_small_regions
from samray.masks.stages import StageClock
from samray.rle import encode as rle
from samray.rle.encode import Counts
from samray.rle.records import MaskRecord
from samray.rle.runs import slices_of
from samray.sam.frames import Frame, Resized, frame_of
from samray.sam.sam import Decoded, Sam
from samray.sam.transformer import ImageTokens

Image = npt.NDArray[np.uint8]
T = TypeVar("T")

STAGES = ("preprocess", "encode", "decode", "score", "nms", "rle")

# Float masks held at full resolution. One at a time is as fast on a CPU: larger blocks are newly mapped each time, and
# their page faults cost more than the arithmetic.
_CPU_PIXEL_BYTES = 8 * 2**20
_GPU_PIXEL_BYTES = 512 * 2**20
# Masks of an image whose run lengths are computed together.
_FINISHED_AT_ONCE = 16
# Input pixels encoded together.
_CPU_ENCODE_PIXELS = 1024**2
_GPU_ENCODE_PIXELS = 16 * 1024**2
_MAX_ENCODE_BATCH = 16
# The decoder's peak memory, including upscaling, is about this many copies of a prompt's image tokens.
_DECODER_COPIES = 20


@dataclass(frozen=True, slots=True)
class _View:
    """One crop of one image."""

    image_index: int
    image_hw: tuple[int, int]
    crop_index: int
    crop: Crop
    is_last: bool


class MaskGenerator:
    """Generates all masks of images with a model. Settings: `samray.MaskConfig`, with the reference's names.

    `stage_seconds` sums the time per stage: preprocess, encode, decode, score, nms, rle.
    """

    def __init__(self, model: Sam, config: MaskConfig | None = None, *, frugal: bool = False) -> None:
        """frugal: use as little memory as possible at the given `points_per_batch`: one crop and one mask at a time."""
        self.model = model
        self.frugal = frugal
        self.config = config = (config or MaskConfig()).for_model(model.spec.name)
        if config.point_grids is None:
            self._grids = point_grids(
                config.points_per_side, config.crop_n_layers, config.crop_n_points_downscale_factor
            )
        else:
            self._grids = [np.asarray(grid, dtype=np.float64).reshape(-1, 2) for grid in config.point_grids]
        self._clock = StageClock(STAGES, model.device)
        self.stage_seconds = self._clock.seconds
        self._stage = self._clock.stage
        self.overlaps = model.device.type != "cpu"
        self.keep_embedding: Callable[[int, Tensor], None] | None = None
        """If set, called with the index of each image and the embedding (C, h, w) of the whole image."""

    @property
    def frame(self) -> Frame:
        return frame_of(self.model)

    @torch.inference_mode()
    def generate(self, images: list[Image]) -> list[list[MaskRecord]]:
        """All masks of each image, with keys and meanings as in SA-1B.

        images: RGB uint8 (H, W, 3), of any sizes. Returns one list per image, possibly empty, smallest crops first and
        within a crop highest predicted IoU first, without id. Raises ValueError for invalid images.
        """
        return self.finish_candidates(images, self._process_image)

    @torch.inference_mode()
    def finish_candidates(self, images: list[Image], finish: Callable[[Candidates, tuple[int, int]], T]) -> list[T]:
        """finish(candidates, image_hw) for each image: with the masks of all crops, after the NMS within each crop.

        On a GPU, finish runs in a thread, next to the following image. Raises ValueError for invalid images.
        """
        check_images(images)
        views = [view for i, image in enumerate(images) for view in self._views(i, image)]
        return self._finish_views(lambda host: self._encoded(images, views, host), finish)

    @torch.inference_mode()
    def encode(self, images: list[Image]) -> list[Tensor]:
        """The embedding (C, h, w) of each whole image, on the model's device. Raises ValueError for invalid images."""
        check_images(images)
        views = [self._whole(i, _hw(image)) for i, image in enumerate(images)]
        with self._host_executor() as host:
            encoded = [embedding for _, batch in self._encoded(images, views, host) for embedding in batch]
        self._clock.read_queued()
        return encoded

    @torch.inference_mode()
    def generate_from(self, embeddings: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[list[MaskRecord]]:
        """`generate` without the encoder, for settings without crops.

        embeddings: (C, h, w) each, as `keep_embedding` gets them; sizes: (H, W) of their images. The same embeddings
        give the same masks as `generate`.
        """
        if self.config.crop_n_layers:
            raise ValueError("masks.crop_n_layers needs the encoder, for the embeddings of the crops")
        views = [self._whole(i, hw) for i, hw in enumerate(sizes)]

        def batches(_: Executor) -> Iterator[tuple[list[_View], Tensor]]:
            for batch in self._batches(views):
                stacked = torch.stack([embeddings[view.image_index] for view in batch])
                yield batch, stacked.to(self.model.device, self.model.dtype)

        return self._finish_views(batches, self._process_image)

    def _finish_views(
        self,
        encoded: Callable[[Executor], Iterator[tuple[list[_View], Tensor]]],
        finish: Callable[[Candidates, tuple[int, int]], T],
    ) -> list[T]:
        """encoded(host): batches of views with their embeddings (B, C, h, w), image by image."""
        results: list[Future[T]] = []
        image_candidates: list[Candidates] = []
        with self._host_executor() as host:
            for batch, embeddings in encoded(host):
                for view, candidates in zip(batch, self._process_crops(embeddings, batch), strict=True):
                    image_candidates.append(candidates)
                    if view.is_last:
                        results.append(host.submit(finish, Candidates.cat(image_candidates), view.image_hw))
                        image_candidates = []
            results.reverse()
            finished = []
            while results:  # the traceback of a failed result must not keep the result's memory alive
                finished.append(results.pop().result())
        self._clock.read_queued()
        return finished

    # --- crops and their embeddings -----------------------------------------------------------------------------------

    def _crops(self, image_hw: tuple[int, int]) -> list[Crop]:
        return make_crops(image_hw, self.config.crop_n_layers, self.config.crop_overlap_ratio)

    def _views(self, image_index: int, image: Image) -> list[_View]:
        image_hw = _hw(image)
        crops = self._crops(image_hw)
        return [_View(image_index, image_hw, j, crop, j == len(crops) - 1) for j, crop in enumerate(crops)]

    def _whole(self, image_index: int, image_hw: tuple[int, int]) -> _View:
        """The whole image as its only view."""
        return _View(image_index, image_hw, 0, self._crops(image_hw)[0], is_last=True)

    def _encoded(self, images: list[Image], views: list[_View], host: Executor) -> Iterator[tuple[list[_View], Tensor]]:
        """Yield batches of views with their embeddings."""
        for batch, pixels in self._preprocessed(images, views, host):
            with self._stage("encode", queued=True):
                embeddings = self.model.encode_images(pixels)
            if self.keep_embedding is not None:
                for view, embedding in zip(batch, embeddings, strict=True):
                    if view.crop_index == 0:  # the whole image
                        self.keep_embedding(view.image_index, embedding)
            yield batch, embeddings

    def _batches(self, views: list[_View]) -> list[list[_View]]:
        """Views that are encoded together."""
        pixels = _CPU_ENCODE_PIXELS if self.model.device.type == "cpu" else _GPU_ENCODE_PIXELS
        size = 1 if self.frugal else min(max(pixels // self.frame.size**2, 1), _MAX_ENCODE_BATCH)
        return [views[start : start + size] for start in range(0, len(views), size)]

    def _preprocessed(
        self, images: list[Image], views: list[_View], host: Executor
    ) -> Iterator[tuple[list[_View], Tensor]]:
        """Yield batches of views for the encoder with their pixels; prepares the next batch in the background."""
        batches = self._batches(views)

        def resize(batch: list[_View]) -> list[Resized]:
            with self._stage("preprocess"):
                return [self.model.resize(_cut(images[view.image_index], view.crop)) for view in batch]

        coming = [host.submit(resize, batch) for batch in batches[:1]]  # at most one batch ahead
        for batch, following in zip_longest(batches, batches[1:]):
            resized = coming.pop().result()
            coming += [host.submit(resize, following)] if following else []
            with self._stage("preprocess", queued=True):
                ready = self.model.normalize(resized)
            yield batch, ready

    # --- crops: prompts, filters, no duplicates -----------------------------------------------------------------------

    def _process_crops(self, embeddings: Tensor, views: list[_View]) -> Iterator[Candidates]:
        """Decode each crop's grid of prompts in batches, filter, and apply box NMS that prefers the higher predicted
        IoU.

        Crops with few points, also of different images, are decoded together: 64 prompts do not fill a GPU.
        """
        batch_size = self.config.points_per_batch or self._points_per_batch()
        for rows in self._packs(views, batch_size):
            pack = views[rows]
            points = [self._grids[view.crop.layer] * view.crop.hw[::-1] for view in pack]  # (P, 2) xy, crop frame
            with self._stage("decode", queued=True):
                context = self.model.prepare_decoder(embeddings[rows])
            per_view: list[list[Candidates]] = [[] for _ in pack]
            for start in range(0, max(len(points[0]), 1), batch_size):  # an empty grid: one empty batch
                batch = [of_view[start : start + batch_size] for of_view in points]
                with self._stage("decode", queued=True):
                    decoded = self._decode(embeddings[rows], context, batch, pack)
                with self._stage("score", queued=True):
                    for parts, part in zip(per_view, self._score(decoded, batch, pack), strict=True):
                        parts.append(part)  # copies of what passed: the decoded batch is freed
            for parts in per_view:
                with self._stage("nms"):
                    stable = Candidates.cat(parts)
                    kept = stable[box_nms(stable.boxes_xyxy, stable.predicted_iou, self.config.box_nms_thresh)]
                parts.clear()  # else dropped masks would stay in memory until the image is finished
                del stable
                yield kept

    def _packs(self, views: list[_View], batch_size: int) -> Iterator[slice]:
        """Consecutive views with equal numbers of points, together at most batch_size; or one view with more."""
        first = 0  # crops of one layer share a grid
        for layer, same in groupby(views, key=lambda view: view.crop.layer):
            last = first + len(list(same))
            step = max(batch_size // max(len(self._grids[layer]), 1), 1)  # at least one view
            yield from (slice(start, min(start + step, last)) for start in range(first, last, step))
            first = last

    def _decode(self, embeddings: Tensor, context: ImageTokens, points: list[Float64], views: list[_View]) -> Decoded:
        """Masks of clicks, see `decode_clicks`. points: (N, 2) per view, crop frame."""
        clicks = [self.frame.points_in(xy, view.crop.hw) for xy, view in zip(points, views, strict=True)]
        refine, min_iou = self.config.refine, self.config.pred_iou_thresh
        in_input = torch.from_numpy(np.concatenate(clicks))
        return decode_clicks(self.model, embeddings, context, in_input, refine=refine, pred_iou_thresh=min_iou)

    def _score(self, decoded: Decoded, points: list[Float64], views: list[_View]) -> Iterator[Candidates]:
        """For each view, the masks that are stable, have an allowed size and are not cut off by the crop's edge."""
        # Masks come prompt by prompt, and prompts view by view.
        view_of_prompt = np.repeat(np.arange(len(views)), [len(of_view) for of_view in points])  # (N,)
        # With one view everything comes off the device in one copy, the only wait for a GPU.
        of_views = [slice(0, len(decoded.iou))]
        if len(views) > 1:
            of_views = slices_of(view_of_prompt[decoded.prompt_index.cpu().numpy()], len(views))
        measured = [self._measure(decoded.logits[rows], view.crop) for view, rows in zip(views, of_views, strict=True)]
        # float64 holds each of them exactly.
        beside = [decoded.iou.double(), decoded.prompt_index.double()]
        copied = torch.cat([torch.cat(measured), torch.stack(beside, dim=1)], dim=1).cpu().numpy()  # (K, 8)
        numbers, predicted_iou = copied[:, :6], copied[:, 6].astype(np.float32)
        points_of_masks = np.concatenate(points)[copied[:, 7].astype(np.int64)]  # (K, 2)
        for view, rows in zip(views, of_views, strict=True):
            yield self._filter(decoded.logits[rows], predicted_iou[rows], numbers[rows], points_of_masks[rows], view)

    def _filter(
        self,
        logits: Tensor,
        predicted_iou: npt.NDArray[np.float32],
        numbers: npt.NDArray[np.float64],
        points: Float64,
        view: _View,
    ) -> Candidates:
        """numbers: (M, 6) from `_measure`. points: (M, 2), one per mask, crop frame."""
        config, crop = self.config, view.crop
        stability, area = numbers[:, 0].astype(np.float32), numbers[:, 1]
        boxes = numbers[:, 2:].astype(np.int64) + np.array([crop.x0, crop.y0, crop.x0, crop.y0])
        keep = stability >= np.float32(config.stability_score_thresh)  # in float32, as torch compares
        keep &= wanted_areas(area, view.image_hw, config)
        keep &= ~touches_crop_edge(boxes, crop, view.image_hw)
        stays = np.flatnonzero(keep)
        return Candidates(
            logits=[logits[i].clone() for i in stays.tolist()],  # cloned, to free those of the whole batch
            crop_index=np.full(len(stays), view.crop_index),
            boxes_xyxy=boxes[stays],
            predicted_iou=predicted_iou[stays],
            stability_score=stability[stays],
            points_xy=points[stays] + np.array([crop.x0, crop.y0]),
        )

    def _measure(self, logits: Tensor, crop: Crop) -> Tensor:
        """Low-res logits (M, 4h, 4w) to (M, 6) float64: stability score, area, box xyxy in the crop (inclusive)."""
        offset = self.config.stability_score_offset
        return measure(self.frame, logits, crop.hw, offset, self._masks_at_once(crop))

    # --- one image: no duplicates across crops, then pixels for the kept ----------------------------------------------

    @torch.inference_mode()  # like `generate`; the mode is per thread
    def _process_image(self, candidates: Candidates, image_hw: tuple[int, int]) -> list[MaskRecord]:
        """Records of the masks that remain after removing duplicates across crops."""
        config, crops = self.config, self._crops(image_hw)
        if len(crops) > 1:
            with self._stage("nms"):  # prefer masks of smaller crops: they have a higher resolution
                zoom = 1 / np.array([crop.area for crop in crops], dtype=np.float32)
                keep = box_nms(candidates.boxes_xyxy, zoom[candidates.crop_index], config.crop_nms_thresh)
                candidates = candidates[keep]
        with self._stage("rle"):
            masks = self._finish(candidates, crops, image_hw)
        with self._stage("nms"):
            if config.min_mask_region_area > 0:  # cleaning can create duplicates; keep the unchanged mask
                boxes = rle.boxes_xyxy([mask.counts for mask in masks], image_hw)
                untouched = [not mask.was_cleaned for mask in masks]
                keep = box_nms(boxes, untouched, max(config.box_nms_thresh, config.crop_nms_thresh))
                masks = [masks[i] for i in keep]
            masks = apply_limits(masks, image_hw, config)
        with self._stage("rle"):
            return to_records(masks, image_hw, config)

    def _finish(self, candidates: Candidates, crops: list[Crop], image_hw: tuple[int, int]) -> list[Mask]:
        """The candidates as run lengths in the image frame, in order, with small regions removed if configured."""
        runs: dict[int, Counts] = {}
        for crop_index in np.unique(candidates.crop_index):  # masks of one crop have one size
            crop, rows = crops[crop_index], np.flatnonzero(candidates.crop_index == crop_index)
            # Few, because their logits are copied.
            num = max(self._masks_at_once(crop), 1 if self.frugal else _FINISHED_AT_ONCE)
            for batch in np.split(rows, range(num, len(rows), num)):
                of_batch = self._runs(torch.stack(candidates[batch].logits), crop, image_hw)
                runs.update(zip(batch.tolist(), of_batch, strict=True))
        in_order = [runs[row] for row in range(len(candidates))]  # the NMS's order, not the crops'
        cleaned: list[Counts | None] = [None] * len(in_order)
        if self.config.min_mask_region_area > 0:
            cleaned = remove_small_regions(in_order, image_hw, self.config.min_mask_region_area)
        return [
            Mask(
                counts=old if new is None else new,
                was_cleaned=new is not None,
                predicted_iou=float(candidates.predicted_iou[row]),
                stability_score=float(candidates.stability_score[row]),
                points_xy=candidates.points_xy[row : row + 1],
                crop=crops[candidates.crop_index[row]],
            )
            for row, (old, new) in enumerate(zip(in_order, cleaned, strict=True))
        ]

    def _runs(self, logits: Tensor, crop: Crop, image_hw: tuple[int, int]) -> list[Counts]:
        """Run lengths in the image frame for a few low-res logits (M, 4h, 4w)."""
        origin_xy = crop.x0, crop.y0
        return run_lengths(self.frame, logits, crop.hw, origin_xy, image_hw, self._masks_at_once(crop))

    # --- sizes and times ----------------------------------------------------------------------------------------------

    def _input_hw(self, crop: Crop) -> tuple[int, int]:
        """The crop's (h, w) inside the model's square input."""
        return self.frame.input_hw(crop.hw)

    def _masks_at_once(self, crop: Crop) -> int:
        """Number of masks to hold at the crop's resolution at a time."""
        bytes_each = 4 * max(crop.area, self.frame.size**2)  # float32, at either step
        budget = _CPU_PIXEL_BYTES if self.model.device.type == "cpu" else _GPU_PIXEL_BYTES
        return 1 if self.frugal else max(budget // bytes_each, 1)

    def _points_per_batch(self) -> int:
        """Number of prompts that fit into a fraction of the free memory; on a CPU the decoder splits them for its
        caches."""
        device = self.model.device
        if device.type != "cuda":
            return 64  # the reference's default
        spec = self.model.spec
        bytes_each = _DECODER_COPIES * spec.grid**2 * spec.embed_dim * self.model.dtype.itemsize
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # freed, but cached by torch
        return min(max((free + kept) // 4 // bytes_each, 1), 256)

    def _host_executor(self) -> Executor:
        """Executor for the host's work: inline on a CPU; with a GPU in threads, while the GPU continues."""
        return ThreadPoolExecutor(2) if self.overlaps else InlineExecutor()  # resizing, finishing


def _hw(image: Image) -> tuple[int, int]:
    return image.shape[0], image.shape[1]


def _cut(image: Image, crop: Crop) -> Image:
    return image[crop.y0 : crop.y1, crop.x0 : crop.x1]
