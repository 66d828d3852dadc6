"""Random weights under which a Sam makes masks.

Freshly initialised weights give logits near zero, masks of scattered pixels all over the image, predicted IoUs near
zero, and so not one mask. Four changes, all seeded, make tens to hundreds of local and stable ones:

- image tokens attend to a click by the similarity of their positions, so a click changes the tokens around it;
- the upscaling's 2x2 kernels are nearly flat, so that a token's pixels mostly share a sign;
- the mask heads lose the component along the mean feature, and get an offset below zero and logits of hundreds: masks
  are islands with steep edges; what SAM-HQ adds to them is a fifth as large;
- the predicted IoUs are spread, and moved so that their threshold cuts through the middle of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from samray.sam.rope_vit import Level
from samray.sam.sam import Sam
from samray.sam.spec import DecoderVariant, ModelSpec, VitSpec

SAM = DecoderVariant()
SMALL = ModelSpec(
    name="small",
    image_size=256,
    encoder=VitSpec(dim=64, depth=3, num_heads=4, global_blocks=(2,), window=5),
    embed_dim=64,
    decoder_heads=4,
    decoder_mlp_dim=128,
    iou_hidden_dim=64,
)
"""Small enough for hundreds of prompts per second; the window does not divide the grid, so padding is in play."""


@torch.no_grad()
def random_sam(
    spec: ModelSpec = SMALL, seed: int = 5, iou_centre: float = 0.88, image: NDArray[np.uint8] | None = None
) -> Sam:
    """A Sam with seeded weights whose masks are many and distinct and whose predicted IoUs are around iou_centre.

    image: (H, W, 3) of the kind that it is to make masks of; by default seeded patches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Sam(spec).eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            if "rel_pos" in name or "pos_embed" in name or "no_mem" in name or ("fine" in name and spec.decoder != SAM):
                weight.normal_(std=0.3)
    decoder: Any = model.mask_decoder
    for block in decoder.transformer.blocks():
        write = block.cross_attn_image_to_token
        write.q_proj.weight.mul_(6)
        write.q_proj.bias.zero_()
        write.k_proj.weight.copy_(write.q_proj.weight)
        write.v_proj.weight.mul_(2)
        write.out_proj.weight.mul_(2)
    image = blobs(seed, (spec.image_size, spec.image_size)) if image is None else image
    _scale_embedding(model, image)
    click: Any = model.prompt_encoder.point_embeddings[1]
    click.weight.mul_(0.3)
    for kernel in (decoder.output_upscaling[0].weight, decoder.output_upscaling[3].weight):
        kernel.copy_(kernel.mean(dim=(2, 3), keepdim=True) + kernel / 40)
    decoder.iou_prediction_head.layers[-1].weight.mul_(8)
    _calibrate(model, image, iou_centre)
    return model


def _scale_embedding(model: Sam, image: NDArray[np.uint8]) -> None:
    """The size of the embedding, against that of the learned tokens; of high-resolution features a twentieth of it."""
    encoder: Any = model.image_encoder
    if model.spec.frame == "square":  # these necks have no norm
        features = encoder.features(model.preprocess([image])[0])
        for level in encoder.neck:
            last = level.proj2 if isinstance(level, Level) else level
            last.weight.mul_(0.6 / features.embedding.std())
        features = encoder.features(model.preprocess([image])[0])
        for conv, maps in zip((encoder.fine.conv_s0, encoder.fine.conv_s1), features.high_res, strict=True):
            conv.weight.mul_(0.03 / maps.std())
            conv.bias.mul_(0.03 / maps.std())
    else:
        encoder.neck[-1].weight.mul_(0.6)


def _calibrate(model: Sam, image: NDArray[np.uint8], iou_centre: float) -> None:
    """Offsets and scale of the heads, from what 6 x 6 clicks on one image give."""
    decoder: Any = model.mask_decoder
    num_features = model.spec.embed_dim // 8
    centres = (torch.arange(6) + 0.5) * model.image_size / 6
    clicks = torch.cartesian_prod(centres, centres)[:, None]
    context = model.prepare_decoder(model.encode_images(model.preprocess([image])[0]))
    tokens = model.prompt_encoder.encode_points(clicks[None], torch.ones(1, len(clicks), 1, dtype=torch.int64))
    state = decoder.run(context, tokens)
    score = torch.logit if model.spec.decoder.sigmoid_iou else torch.nn.Identity()
    centre = score(torch.tensor(iou_centre)) - score(state.iou).median(dim=0).values
    decoder.iou_prediction_head.layers[-1].bias.add_(centre)

    def upscale(hyper: torch.Tensor) -> torch.Tensor:
        """Without what SAM-HQ adds, whose weights are the last."""
        hyper = F.pad(hyper, (0, 0, 0, 1)) if model.spec.decoder.hq_dim else hyper
        logits: torch.Tensor = decoder.upscale(state.keys, hyper, context.fine)
        return logits

    identity = torch.eye(num_features).expand(len(clicks), -1, -1)
    mean = upscale(identity).mean(dim=(0, 2, 3))
    along_mean = torch.outer(mean, mean) / mean.dot(mean)
    for number, offset in enumerate((0.5, 0.5, 1, 2)):
        head = decoder.output_hypernetworks_mlps[number]
        last = head.layers[-1]
        last.weight.sub_(along_mean @ last.weight)
        last.bias.sub_(along_mean @ last.bias)
        hyper = head(state.mask_tokens[:, number])[:, None]
        scale = 500 / upscale(hyper).std()
        last.weight.mul_(scale)
        last.bias.mul_(scale).sub_(500 * offset * mean / mean.dot(mean))
    if model.spec.decoder.hq_dim:
        last = decoder.hq.hf_mlp.layers[-1]
        hyper = decoder.hq.hf_mlp(state.mask_tokens[:, -1:])
        scale = 100 / decoder.upscale(state.keys, F.pad(hyper, (0, 0, 1, 0)), context.fine).std()
        last.weight.mul_(scale)
        last.bias.mul_(scale)


def blobs(seed: int, image_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) an image of soft coloured patches with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    height, width = image_hw
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
