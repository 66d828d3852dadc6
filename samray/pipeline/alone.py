"""Labelling one image at a time in a process of its own, to find out which images end the process that labels them.

Used for a shard at which labelling processes have died before. The child has a model of its own, which costs memory
and the time to load it, but its death names the image and nothing else is lost. Every child first labels a small
picture of ours: if it cannot, it is the machine that is at fault, and no image.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from samray.errors import ImageError
from samray.inputs.child import Answer, Child, ChildDied, ChildNotStarted, how_it_ended, is_to_blame
from samray.pipeline.attempts import ShardAttempts
from samray.pipeline.labeler import EncodedImage, ShardLabeler, make_record
from samray.pipeline.metrics import reserved_gpus
from samray.pipeline.report import Labelled
from samray.prompts import Prompt

if TYPE_CHECKING:
    from samray.config import Config

logger = logging.getLogger(__name__)

STARTS: Final = 3
"""Times in a row that a child may fail to start before the machine is given up."""

START_TIMEOUT_S: Final = 1800.0
"""Loading the model, perhaps downloading it, and the first picture."""


class LonelyLabeler:
    """Labels images in a child, which is started with the first image and again after each death."""

    def __init__(
        self,
        config: Config,
        make_labeler: Callable[[Config, int], ShardLabeler],
        decode: Callable[[EncodedImage], np.ndarray | ImageError],
    ) -> None:
        """decode: `ShardLabeler.decode` of the caller's own labeler; it has children of its own."""
        from ray import cloudpickle  # not on the child's side, where it would take most of the start

        if config.model.device is None and reserved_gpus() == 0:  # the child cannot ask Ray
            config = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
        self._setup: bytes = cloudpickle.dumps((config, make_labeler))  # type: ignore[no-untyped-call]
        self._decode = decode
        self._timeout_s = config.cluster.no_progress_timeout_s
        self._child: Child | None = None

    def label(
        self,
        images: Sequence[EncodedImage],
        attempts: ShardAttempts,
        on_progress: Callable[[Labelled], None] = lambda batch: None,
    ) -> Labelled:
        """As `ShardLabeler.label`, with each image marked while it is under way.

        Raises ChildNotStarted if no child can label even our own picture.
        """
        done = Labelled()
        for place, image in enumerate(images):
            if attempts.is_poison(place):
                message = f"the labelling processes of {attempts.strikes(place)} attempts died at this image"
                batch = _failed(image, ImageError("quarantined", message))
            else:
                attempts.mark(place)
                batch = self._label_one(image)
                attempts.unmark(place)
            done.add(batch)
            on_progress(batch)
        return done

    def close(self) -> None:
        """End the child: its model takes memory."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _label_one(self, image: EncodedImage) -> Labelled:
        decoded = self._decode(image)
        if isinstance(decoded, ImageError):
            return _failed(image, decoded)
        request = pickle.dumps(replace(image, data=decoded), protocol=5)
        deaths: list[ChildDied] = []
        while not is_to_blame(deaths):
            child = self._child = self._child or self._start()
            try:
                answer, _ = child.ask(request, timeout_s=self._timeout_s)
                labelled: Labelled = pickle.loads(answer)
                return labelled
            except ChildDied as death:
                logger.warning("%s at image %s", death, image.uri)
                self._child = None
                deaths.append(death)
        how = how_it_ended(deaths[-1].returncode)
        message = f"labelling this image, alone, ended the process {len(deaths)} times, at last by {how}"
        return _failed(image, ImageError("quarantined", message))

    def _start(self) -> Child:
        for attempt in range(1, STARTS + 1):
            try:
                return Child("samray.pipeline.alone:answer_with", self._setup, START_TIMEOUT_S)
            except ChildNotStarted as error:
                if attempt == STARTS:
                    raise
                logger.warning("a labelling process did not start: %s", error)
        raise AssertionError


def _failed(image: EncodedImage, error: ImageError) -> Labelled:
    return Labelled(records=[make_record(image, error, error)])


def answer_with(setup: bytes) -> Callable[[bytes], Answer]:
    """The child's side, see `child.Child`. It is ready once it has labelled a picture that does no harm."""
    config, make_labeler = pickle.loads(setup)
    labeler = make_labeler(config, 1)
    prompts = None if config.input.prompts is None else [Prompt.parse({"points": [[20, 20]], "labels": [1]})]
    labeler.label([EncodedImage(0, "", "", _harmless_picture(), prompts)])

    def answer(request: bytes) -> Answer:
        return pickle.dumps(labeler.label([pickle.loads(request)])), None

    return answer


def _harmless_picture() -> np.ndarray:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[16:40, 16:48] = (200, 120, 40)
    return pixels
