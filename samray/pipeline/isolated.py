"""Label one image at a time in a child process, to find the images that crash the labelling process.

Used for a shard whose labelling processes have died before. The child loads its own model, which costs memory and time,
but its death identifies the image and loses nothing else. Every child first labels a small built-in image: if that
fails, the machine is at fault, not an image.
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
from samray.pipeline.attempts import ShardAttempts, TileMarks
from samray.pipeline.labeler import EncodedImage, ShardLabeler, make_record
from samray.pipeline.metrics import reserved_gpus
from samray.pipeline.report import Labelled
from samray.prompts import Prompt

if TYPE_CHECKING:
    from samray.config import Config

logger = logging.getLogger(__name__)

STARTS: Final = 3
"""Consecutive failed starts of a child before the machine is considered broken."""

START_TIMEOUT_S: Final = 1800.0
"""Seconds to load the model, possibly download it, and label the first image."""


class IsolatedLabeler:
    """Labels images in a child, which is started for the first image and again after each death."""

    def __init__(
        self,
        config: Config,
        make_labeler: Callable[[Config, int], ShardLabeler],
        decode: Callable[[EncodedImage], np.ndarray | ImageError],
    ) -> None:
        """decode: `ShardLabeler.decode` of the caller's labeler, which has its own children."""
        from ray import cloudpickle  # not in the child, where the import would dominate the start

        if config.model.device is None and reserved_gpus() == 0:  # the child is not a Ray worker and cannot ask
            config = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
        self._setup: bytes = cloudpickle.dumps((config, make_labeler))  # type: ignore[no-untyped-call]
        self._decode = decode
        self._timeout_s = config.cluster.no_progress_timeout_s
        self._child: Child | None = None

    def label(
        self,
        images: Sequence[EncodedImage],
        attempts: ShardAttempts | TileMarks,
        on_progress: Callable[[Labelled], None] = lambda batch: None,
    ) -> Labelled:
        """Like `ShardLabeler.label`, but marks each image while it is in progress.

        Raises ChildNotStarted if no child can label even the built-in image.
        """
        done = Labelled()
        for index, image in enumerate(images):
            if attempts.is_poison(index):
                message = f"the labelling processes of {attempts.strikes(index)} attempts died on this image"
                batch = _failed(image, ImageError("quarantined", message))
            else:
                # Marked before and unmarked after: if this process dies, too, the mark is what remains.
                attempts.mark(index)
                batch = self._label_one(image)
                attempts.unmark(index)
            done.add(batch)
            on_progress(batch)
        return done

    def close(self) -> None:
        """End the child, to free its model's memory."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _label_one(self, image: EncodedImage) -> Labelled:
        # Decoded elsewhere, under limits of its own: a death of this child is then due to labelling.
        decoded = self._decode(image)
        if isinstance(decoded, ImageError):
            return _failed(image, decoded)
        request = pickle.dumps(replace(image, data=decoded), protocol=5)
        deaths: list[ChildDied] = []
        # One death proves little: the machine may have been short of memory, or the child killed from outside.
        while not is_to_blame(deaths):
            # The child of the last image, or a new one after a death: the model is loaded once for many images.
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
        message = f"labelling only this image ended the process {len(deaths)} times, the last time by {how}"
        return _failed(image, ImageError("quarantined", message))

    def _start(self) -> Child:
        for attempt in range(1, STARTS + 1):
            try:
                return Child("samray.pipeline.isolated:answer_with", self._setup, START_TIMEOUT_S)
            except ChildNotStarted as error:
                if attempt == STARTS:
                    raise
                logger.warning("a labelling process did not start: %s", error)
        raise AssertionError


def _failed(image: EncodedImage, error: ImageError) -> Labelled:
    return Labelled(records=[make_record(image, error, error)])


def answer_with(setup: bytes) -> Callable[[bytes], Answer]:
    """The child's side; see `child.Child`. It is ready once it has labelled the built-in image."""
    config, make_labeler = pickle.loads(setup)
    labeler = make_labeler(config, 1)
    # A run with prompts needs one to label anything: a click in the middle of the object. Texts need no answer.
    click = [Prompt.parse({"points": [[20, 20]], "labels": [1]})] if config.labels.by is None else []
    prompts = None if config.input.prompts is None else click
    labeler.label([EncodedImage(0, "", "", _harmless_picture(), prompts)])

    def answer(request: bytes) -> Answer:
        batches: list[Labelled] = []  # of which there is one; unlike the sum of all, it has the embedding
        labeler.label([pickle.loads(request)], batches.append)
        return pickle.dumps(batches[0]), None

    return answer


def _harmless_picture() -> np.ndarray:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[16:40, 16:48] = (200, 120, 40)
    return pixels
