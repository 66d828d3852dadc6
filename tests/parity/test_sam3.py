"""SAM 3 against a plain script on transformers' own processor, network and post-processing, with random networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from samray.config import Config
from samray.labels.sam3 import ConceptGenerator, build_generator, read_inputs
from samray.scenes.scene import make_scene
from tests.support.networks import write_sam3
from tests.support.sam3_processor import sam3_processor

PHRASES = ["cat", "Fire hydrant", "red car", "dog"]


@dataclass
class Case:
    """The same network in both, and a threshold at which some phrases are found."""

    folder: Path
    thresh: float

    def __post_init__(self) -> None:
        from transformers import Sam3Model

        self.processor, self.network = sam3_processor(self.folder), Sam3Model.from_pretrained(self.folder).eval()
        labels = {"by": "sam3", "phrases": PHRASES, "checkpoint": str(self.folder), "score_thresh": self.thresh}
        config = Config(labels=labels)
        self.generator = build_generator(torch.device("cpu"), config, read_inputs(config))(None)
        assert isinstance(self.generator, ConceptGenerator)

    def plain_script(self, image: Image.Image, phrase: str) -> dict[str, Any]:
        """What a phrase finds, asked alone: scores (N,), boxes (N, 4), and masks (N, H, W) cut at 0.5, and at a
        probability 1e-4 lower (`outer`) and higher (`inner`)."""
        inputs = self.processor(images=image, text=phrase, return_tensors="pt")
        with torch.no_grad():
            outputs = self.network(**inputs)
        size = inputs["original_sizes"].tolist()
        presence = float(outputs.presence_logits.sigmoid())
        instances, outer, inner = (
            self.processor.post_process_instance_segmentation(
                outputs, threshold=self.thresh, mask_threshold=cut, target_sizes=size
            )[0]
            for cut in (0.5, 0.5 - 1e-4, 0.5 + 1e-4)
        )
        return {**instances, "presence": presence, "outer": outer["masks"], "inner": inner["masks"]}


@pytest.fixture(scope="module", params=[(3, 0.25), (5, 0.4)], ids=lambda param: f"seed {param[0]}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    seed, thresh = request.param
    return Case(write_sam3(tmp_path_factory.mktemp("sam3"), seed), thresh)


@pytest.mark.parametrize(("hw", "at_once"), [((80, 96), 1), ((80, 96), 3), ((37, 50), 8)])
def test_boxes_masks_scores_and_names_are_those_of_a_plain_script(
    case: Case, hw: tuple[int, int], at_once: int
) -> None:
    image, generator = make_scene(3, 96).image[: hw[0], : hw[1]], case.generator
    script = {phrase: case.plain_script(Image.fromarray(image), phrase) for phrase in PHRASES}
    assert sum(len(instances["scores"]) > 0 for instances in script.values()) >= 2, "several phrases are found"

    segmenter = generator.segmenter
    instances = list(segmenter.find(segmenter.encode(image), score_thresh=case.thresh, phrases_at_once=at_once))
    boxes = torch.cat([answer.xyxy for answer in instances]).numpy() * [*hw[::-1], *hw[::-1]]
    expected_boxes = torch.cat([answer["boxes"] for answer in script.values()]).numpy()
    np.testing.assert_allclose(boxes, expected_boxes, atol=1e-4 * max(hw))

    generator.phrases_at_once = at_once
    (records,) = generator.generate([image])
    assert [one["phrase"] for one in records.presence] == PHRASES
    presence = [one["score"] for one in records.presence]
    assert presence == pytest.approx([answer["presence"] for answer in script.values()], abs=1e-4)
    scores = [record["label_score"] for record in records]
    assert scores == sorted(scores, reverse=True)
    for phrase, answer in script.items():
        order = answer["scores"].argsort(descending=True, stable=True)
        expected = [i for i in order.tolist() if answer["masks"][i].any()]
        of_phrase = [record for record in records if record["label"] == phrase]
        assert len(of_phrase) == len(expected)
        for record, i in zip(of_phrase, expected, strict=True):
            assert record["label_score"] == pytest.approx(float(answer["scores"][i]), abs=1e-4)
            mask = torch.from_numpy(coco_mask.decode(record["segmentation"]))
            assert (answer["inner"][i] <= mask).all()
            assert (mask <= answer["outer"][i]).all()
            assert int((mask != answer["masks"][i]).sum()) <= 1


def test_pixels_are_those_of_the_processor(case: Case) -> None:
    for hw in [(80, 96), (1, 1), (1, 300), (300, 2), (56, 56)]:
        image = np.random.default_rng(0).integers(0, 255, (*hw, 3), dtype=np.uint8)
        expected = case.processor.image_processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(case.generator.segmenter.pixels.stretch(image), expected, atol=1e-6, rtol=0)
