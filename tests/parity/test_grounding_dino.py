"""Grounding DINO and SAM against a plain script on transformers' own pipeline, with the same random networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from samray.config import Config
from samray.labels.grounding_dino import build_generator, read_inputs
from samray.prompts import Prompt
from samray.sam.sam import Sam
from samray.scenes.scene import make_scene
from tests.support.networks import write_grounding_dino
from tests.unit.test_labels_example import micro

PHRASES = ["Cat", "fire hydrant", "dog", "Red cars"]
SCORE, TEXT = 0.4, 0.3


@pytest.fixture(scope="module", params=[0, 1])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grounding_dino(tmp_path_factory.mktemp("dino"), request.param)


def plain_script(folder: Path, image: Image.Image) -> tuple[dict[str, Any], list[str]]:
    """transformers' processor, network and post-processing; and the phrase of each box, from its logits."""
    from transformers import AutoProcessor, GroundingDinoForObjectDetection

    processor = AutoProcessor.from_pretrained(folder)
    network = GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    inputs = processor(images=image, text=[PHRASES], return_tensors="pt")
    with torch.no_grad():
        outputs = network(**inputs)
    size = [(image.height, image.width)]
    (boxes,) = processor.post_process_grounded_object_detection(
        outputs, threshold=SCORE, text_threshold=TEXT, target_sizes=size
    )
    scores = outputs.logits[0].sigmoid()
    scores = scores[scores.max(dim=1).values > SCORE]
    # The tokens between the full stops, phrase after phrase.
    ids, best = inputs["input_ids"][0].tolist(), []
    columns = np.cumsum([token == 1012 for token in ids])
    for row in scores:
        by_phrase = [max(row[i] for i in range(1, len(ids) - 1) if columns[i] == k and ids[i] != 1012)
                     for k in range(len(PHRASES))]  # fmt: skip
        best.append((float(max(by_phrase)), PHRASES[int(np.argmax(by_phrase))]))
    keep = [i for i, (score, _) in enumerate(best) if score > TEXT]
    return {"boxes": boxes["boxes"][keep], "scores": boxes["scores"][keep]}, [best[i][1] for i in keep]


def sam_masks(model: Sam, image: np.ndarray, boxes: torch.Tensor) -> list[np.ndarray]:
    """SAM's predictor, box by box."""
    pixels, _ = model.preprocess([image])
    hw = (image.shape[0], image.shape[1])
    corners = model.frame.points_in(boxes.double().numpy().reshape(-1, 2, 2), hw)
    with torch.no_grad():
        embedding = model.encode_images(pixels)
        return [
            (model.frame.masks_out(model.predict(embedding, boxes_xyxy=box[None], multimask=False)[0][0], hw) > 0)
            .numpy()[0]
            for box in torch.from_numpy(corners).float().flatten(1)
        ]  # fmt: skip


@pytest.mark.parametrize("num_common", [4, 2, 0])
def test_boxes_masks_scores_and_names_are_those_of_a_plain_script(folder: Path, num_common: int) -> None:
    """The first phrases are asked of every image, the others are texts of this one."""
    model, image = micro(), make_scene(3, 96).image[:80]
    labels = {
        "by": "grounding_dino", "phrases": PHRASES[:num_common] or None, "checkpoint": str(folder),
        "score_thresh": SCORE, "text_thresh": TEXT, "nms_thresh": 1.0,
    }  # fmt: skip
    config = Config(labels=labels, masks={"min_mask_area": 0, "mask_nms_thresh": None})
    generator = build_generator(model, config, read_inputs(config))(None)
    image_phrases = PHRASES[num_common:]
    expected, names = plain_script(folder, Image.fromarray(image))
    order = np.argsort(-expected["scores"].numpy(), kind="stable")
    assert len(order) >= 3
    assert len(set(names)) >= 2, "several phrases are found"

    boxes = generator._detect(image, image_phrases)
    np.testing.assert_allclose(boxes.xyxy, expected["boxes"].numpy()[order], atol=1e-4 * 96)
    np.testing.assert_allclose(boxes.scores, expected["scores"].numpy()[order], atol=1e-4)
    assert [PHRASES[i] for i in boxes.phrases] == [names[i] for i in order]

    masks = sam_masks(model, image, expected["boxes"][order])
    expected_masks = [(mask, names[i], float(expected["scores"][i])) for mask, i in zip(masks, order, strict=True)]
    expected_masks = [one for one in expected_masks if one[0].any()]
    (records,) = generator.generate([image], [[Prompt(text=text) for text in image_phrases]])
    assert len(records) == len(expected_masks)
    for record, (mask, name, score) in zip(records, expected_masks, strict=True):
        differing = (coco_mask.decode(record["segmentation"]).astype(bool) != mask).mean()
        assert differing <= 1e-4
        assert record["label"] == name
        assert record["label_score"] == pytest.approx(score, abs=1e-4)
