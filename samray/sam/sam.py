"""Segment Anything: image encoder, prompt encoder and mask decoder behind stateless methods.

Frames: *original* (the image as given, H x W), *input* (scaled so that the longest side is S, (h, w) = `input_hw`, then
padded at the bottom and right to S x S) and *low-res* (the decoder's logits, a quarter of the embedding's stride).
Source: `segment_anything.modeling.sam` and `predictor`, without the predictor's state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from samray.sam.encoder import build_encoder
from samray.sam.frames import FRAMES, Frame, Resized, frame_of, input_size, interpolate
from samray.sam.mask_decoder import DecoderState, MaskDecoder
from samray.sam.precision import exact_convolutions
from samray.sam.prompt_encoder import PromptEncoder
from samray.sam.spec import ModelSpec
from samray.sam.transformer import Guidance, ImageTokens

__all__ = ["Decoded", "Sam", "input_size"]

# Prompts decoded together on a CPU, by the size of their image tokens, (prompts, L, C). Upscaling needs sixteen times
# as much; blocks beyond malloc's limit would be newly mapped from the system each time.
_CPU_CHUNK_BYTES = 8 * 1024 * 1024
_CPU_UPSCALE_BYTES = 4 * 1024 * 1024


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; waits for nothing if that is safe."""
    # On mps the copy may read memory that the host has freed: https://github.com/pytorch/pytorch/issues/189690
    return tensor.to(device, non_blocking=device.type != "mps")


@dataclass(frozen=True, slots=True)
class Decoded:
    """Masks of N prompts.

    logits: (K, 4h, 4w) float32, low-res frame, unthresholded; iou: (K,) float32 predicted; prompt_index and mask_index:
    (K,) int64, which prompt and which of its masks. all_iou: (N, M) float32, of every mask, also of those not kept.
    """

    logits: Tensor
    iou: Tensor
    prompt_index: Tensor
    mask_index: Tensor
    all_iou: Tensor


