"""One mask per user prompt: the first phase of the SAM paper's data engine (section 4, "assisted-manual").

Agrees with `segment_anything.SamPredictor.predict`, used as its documentation recommends. A single click is ambiguous:
the best-scored of three masks. Several clicks or a box: the single mask. Nothing is filtered, and duplicates are kept,
because the user asked for each mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from samray.config import MaskConfig
from samray.errors import ImageError
from samray.masks.crops import Crop
from samray.masks.images import check_images
from samray.masks.records import Mask, to_records
from samray.masks.scores import MASK_THRESHOLD, above, stability_scores
from samray.masks.stages import timed
from samray.prompts import Prompt
from samray.rle import encode as rle
from samray.rle.records import MaskRecord
from samray.sam.frames import frame_of
from samray.sam.sam import Sam

Image = npt.NDArray[np.uint8]

STAGES: Final = ("preprocess", "encode", "decode", "score")

# Images encoded and prompts decoded together. Prompts are few, so GPU memory is not a limit, and on a CPU the decoder
# is fastest on batches that fit its caches.
_GPU_IMAGES, _GPU_PROMPTS = 16, 32
_CPU_IMAGES, _CPU_PROMPTS = 1, 2


class PromptedGenerator:
    """Generates the masks that a user asks for. Uses only the settings of `samray.MaskConfig` that apply without a
    grid: `points_per_batch` (here prompts), `stability_score_offset` and `bbox_convention`.

    `stage_seconds` sums the time per stage: preprocess, encode, decode, score.
    """

    def __init__(self, model: Sam, config: MaskConfig | None = None) -> None:
        self.model = model
        self.frame = frame_of(model)
        self.config = (config or MaskConfig()).for_model(model.spec.name)
        self.stage_seconds = dict.fromkeys(STAGES, 0.0)
        self.keep_embedding: Callable[[int, Tensor], None] | None = None
        """If set, called with the index and the embedding (C, h, w) of each image, also of those without prompts."""

    @torch.inference_mode()
    def generate(self, images: Sequence[Image], prompts: Sequence[Sequence[Prompt]]) -> list[list[MaskRecord]]:
        """One mask for each prompt of each image, in the order of the prompts.

        images: RGB uint8 (H, W, 3), upright, of any sizes. prompts: one list per image, in its pixels. Returns one list
        per image of dicts with the keys of `MaskGenerator.generate`. point_coords has the foreground clicks only,
        because the layout does not store labels; a box alone leaves it empty.
        Raises: ImageError (`bad_prompt`) that names the first prompt outside its image, or whose mask has no pixel;
        ValueError for invalid images.
        """
        check_images(images)
        if isinstance(prompts, Prompt) or any(isinstance(entry, Prompt) for entry in prompts):
            raise ValueError(
                "prompts takes a list per image, as in generate([image], [[prompt]]); got prompts themselves"
            )
        sizes = [image.shape[:2] for image in images]
        _check_all(sizes, prompts)
        masks: list[list[MaskRecord]] = [[] for _ in images]
        # Images without prompts are not encoded.
        to_encode = [i for i, user_prompts in enumerate(prompts) if user_prompts or self.keep_embedding is not None]
        size = _CPU_IMAGES if self.model.device.type == "cpu" else _GPU_IMAGES
        for start in range(0, len(to_encode), size):
            batch = to_encode[start : start + size]
            with self._stage("preprocess"):
                pixels, _ = self.model.preprocess([images[i] for i in batch])
            with self._stage("encode"):
                embeddings = self.model.encode_images(pixels)
            for i, embedding in zip(batch, embeddings, strict=True):
                if self.keep_embedding is not None:
                    self.keep_embedding(i, embedding)
                masks[i] = self.masks_of(embedding[None], sizes[i], prompts[i])
        return masks

    @torch.inference_mode()
    def generate_from(
        self, embeddings: Sequence[Tensor], sizes: Sequence[tuple[int, ...]], prompts: Sequence[Sequence[Prompt]]
    ) -> list[list[MaskRecord]]:
        """`generate` without the encoder. embeddings: (C, h, w) each, as `keep_embedding` gets them; sizes: (H, W) of
        their images. Raises: as `generate`."""
        _check_all(sizes, prompts)
        model = self.model
        inputs = zip(embeddings, sizes, prompts, strict=True)
        return [
            self.masks_of(embedding[None].to(model.device, model.dtype), hw, user_prompts)
            for embedding, hw, user_prompts in inputs
        ]

    def masks_of(self, embedding: Tensor, image_hw: tuple[int, ...], prompts: Sequence[Prompt]) -> list[MaskRecord]:
        """The masks of one image, after `check_prompts`; texts are left to the caller. embedding: (1, C, h, w)."""
        height, width = image_hw
        records: dict[int, MaskRecord] = {}
        for indices in self._batches(prompts):
            with self._stage("decode"):
                logits, iou = self._decode(embedding, [prompts[i] for i in indices], (height, width))
            with self._stage("score"):
                for i, mask, predicted_iou in zip(indices, logits, iou.tolist(), strict=True):
                    records[i] = self._record(i, prompts[i], mask[None], predicted_iou, (height, width))
        return [records[i] for i in sorted(records)]

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Indices of prompts to decode together: the same number of clicks each, and all or none with a box."""
        # Only prompts with equally many tokens form a batch: padding tokens would change the masks.
        alike: dict[tuple[int, bool], list[int]] = {}
        for i, prompt in enumerate(prompts):
            if prompt.text is None:
                alike.setdefault((len(prompt.points), prompt.box is not None), []).append(i)
        default = _CPU_PROMPTS if self.model.device.type == "cpu" else _GPU_PROMPTS
        size = self.config.points_per_batch or default
        for indices in alike.values():
            yield from (indices[start : start + size] for start in range(0, len(indices), size))

    def _decode(self, embedding: Tensor, prompts: list[Prompt], image_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """One mask for each of N prompts of the same form: low-res logits (N, 4h, 4w) and predicted IoUs (N,)."""

        def in_input_frame(xy: Any) -> Tensor:
            # float64 until the model's frame, as in the predictor: (N, P, 2), with P = 2 corners for a box.
            scaled = self.frame.points_in(np.asarray(xy, dtype=np.float64).reshape(len(prompts), -1, 2), image_hw)
            return torch.from_numpy(scaled).float().to(self.model.device)

        points = labels = boxes = None
        if prompts[0].points:
            points = in_input_frame([prompt.points for prompt in prompts])
            labels = torch.tensor([prompt.labels for prompt in prompts], device=points.device).long()
        if prompts[0].box is not None:
            boxes = in_input_frame([_corners(prompt.box) for prompt in prompts if prompt.box]).flatten(1)
        multimask = prompts[0].is_ambiguous
        logits, iou = self.model.predict(embedding, points, labels, boxes, multimask=multimask)
        # An ambiguous prompt gives three masks; the others give one, which is then the best.
        best = iou.argmax(dim=1)
        every = torch.arange(len(prompts), device=best.device)
        return logits[every, best], iou[every, best]

    def _record(
        self, index: int, prompt: Prompt, logits: Tensor, predicted_iou: float, image_hw: tuple[int, int]
    ) -> MaskRecord:
        """logits: (1, 4h, 4w). Raises: ImageError if the mask has no pixel."""
        upscaled = self.frame.masks_out(logits, image_hw)
        pixels = above(upscaled, MASK_THRESHOLD)
        (counts,) = rle.encode_masks(pixels, (0, 0), image_hw)
        if rle.area(counts) == 0:
            raise ImageError("bad_prompt", f"prompts[{index}]: the model finds no mask there")
        # The layout has no labels: a background click would look like one on the object.
        on_object = [xy for xy, label in zip(prompt.points, prompt.labels, strict=True) if label == 1]
        mask = Mask(
            counts=counts,
            predicted_iou=predicted_iou,
            stability_score=stability_scores(upscaled, MASK_THRESHOLD, self.config.stability_score_offset).item(),
            points_xy=np.asarray(on_object, dtype=np.float64).reshape(-1, 2),
            crop=Crop(0, 0, image_hw[1], image_hw[0], layer=0),
        )
        return to_records([mask], image_hw, self.config)[0]

    def _stage(self, name: str) -> AbstractContextManager[None]:
        return timed(self.stage_seconds, name, self.model.device)


def _check_all(sizes: Sequence[tuple[int, ...]], prompts: Sequence[Sequence[Prompt]]) -> None:
    """Check all prompts before any work. Raises: ImageError (`bad_prompt`), ValueError."""
    if len(sizes) != len(prompts):
        raise ValueError(f"{len(sizes)} images, but prompts for {len(prompts)}")
    for image_hw, user_prompts in zip(sizes, prompts, strict=True):
        check_prompts(image_hw, user_prompts)
        if texts := [prompt.text for prompt in user_prompts if prompt.text is not None]:
            raise ValueError(f"the prompt {texts[0]!r} is a text, which needs samray.label with labels.by")


def check_prompts(image_hw: tuple[int, ...], prompts: Sequence[Prompt]) -> None:
    """Raises: ImageError (`bad_prompt`) that names the first prompt outside the image."""
    for index, prompt in enumerate(prompts):
        problem = prompt.problem_in(width=image_hw[1], height=image_hw[0])
        if problem is not None:
            raise ImageError("bad_prompt", f"prompts[{index}]: {problem}")


def _corners(box_xywh: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    x, y, w, h = box_xywh
    return x, y, x + w, y + h
