"""The small painted world of `jobs/benchmark.py text`, and how masks by phrases are judged in it."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.benchmarks.text_prompts import compare
from jobs.benchmarks.text_world import HELD_OUT, KNOWN, PHRASES, paint


def test_training_never_shows_what_is_held_out() -> None:
    assert len(HELD_OUT) == 6
    assert not set(HELD_OUT) & set(KNOWN)
    scene = paint(5, 64, PHRASES)
    assert np.array_equal(scene.image, paint(5, 64, PHRASES).image)
    assert (scene.masks.sum(axis=0) <= 1).all(), "things do not hide each other"
    assert len(set(scene.names)) == len(scene.names)


def test_a_phrase_is_compared_with_all_others() -> None:
    scene = paint(5, 64, PHRASES)
    right = dict(zip(scene.names, scene.masks, strict=True))
    figures = compare([scene], [right], PHRASES)
    assert figures["miou"] == 1
    assert figures["miou_of_a_random_phrase"] == figures["miou_of_another_thing_in_the_image"] == 0
    everything = compare([scene], [dict.fromkeys(PHRASES, np.ones((64, 64), bool))], PHRASES)
    assert everything["miou"] == pytest.approx(everything["miou_of_a_random_phrase"])