class Sam(nn.Module):
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.frame: Frame = FRAMES[spec.frame](spec.image_size)
        self.image_encoder = build_encoder(spec)
        self.prompt_encoder = PromptEncoder(
            spec.embed_dim, spec.grid, spec.image_size, spec.mask_in_chans, pad_boxes=spec.decoder.pad_boxes
        )
        self.mask_decoder = MaskDecoder(spec)
        # Not in the state: published checkpoints do not have them.
        self.register_buffer("pixel_mean", torch.tensor(spec.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(spec.pixel_std).view(3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the image side; the prompt side may be float32, see `cast_image_side`."""
        return next(self.image_encoder.parameters()).dtype

    def cast_image_side(self, dtype: torch.dtype) -> Sam:
        """Cast the expensive part to dtype, in place: the image encoder, and the processing of each prompt's image
        tokens. Prompts, their tokens, predicted IoUs and mask weights keep their dtype.

        Those cost little, and rounding them shifts a mask as a whole.
        """
        self.image_encoder.to(dtype)
        self.mask_decoder.output_upscaling.to(dtype)
        if self.spec.decoder.hq_dim:
            for part in ("compress_vit_feat", "embedding_encoder", "embedding_maskfeature"):
                self.mask_decoder.hq.get_submodule(part).to(dtype)
        # norm4 is the only norm of a block that works on image tokens; the others are for the prompt's few tokens.
        for block in self.mask_decoder.transformer.blocks():
            block.norm4.to(dtype)
        return self

    @property
    def image_size(self) -> int:
        return self.spec.image_size

    # --- image side --------------------------------------------------------------------------------------------------

    def resize(self, image: NDArray[np.uint8]) -> Resized:
        """image: (H, W, 3) uint8 RGB. Returns it as large as it is in the model's square, see `Frame.resize`."""
        return self.frame.resize(image, self.device)

    def preprocess(self, images: list[NDArray[np.uint8]]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Images of any sizes to one batch.

        images: (H, W, 3) uint8 RGB each. Returns pixels (B, 3, S, S) on the model's device, normalised and zero padded,
        and every image's (h, w) within the square.
        """
        resized = [self.resize(image) for image in images]
        return self.normalize(resized), [(image.shape[0], image.shape[1]) for image in resized]

    def normalize(self, resized: list[Resized]) -> Tensor:
        """The second half of `preprocess`: from resized images (h, w, 3) to pixels (B, 3, S, S)."""
        size = self.image_size
        # Zeros after the normalisation, as in the reference: the padding has the mean colour.
        pixels = torch.zeros(len(resized), 3, size, size, device=self.device, dtype=self.dtype)
        for i, image in enumerate(resized):
            h, w = image.shape[:2]
            # Bytes go to the device, a quarter of float32's size; normalised in float32, and rounded once.
            there = image if isinstance(image, Tensor) else torch.from_numpy(np.ascontiguousarray(image))
            raw = to_device(there, self.device)
            raw = raw.permute(2, 0, 1).float()
            pixels[i, :, :h, :w] = ((raw - self.pixel_mean.float()) / self.pixel_std.float()).to(self.dtype)
        return pixels

    def encode_images(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, S, S) from `preprocess`. Returns the embeddings (B, C, h, w).

        High-resolution or early features are appended as further channels (`packed`); `prepare_decoder` separates them.
        """
        with exact_convolutions(self.device):
            out: Tensor = self.image_encoder(pixels)
        return out

    def prepare_decoder(
        self, embeddings: Tensor, mask_input: Tensor | None = None, has_mask: Tensor | None = None
    ) -> ImageTokens:
        """Compute once what all prompts of these images share.

        embeddings: (B, C, h, w). mask_input: logits (B, 1, 4h, 4w), or (B * N, 1, 4h, 4w) for N prompts on each image,
        which become N "images" with one prompt each; None for no mask prompt. has_mask: (1,) float, 0 to ignore
        mask_input, for a graph without branches; None is 1.
        """
        encoder, channels = self.prompt_encoder, self.spec.embed_dim
        packed = _tokens(embeddings)
        src = packed[..., :channels]
        with exact_convolutions(self.device):
            fine = self.mask_decoder.image_features(packed)
            # Without a mask prompt one learned vector is added to every cell: (1, C), else (B * N, L, C).
            dense = encoder.no_mask_embed.weight if mask_input is None else _tokens(encoder.encode_masks(mask_input))
        if has_mask is not None:
            dense = has_mask * dense + (1 - has_mask) * encoder.no_mask_embed.weight
        per_image = 1 if mask_input is None else len(mask_input) // max(len(src), 1)
        src = src if per_image == 1 else src.repeat_interleave(per_image, dim=0)
        return self.mask_decoder.transformer.prepare(src + dense, encoder.dense_positions(), fine, self.dtype)

    # --- prompts to masks --------------------------------------------------------------------------------------------

    def decode_points(
        self,
        context: ImageTokens,
        points: Tensor,
        labels: Tensor,
        *,
        multimask: bool = True,
        min_iou: float | None = None,
    ) -> Decoded:
        """Masks for N point prompts on B images; upscales only those with predicted IoU > min_iou.

        context: the images (`prepare_decoder(embeddings)`, or `[i]` of it for one). points: (N, P, 2) float xy, input
        frame, N / B per image, image by image. labels: (N, P). Kept masks are in prompt order. min_iou None keeps
        all N * M of them; M is 3 (with `hq_dim` only the best of them), or 1 without `multimask`: the single mask as
        it is, without `dynamic_multimask`.
        """
        num, chunk = len(points), self._chunk(context, _CPU_CHUNK_BYTES)
        prompts_per_image = num // len(context)
        assert prompts_per_image * len(context) == num, "each image needs the same number of prompts"
        if num == 0:
            return self._nothing_decoded(3 if multimask and not self.spec.decoder.hq_dim else 1)
        # One pass for all images; or chunks that each belong to one image, because `run` needs the same number of
        # prompts for every image of its context.
        work = [(context, 0, num)]
        if num > chunk:
            starts = [
                (i, start)
                for i in range(len(context))
                for start in range(i * prompts_per_image, (i + 1) * prompts_per_image, chunk)
            ]
            work = [(context[i], start, min(start + chunk, (i + 1) * prompts_per_image)) for i, start in starts]
        masks = slice(1, None) if multimask else slice(0, 1)  # 3 of 4, or the single one
        parts = []
        for images, start, stop in work:
            xy, kinds = (x[start:stop].unflatten(0, (len(images), -1)) for x in (points, labels))  # (B, N / B, P, ...)
            state = self.mask_decoder.run(images, self.prompt_encoder.encode_points(xy, kinds))
            parts.append(self._decode_chunk(images, state, masks, min_iou, start))
        if len(parts) == 1:
            return parts[0]
        fields = ("logits", "iou", "prompt_index", "mask_index", "all_iou")
        return Decoded(*(torch.cat([getattr(part, field) for part in parts]) for field in fields))

    def _nothing_decoded(self, masks_per_prompt: int) -> Decoded:
        """The result for no prompts."""
        side, none = 4 * self.spec.grid, torch.zeros(0, device=self.device)
        index = none.long()
        return Decoded(none.new_zeros(0, side, side), none, index, index, none.new_zeros(0, masks_per_prompt))

    def _decode_chunk(
        self, context: ImageTokens, state: DecoderState, masks: slice, min_iou: float | None, first_prompt: int
    ) -> Decoded:
        decoder = self.mask_decoder
        all_iou = state.iou[:, masks].float()
        best = decoder.best(all_iou)
        if best is not None:
            all_iou = all_iou.gather(1, best)
        # Strictly above, as in the reference. The only wait for a GPU here: what is dropped is never upscaled.
        keep = torch.ones(all_iou.shape, dtype=torch.bool) if min_iou is None else (all_iou > min_iou).cpu()
        prompt, mask = keep.nonzero(as_tuple=True)
        # A prompt with a kept mask is upscaled once; only its kept masks are returned.
        alive = keep.any(dim=1).nonzero()[:, 0]
        if len(alive) == 0:  # without prompts and images SAM-HQ's shapes are not determined
            none = self._nothing_decoded(all_iou.shape[1])
            return replace(none, all_iou=all_iou)
        prompt, mask, chosen = (to_device(each, self.device) for each in (prompt, mask, alive))
        hyper = decoder.hyper(state.mask_tokens[chosen], masks, None if best is None else best[chosen])
        size, prompts_per_image, fine = (
            self._chunk(context, _CPU_UPSCALE_BYTES),
            len(all_iou) // len(context),
            context.fine,
        )
        logits = []
        for batch, weights in zip(alive.split(size), hyper.split(size), strict=True):
            kept = tuple(to_device(each, self.device) for each in keep[batch].nonzero(as_tuple=True))
            batch = to_device(batch, self.device)
            # Features of the image that each prompt belongs to; those of a single image are broadcast.
            batch_fine = fine if fine is None or len(fine) == 1 else fine[batch // prompts_per_image]
            logits.append(decoder.upscale(state.keys[batch], weights, batch_fine)[kept].float())
        return Decoded(torch.cat(logits), all_iou[prompt, mask], prompt + first_prompt, mask, all_iou)

    def _chunk(self, context: ImageTokens, cpu_bytes: int) -> int:
        """Number of prompts to decode together, by the size of their image tokens; on a GPU the caller decides."""
        if self.device.type != "cpu":
            return 1 << 30
        return max(1, cpu_bytes // (context.src[0].numel() * context.src.element_size()))

    def predict(
        self,
        embedding: Tensor,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        boxes_xyxy: Tensor | None = None,
        mask_input: Tensor | None = None,
        *,
        text_embeddings: Tensor | None = None,
        multimask: bool = True,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Masks for any prompts on one image; guidance steers all of them towards one target.

        embedding: (1, C, h, w). points: (N, P, 2) and labels: (N, P); boxes_xyxy: (N, 4); all in the input frame.
        mask_input: (N, 1, 4h, 4w) low-res logits. text_embeddings: (N, D), see `PromptEncoder.encode_texts`. Returns
        logits (N, M, 4h, 4w) and predicted IoU (N, M); M is 3 or 1, with `hq_dim` 1.
        """
        prompts = [p for p in (points, boxes_xyxy, mask_input, text_embeddings) if p is not None]
        if not prompts:
            raise ValueError("predict needs points, boxes, a mask_input or text_embeddings")
        n, encoder = len(prompts[0]), self.prompt_encoder
        # Tokens in the reference's order: points, then a box's corners; then text. A mask goes into the image tokens.
        sparse = []
        if points is not None:
            if labels is None:
                raise ValueError("points need labels: 1 foreground, 0 background")
            sparse.append(encoder.encode_points(points, labels, pad=boxes_xyxy is None and text_embeddings is None))
        if boxes_xyxy is not None:
            sparse.append(encoder.encode_boxes(boxes_xyxy))
        if text_embeddings is not None:
            sparse.append(encoder.encode_texts(text_embeddings))
        tokens = (
            torch.cat(sparse, dim=1) if sparse else encoder.no_mask_embed.weight.new_zeros(n, 0, self.spec.embed_dim)
        )
        if mask_input is None:
            context, tokens = self.prepare_decoder(embedding), tokens[None]
        else:  # every prompt has its own image tokens
            context, tokens = self.prepare_decoder(embedding, mask_input), tokens[:, None]
        masks = self._masks_needed(multimask)
        logits, iou = self.decode_tokens(context, tokens, masks, guidance, best_only=multimask)
        return (logits, iou) if multimask else self.mask_decoder.single(logits, iou)

    def decode_tokens(
        self,
        context: ImageTokens,
        tokens: Tensor,
        masks: slice,
        guidance: Guidance | None = None,
        *,
        best_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The requested ones of the four masks for N prompts on each of B images.

        tokens: (B, N, P, C) of the prompts. best_only: with `hq_dim` only the best of them.

        Returns logits (B * N, M, 4h, 4w) and predicted IoU (B * N, M), float32.
        """
        state = self.mask_decoder.run(context, tokens, guidance)
        iou = state.iou[:, masks].float()
        best = self.mask_decoder.best(iou) if best_only else None
        hyper = self.mask_decoder.hyper(state.mask_tokens, masks, best)
        logits = self.mask_decoder.upscale(state.keys, hyper, context.fine).float()
        return logits, iou if best is None else iou.gather(1, best)

    def _masks_needed(self, multimask: bool) -> slice:
        """The mask tokens to decode: three, or the single one, or all to choose the single one from."""
        if multimask:
            return slice(1, None)
        return slice(None) if self.spec.decoder.dynamic_multimask else slice(0, 1)

    def decode_batch(
        self, embeddings: Tensor, sparse: Tensor, mask_input: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """All four masks of N prompts on each of B images, with gradients: for training.

        embeddings: (B, C, h, w). sparse: (B, N, P, C) prompt tokens (`prompt_encoder.encode_points`, `encode_boxes`).
        mask_input: (B * N, 1, 4h, 4w) or None. Returns logits (B, N, 4, 4h, 4w) and IoU (B, N, 4).
        """
        b, n = sparse.shape[:2]
        if mask_input is not None:
            # As in `predict`: a mask prompt changes the image tokens, so every prompt has its own.
            sparse = sparse.flatten(0, 1)[:, None]
        context = self.prepare_decoder(embeddings, mask_input)
        state = self.mask_decoder.run(context, sparse)
        hyper = self.mask_decoder.hyper(state.mask_tokens, slice(None))
        logits = self.mask_decoder.upscale(state.keys, hyper, context.fine)
        return logits.unflatten(0, (b, n)), state.iou.unflatten(0, (b, n))

    def postprocess(self, logits: Tensor, input_hw: tuple[int, int], original_hw: tuple[int, int]) -> Tensor:
        """Low-res logits to the original frame, by the reference's two bilinear steps.

        logits: (K, 4h, 4w). input_hw: as `preprocess` gives it. Returns (K, H, W) of the same dtype, unthresholded.
        """
        frame = frame_of(self)
        # The caller's input_hw, as in the reference's method; without padding it can only be the whole square.
        if frame.is_padded:
            return interpolate(logits, frame.size, input_hw, original_hw)
        return frame.masks_out(logits, original_hw)


def _tokens(maps: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, L, C)."""
    return maps.flatten(2).transpose(1, 2)
