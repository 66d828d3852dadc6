"""The decoder's algebra (see `samray.sam.transformer`) against the published arithmetic written out plainly.

What is shared, absorbed and left out changes the order of sums, nothing else: the same bound as for the networks, 1e-4
relative to logit scale; about 2e-6 is what comes out. The early filter keeps exactly the masks that a late one keeps.
"""

from __future__ import annotations

import pytest
import torch

from samray.sam.sam import _CPU_CHUNK_BYTES, Sam
from samray.sam.spec import MODELS
from tests.parity import plain_decoder
from tests.parity.common import assert_close, prompts_of, randomize, smaller


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_b", "tiny"])
def test_algebra_against_the_plain_decoder(name: str) -> None:
    spec = smaller("vit_b", image_size=256) if name == "vit_b" else MODELS[name]
    model = Sam(spec).eval()
    randomize(model, seed=10)
    encoder, grid = model.prompt_encoder, spec.grid
    embedding = torch.randn(1, spec.embed_dim, grid, grid, generator=torch.Generator().manual_seed(11))
    positions = encoder.dense_positions().T.unflatten(1, (grid, grid))
    for kinds in ("points", "boxes", "points+masks"):
        prompts = prompts_of(kinds, 5, spec.image_size, grid)
        if "points" in prompts:
            sparse = encoder.encode_points(prompts["points"], prompts["labels"])
        else:
            sparse = encoder.encode_boxes(prompts["boxes_xyxy"])
        dense = encoder.no_mask_embed.weight[0, :, None, None].expand(5, -1, grid, grid)
        if "mask_input" in prompts:
            dense = encoder.encode_masks(prompts["mask_input"])
        state = dict(model.state_dict())
        masks, iou = plain_decoder.decode(state, spec.decoder_heads, embedding[0], positions, sparse, dense)
        for multimask, wanted in ((True, slice(1, 4)), (False, slice(0, 1))):
            logits, predicted = model.predict(embedding, **prompts, multimask=multimask)
            assert_close(logits, masks[:, wanted])
            assert_close(predicted, iou[:, wanted])


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
def test_filtering_early_is_filtering_late(multimask: bool) -> None:
    """Over several chunks of prompts, one of them without any survivor."""
    model = Sam(MODELS["tiny"]).eval()
    randomize(model, seed=12)
    spec = model.spec
    context = model.prepare_decoder(torch.randn(1, spec.embed_dim, spec.grid, spec.grid))
    num = 3 * model._chunk(context, _CPU_CHUNK_BYTES) - 5
    prompts = prompts_of("points", num, spec.image_size, spec.grid)
    points, labels = prompts["points"], prompts["labels"]
    late = model.decode_points(context, points, labels, multimask=multimask)
    threshold = late.iou.sort().values[len(late.iou) * 9 // 10].item()
    early = model.decode_points(context, points, labels, multimask=multimask, min_iou=threshold)

    survivors = late.iou > threshold  # strictly, as published: the mask that sits on the threshold goes
    assert 0 < survivors.sum() < len(survivors) // 9
    assert torch.equal(early.all_iou, late.all_iou)
    assert torch.equal(early.iou, late.iou[survivors])
    assert torch.equal(early.prompt_index, late.prompt_index[survivors])
    assert torch.equal(early.mask_index, late.mask_index[survivors])
    assert_close(early.logits, late.logits[survivors])
